"""What the theory commands print: tables, and one or two sentences made from the numbers."""

from __future__ import annotations

from typing import Any

from rich.table import Table

Numbers = dict[str, Any]


def percent(share: float) -> str:
    """A share in percent; zero and what is nearly zero do not look the same."""
    if share == 0:
        return "0 %"
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f} %"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def calibration_tables(numbers: Numbers) -> list[Table]:
    """One state, graded returns, several steps."""
    bandit = _table(
        "one state, returns 0 or 1",
        "std", "G", "points", "not negative", "size / large group", "intervals right", "above 0",
    )  # fmt: skip
    for row in numbers["bandit"]:
        low, high = row["slope_over_large_group_low"], row["slope_over_large_group_high"]
        bandit.add_row(
            row["normaliser"],
            str(row["group_size"]),
            str(row["points"]),
            str(row["not_negative"]),
            f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}",
            f"{row['intervals_holding_exact']} of {row['sampled']}",
            str(row["intervals_above_zero"]),
        )
    graded = _table("one state, returns 0, 0.5 or 1", "std", "G", "draws", "flawed gains")
    for row in numbers["graded"]:
        graded.add_row(
            row["normaliser"], str(row["group_size"]), str(row["draws"]), str(row["positive"])
        )
    steps = _table(
        f"several steps, {numbers['horizon']['tasks']} random tasks",
        "std", "weight", "all", "flawed", "good", "flawed mean > 0", "flawed logits lifted",
    )  # fmt: skip
    for row in numbers["horizon"]["rows"]:
        steps.add_row(
            row["normaliser"],
            f"per {row['unit']}",
            *(f"{row[f'mean_over_{kind}']:+z.3f}" for kind in ("all", "flawed", "good")),
            f"{row['tasks_flawed_mean_positive']} tasks",
            f"{row['flawed_places_pushed_up']} of {row['flawed_places']}",
        )
    return [bandit, graded, steps, _calibration_examples(numbers)]


def _calibration_examples(numbers: Numbers) -> Table:
    """One counter-example of every kind; none of one state with returns 0 or 1 is expected."""
    table = _table("counter-examples", "where", "what", "E[Â | flawed]", "gradient")
    for row in numbers["bandit"]:
        for found in row["counter_examples"]:
            text = f"p = {found['success']:g}, q = {found['rate']:g}, r = {found['risk']:g}"
            where = f"one state, std {row['normaliser']}, G = {row['group_size']}"
            table.add_row(where, text, "not negative", "")
    example = numbers["graded_example"]
    for name in ("std, G=2", "std, G=8"):
        text = (
            f"returns {_list(example['levels'])} with {_list(example['flawed'])}, "
            f"otherwise {_list(example['other'])}"
        )
        table.add_row(f"graded, {name}", text, f"{example['advantage'][name]:+.4f}", "")
    for name, text in (
        ("fork, step", "the flawed action is met on the good way only"),
        ("detour, episode", "the flawed action fails slowly"),
    ):
        found = numbers["horizon"]["examples"][name]
        mean, gradient = found["mean_over_flawed"], found["gradient_on_flawed"]
        table.add_row(name, text, f"{mean:+.4f}", f"{gradient:+.4f}")
    return table


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def calibration_verdict(numbers: Numbers) -> str:
    """The statement of one state, and where it ends."""
    rows, steps = numbers["bandit"], numbers["horizon"]
    wrong, points = sum(r["not_negative"] for r in rows), sum(r["points"] for r in rows)
    held, sampled = (sum(r[k] for r in rows) for k in ("intervals_holding_exact", "sampled"))
    one = "is negative at all" if not wrong else f"is NOT negative at {wrong} of"
    std = [r for r in numbers["graded"] if r["normaliser"] == "std"]
    lifted = {r["unit"]: percent(r["flawed_places_pushed_up_share"]) for r in steps["rows"]}
    means = max(r["tasks_flawed_mean_positive"] for r in steps["rows"])
    return (
        f"One state, returns 0 or 1: the expected advantage of the flawed action {one} {points} "
        f"points, and {held} of {sampled} sampled 95 % intervals hold the closed form. It does not "
        "carry over unchanged: with graded returns, dividing by the standard deviation rewards the "
        f"flawed action in {sum(r['positive'] for r in std)} of {sum(r['draws'] for r in std)} "
        "random cases; over several steps the mean over flawed steps is positive in up to "
        f"{means} of {steps['tasks']} tasks, while the gradient lifts {lifted['step']} of flawed "
        f"logits with equal weight per step and {lifted['episode']} with equal weight per episode."
    )


def squeezing_tables(numbers: Numbers) -> list[Table]:
    """Exact flow by risk ratio, and GRPO against its flow."""
    exact = _table(
        f"exact flow, {numbers['starts']} starts, until {numbers['horizon']:g} / r2",
        "r3 / r2", "mild rises", "worst rises", "sum rises", "by at most", "from",
        "if good leads", "w rises",
    )  # fmt: skip
    for row in numbers["ratios"]:
        exact.add_row(
            f"{row['ratio']:g}",
            percent(row["mild_rises"]),
            percent(row["worst_rises"]),
            percent(row["total_rises"]),
            f"{row['largest_rise']:.3f}",
            _list(row["largest_rise_from"]) if row["total_rises"] else "",
            percent(row["total_rises_where_good_most_likely"]),
            percent(row["risk_weighted_rises"]),
        )
    return [exact, _sampled_table(numbers["sampled"], "probabilities")]


def _sampled_table(rows: list[Numbers], what: str) -> Table:
    table = _table(
        f"sampled GRPO against its flow, largest gap of mean {what}",
        "std", "rate", "seeds", "gap", "standard error there",
    )  # fmt: skip
    for row in rows:
        for step in row["rows"]:
            table.add_row(
                row["normaliser"],
                f"{step['rate']:g}",
                str(step["seeds"]),
                f"{step['largest_gap']:.4f}",
                f"{step['standard_error_there']:.4f}",
            )
    return table


def squeezing_verdict(numbers: Numbers) -> str:
    """Whether one rises, whether the sum rises, and what never does."""
    rows = numbers["ratios"]
    most = max(rows, key=lambda r: r["total_rises"])
    start = _list(most["largest_rise_from"])
    shares = [r["one_rises"] for r in rows]
    leading = percent(max(r["total_rises_where_good_most_likely"] for r in rows))
    text = (
        f"A single flawed action rises for a while from {percent(min(shares))} to "
        f"{percent(max(shares))} of the starts, by risk. "
    )
    if most["total_rises"]:
        text += (
            "The claim that the flawed mass as a whole falls everywhere is NOT reproduced: at "
            f"r3 / r2 = {most['ratio']:g} it rises for a while from {percent(most['total_rises'])} "
            f"of the starts, by up to {most['largest_rise']:.3f} (from good, worst, mild = "
            f"{start}), but from {leading} of those where the good action is the likeliest."
        )
    else:
        text += "The flawed mass as a whole falls from all of them."
    weighted = percent(max(r["risk_weighted_rises"] for r in rows))
    text += f" The risk-weighted mass w rises from {weighted}."
    shared = numbers["random_features"]
    if shared:
        text += (
            f" With {shared['grams']} random shared features the flawed mass rises at "
            f"{percent(shared['total_rises'])} of the points, and at "
            f"{percent(shared['total_rises_where_good_above_half'])} of those where the good "
            "action has more than half of the mass"
        )
        example = shared["example_where_good_above_half"]
        if example:
            gram = example["gram"]
            text += (
                f" (as from {_list(example['start'])} with r3 / r2 = {example['ratio']:g} and the "
                f"overlaps good-worst {gram[0][1]:.2f}, good-mild {gram[0][2]:.2f}, "
                f"flawed {gram[1][2]:.2f})"
            )
        text += "."
    return text


def regions_tables(numbers: Numbers) -> list[Table]:
    """Starts with low and with high q by gain and overlap, and GRPO against its flow."""
    table = _table(
        f"exact flow, {numbers['starts']} starts, until {numbers['horizon']:g}; "
        "from q < .2 | from .8 < q < .95",
        "r'", "κ", "lifted at once", "reach q > .95", "mean time there", "q > .5 at the end",
    )  # fmt: skip
    for row in numbers["rows"]:
        table.add_row(
            f"{row['gain']:g}",
            f"{row['overlap']:g}",
            *(_pair(row, key, 100, " %") for key in ("rises_at_start", "near_one_from")),
            _pair(row, "mean_time_near_one"),
            _pair(row, "above_half_at_end", 100, " %"),
        )
    return [table, _sampled_table(numbers["sampled"], "q and q'")]


def _pair(row: Numbers, key: str, scale: float = 1, unit: str = "") -> str:
    """`3 | 40 %`: the number of the low and of the high starts."""
    low, high = (f"{scale * row[f'{key}_{kind}']:.0f}" for kind in ("low", "high"))
    return f"{low} | {high}{unit}"


def regions_verdict(numbers: Numbers) -> str:
    """Danger and safe starts of the chosen model, and the low starts that are not safe."""
    model = numbers["model"]
    row = next(
        r for r in numbers["rows"] if (r["gain"], r["overlap"]) == (model["gain"], model["overlap"])
    )
    text = (
        f"At κ = {model['overlap']:g}, {percent(row['near_one_from_high'])} of the starts with "
        f".8 < q < .95 rise above .95, and {percent(row['above_half_at_end_high'])} are still "
        f"above .5 at the end; of those with q < .2 it is {percent(row['near_one_from_low'])} and "
        f"{percent(row['above_half_at_end_low'])}, though {percent(row['rises_at_start_low'])} are "
        "lifted at first."
    )
    unsafe = [r for r in numbers["rows"] if r["low_start_near_one"]]
    if unsafe:
        most = max(unsafe, key=lambda r: r["near_one_from_low"])
        start = _list(most["low_start_near_one"])
        text += (
            f" A low start is not always safe: with r' = {most['gain']:g} and κ = "
            f"{most['overlap']:g}, {percent(most['near_one_from_low'])} of them are carried above "
            f".95, such as (q, q') = ({start})."
        )
    if "measured" in numbers:
        found = numbers["measured"]
        text += (
            f" {found['lifted']} of {found['points']} measured points have a coupled push above "
            f"the correction: {found['lifted_high']} of {found['high']} with q > .8, "
            f"{found['lifted_low']} of {found['low']} with q < .2."
        )
    return text
