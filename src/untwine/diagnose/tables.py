"""What the diagnose commands show on the terminal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from untwine.diagnose.lift_table import LEAST, LiftRow, lift_rows
from untwine.diagnose.population import in_order
from untwine.diagnose.truth_file import Truth, TruthRow
from untwine.prompt_diff import prompt_diff

_SHOWN = 8
_DIFF = 1600  # characters of a prompt diff
_MARKS = {
    "first": ("[-", "-]", "red"),
    "second": ("{+", "+}", "green"),
    "cut": (" … ", " … ", "dim"),
}


def print_truth(truth: Truth) -> None:
    """Labels with what chance could give, by kind and position, then the clearest flawed steps."""
    head, rows = truth.header, truth.rows
    console = Console()
    table = Table(title=f"iteration {head['iteration']}: true advantage of {len(rows)} steps")
    for column in ("steps", "judged", "flawed", "neutral", "good", "mean A*", "mean q"):
        table.add_column(column, justify="left" if column == "steps" else "right")
    _row(table, "all", rows)
    for attribute in ("kind", "position"):
        table.add_section()
        parts: dict[str, list[TruthRow]] = defaultdict(list)
        for row in rows:
            parts[getattr(row, attribute)].append(row)
        for name in in_order(parts):
            _row(table, name, parts[name])
    console.print(table)
    flawed = head["labels"]["flawed"]
    console.print(
        f"flawed: {flawed['steps']} steps ({100 * flawed['share']:.1f} % of all); "
        f"by chance alone at most {head['flawed_by_chance']:.1f} would be expected",
        highlight=False,
    )
    console.print(
        f"{head['unclear']} of the {head['steps']} steps are neutral for want of branches; "
        f"{head['branches_played']} branches, {head['env_steps']} environment steps",
        highlight=False,
    )
    _print_faults(console, head)
    _print_worst(console, rows)


def _row(table: Table, name: str, rows: Sequence[TruthRow]) -> None:
    weight = sum(row.weight for row in rows) or 1.0
    counts = [
        str(sum(row.label == label for row in rows)) for label in ("flawed", "neutral", "good")
    ]
    advantage = sum(row.weight * row.advantage for row in rows) / weight
    q = sum(row.weight * row.q for row in rows) / weight
    table.add_row(name, str(len(rows)), *counts, f"{advantage:+.3f}", f"{q:.2f}")


def _print_faults(console: Console, head: dict[str, Any]) -> None:
    if head["mismatches"]:
        first = head["mismatches"][0]
        console.print(
            f"[yellow]{len(head['mismatches'])} of {head['replayed_episodes']} episodes could not "
            f"be repeated[/yellow] (the first one: {escape(first['episode'])}, step "
            f"{first['step']}, other {first['what']}); {head['steps_left_out']} steps left out",
            highlight=False,
        )
    elif head["steps_left_out"]:
        console.print(
            f"[yellow]{head['steps_left_out']} steps left out[/yellow]: the environment did not "
            "come back to their states",
            highlight=False,
        )
    if head["policy_gap"] > 0.05:
        console.print(
            "[yellow]this is not the policy that played the episodes[/yellow]: log-probabilities "
            f"of actions differ by up to {head['policy_gap']:.2g}",
            highlight=False,
        )


def _print_worst(console: Console, rows: Sequence[TruthRow]) -> None:
    worst = sorted((r for r in rows if r.label == "flawed"), key=lambda r: r.high)[:_SHOWN]
    if not worst:
        return
    table = Table(title="clearly flawed")
    for column in ("step", "action", "q", "Q", "V", "A*"):
        left = column in ("step", "action")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "action")
    for row in worst:
        table.add_row(
            escape(f"{row.episode}:{row.step}"),
            escape(row.action.replace("\0", "")[:40]),
            f"{row.q:.2f}",
            _between(row.action_value, row.action_value_low, row.action_value_high),
            _between(row.value, row.value_low, row.value_high),
            _between(row.advantage, row.low, row.high, "+"),
        )
    console.print(table)


def _between(value: float | None, low: float, high: float, sign: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:{sign}.2f} \\[{low:{sign}.2f}, {high:{sign}.2f}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def print_label_quality(numbers: dict[str, Any]) -> None:
    """One line for each source in either table."""
    console = Console()
    table = Table(
        title=f"label sources against the truth of {numbers['steps']} steps",
        caption="in percent, with 95 % intervals; labels on neutral steps count against precision",
    )
    table.add_column("source")
    for column in ("coverage", "accuracy", "precision flawed", "recall flawed"):
        table.add_column(column, justify="right")
    for column in ("precision good", "recall good"):
        table.add_column(column, justify="right")
    for name, found in numbers["sources"].items():
        shares = [found["coverage"], found["accuracy"]]
        for verdict in ("flawed", "good"):
            shares += [found[verdict]["precision"], found[verdict]["recall"]]
        table.add_row(escape(name), *map(_share, shares))
    console.print(table)
    worth = Table(
        title="what steps with such a label are worth",
        caption="mean true advantage, with 95 % intervals",
    )
    worth.add_column("source")
    for column in ("called flawed", "called good", "good minus flawed"):
        worth.add_column(column, justify="right")
    for name, found in numbers["sources"].items():
        means = [found["worth"][key] for key in ("flawed_mean", "good_mean", "difference")]
        worth.add_row(escape(name), *map(_with_interval, means))
    console.print(worth)


def _share(share: dict[str, Any]) -> str:
    if share["value"] is None:
        return "–"
    low, high = share["interval"]
    return f"{100 * share['value']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def print_calibration(result: dict[str, Any]) -> None:
    """The methods side by side, then each by kind and position, then the lemma."""
    console = Console()
    steps = f"{result['steps']} steps, {result['flawed']} flawed, {result['good']} good"
    chance = result["flawed_by_chance"]
    if chance is not None:
        steps += f" (flawed by chance alone: at most {chance:.1f})"
    console.print(f"{steps}; {result['note']}", highlight=False)
    methods = {n: m for n, m in result["methods"].items() if "not_applicable" not in m}
    if methods:
        console.print(_side_by_side({n: m["all"] for n, m in methods.items()}, result["source"]))
    for name, method in methods.items():
        console.print(_parts(name, method))
        if method["lemma"]:
            _print_lemma(console, method["lemma"])
    _print_plans(console, result["plans"])
    for name in result["methods"].keys() - methods.keys():
        reason = result["methods"][name]["not_applicable"]
        console.print(f"{escape(name)}: not applicable, {escape(reason)}", highlight=False)


def _print_plans(console: Console, plans: dict[str, Any]) -> None:
    """Whether kinds that need a planner were looked for."""
    if plans["abstained"]:
        text = f"no step is called off_plan here: {escape(plans['abstained'])}"
    elif not plans["env_steps"]:
        return
    else:
        text = (
            f"{plans['steps']} steps of no other kind were compared with shortest plans: "
            f"{plans['env_steps']} commands given anew; episodes that went otherwise: "
            f"{plans['mismatches']}"
        )
    console.print(text, highlight=False, soft_wrap=True)


def _side_by_side(methods: dict[str, dict[str, Any]], source: str) -> Table:
    against = "the truth" if source == "truth" else f"labels of source {source}"
    table = Table("measure", title=f"estimated advantage against {against}")
    for name in methods:
        table.add_column(escape(name), justify="right")
    rows: list[tuple[str, list[str]]] = []
    for key, title in _MEASURES:
        rows.append((title, [_with_interval(m[key]) for m in methods.values()]))
    for key, title in _MEASURES[:3]:
        values = [_with_interval(m["by_episode"][key]) for m in methods.values()]
        rows.append((f"{title}, per episode", values))
    for key in ("sign_agreement", "rank_correlation", "variance"):
        rows.append((key.replace("_", " "), [_number(m[key]) for m in methods.values()]))
    for title, cells in rows:
        table.add_row(title, *cells)
    return table


_MEASURES = (
    ("flawed_mean", "mean over flawed steps"),
    ("good_mean", "mean over good steps"),
    ("difference", "good minus flawed"),
    ("miscalibration", "P(estimate > 0 | flawed)"),
    ("mean_estimate", "mean over all steps"),
    ("mean_advantage", "mean A* of all steps"),
)


def _parts(name: str, method: dict[str, Any]) -> Table:
    table = Table(title=f"{escape(name)} by kind and position")
    columns = ("steps", "all", "flawed", "good", "mean A*", "mean", "flawed mean", "P(>0|flawed)")
    for column in columns:
        table.add_column(column, justify="left" if column == "steps" else "right")
    for part in ("by_kind", "by_position"):
        table.add_section()
        for title, row in method[part].items():
            means = ("mean_estimate", "flawed_mean")
            table.add_row(
                escape(title),
                *(str(row[key]) for key in ("steps", "flawed", "good")),
                _with_interval(row["mean_advantage"]),
                *("–" if row[key] is None else f"{row[key]['value']:+.2f}" for key in means),
                _share_of(row["miscalibration"]),
            )
    return table


def _share_of(found: dict[str, Any] | None) -> str:
    return "–" if found is None else f"{found['value']:.2f}"


def _print_lemma(console: Console, lemma: dict[str, float]) -> None:
    console.print(
        f"flawed steps, mean advantage: measured {lemma['measured']:+.3f}; the lemma's -r(1-q) is "
        f"{lemma['policy_q']:+.3f} with the policy's q and {lemma['group_q']:+.3f} with that of "
        f"the group (divided by the group's deviation: {lemma['policy_q_in_deviations']:+.3f} and "
        f"{lemma['group_q_in_deviations']:+.3f})",
        highlight=False,
    )


def _with_interval(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    text = f"{found['value']:.3f}"
    if found["interval"]:
        low, high = found["interval"]
        text += f" \\[{low:.3f}, {high:.3f}]"
    return text


def print_coupling(numbers: Mapping[str, Any], diffs: int = 3) -> None:
    """Tables of `measure_coupling`, what to distrust first; then, for the `diffs` worst offenders,
    their prompt beside that of the sample that pushes them most."""
    console = Console()
    drift, honesty = numbers["drift"], numbers["honesty"]
    lines = [
        f"iteration {numbers['iteration']}, {numbers['samples']} of {numbers['distinct']} distinct "
        f"trained steps ({numbers['steps']} in all), {numbers['metric']} metric, policy "
        f"{numbers['policy']}",
        f"log pi differs from the recorded one by {drift['mean']:.2g} on average "
        f"(largest {drift['largest']:.2g})"
        + ("" if drift["mean"] < 0.1 else ": this is not the policy that sampled these steps"),
        "honesty check: nothing would change"
        if honesty is None
        else f"honesty check, predicted against measured change: correlation "
        f"{_number(honesty['correlation'], 4)}, slope {_number(honesty['slope'], 3)}",
        "Gram of the head alone against the exact one: correlation "
        + _number(numbers["head_correlation"], 3),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, rates in numbers["reinforced"].items():
        console.print(_rate_table(f"reinforced though flawed ({name}), this batch", rates))
    push = numbers["mean_push"]
    if push is not None:
        share = _number(push["signal_share"], 3)
        title = f"pushed up by the mean of {push['batches']} batches (signal share {share})"
        console.print(_rate_table(title, push["rates"]))
    if rows := lift_rows(numbers["lifts"]):
        console.print(_lift_table(rows, numbers["lifts"]))
    if numbers["credits"]:
        console.print(_credit_table(numbers["credits"]))
    console.print(_cosine_table(numbers["cosines"]))
    console.print(_offender_table(numbers["offenders"]))
    for place, offender in enumerate(numbers["offenders"][:diffs], start=1):
        for text in _beside_its_pusher(place, offender):
            console.print(text, soft_wrap=True)


def _rate_table(title: str, rates: Mapping[str, Any]) -> Table:
    table = Table(title=title)
    table.add_column("steps")
    for column in ("flawed", "lifted", "rate", "permuted", "p"):
        table.add_column(column, justify="right")
    for name, rate in rates.items():
        if not rate["flawed"]:
            continue
        null = "–"
        if rate["null"] is not None:
            null = f"{100 * rate['null']:.0f} %"
        if rate["interval"] is not None:
            low, high = rate["interval"]
            null += f" [{100 * low:.0f}, {100 * high:.0f}]"
        share = "–" if rate["share"] is None else f"{100 * rate['share']:.0f} %"
        counts = [str(rate["flawed"]), str(rate["reinforced"])]
        table.add_row(escape(name), *counts, share, null, _number(rate["p_value"], 3))
    return table


def _lift_table(rows: Sequence[LiftRow], lifts: Mapping[str, Any]) -> Table:
    table = Table(
        title="who lifts punished flawed steps (in units of what they do to themselves)",
        caption=f"mean over the steps of a kind; sources below {LEAST:g} everywhere are left out "
        "of the rows, not of the sum",
    )
    table.add_column("samples that push")
    for kind in rows[0].values:
        table.add_column(escape(f"{kind} ({lifts[kind]['targets']})"), justify="right")
    for row in rows:
        if row.name == "sum":
            table.add_section()
        cells = ["–" if value is None else f"{value:+.2f}" for value in row.values.values()]
        table.add_row(row.name, *cells)
    return table


def _credit_table(credits: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(
        title="what one step would do to good and flawed steps, by its credit",
        caption="mean change of log pi, from other prompts only, by steps of equal length, in "
        "units of the mean norm of a step's gradient",
    )
    table.add_column("credit")
    for column in ("good", "flawed", "good minus flawed"):
        table.add_column(column, justify="right")
    for name, found in credits.items():
        values = (found["good"], found["flawed"], found["difference"])
        table.add_row(name, *(f"{value:+.3f}" for value in values))
    return table


def _cosine_table(histograms: list[dict[str, Any]]) -> Table:
    table = Table(title="mean cosine coupling (pairs)")
    relations = list(dict.fromkeys(h["relation"] for h in histograms))
    table.add_column("pair")
    for relation in relations:
        table.add_column(relation, justify="right")
    for kind in dict.fromkeys(h["kind"] for h in histograms):
        cells = {h["relation"]: h for h in histograms if h["kind"] == kind}
        shown = [f"{_number(cells[r]['mean'], 2)} ({cells[r]['pairs']})" for r in relations]
        table.add_row(kind, *shown)
    return table


def _offender_table(offenders: list[dict[str, Any]]) -> Table:
    table = Table(title="flawed actions that training lifts, and who lifts them")
    for column in ("action", "task", "pi", "self", "coupled", "pushed by"):
        table.add_column(column, justify="right" if column in ("pi", "self", "coupled") else "left")
    for one in offenders:
        pushers = "\n".join(
            f"{_short(p['text'])} ({p['push']:+.4f}, cos {p['cosine']:.2f})" for p in one["pushers"]
        )
        kind = f" ({one['kind']})" if one["kind"] else ""
        table.add_row(
            escape(_short(one["text"]) + _visible(kind)),
            escape(_visible(one["task"])),
            f"{one['probability']:.3f}",
            f"{one['own']:+.4f}",
            f"{one['coupled']:+.4f}",
            escape(pushers),
        )
    return table


def _beside_its_pusher(place: int, offender: Mapping[str, Any]) -> list[Text]:
    """An offender, its strongest pusher, and both prompts as one text with marks."""
    kind = f" ({offender['kind']})" if offender["kind"] else ""
    head = f"\n{place}. {_short(offender['text'])}{kind}: {offender['delta']:+.4f}"
    if not offender["pushers"]:
        return [Text(f"{_visible(head)}; no other sample pushes it up", "bold")]
    pusher = offender["pushers"][0]
    what = "rewarded" if pusher["weight"] > 0 else "punished"
    head += f", of which {pusher['push']:+.4f} from {_short(pusher['text'])} ({what})"
    lines = [Text(_visible(head), "bold")]
    pieces = prompt_diff(offender["prompt"], pusher["prompt"], _DIFF)
    if all(part in ("same", "cut") for part, _ in pieces):
        return [*lines, Text("both prompts are equal; only the actions differ", "dim")]
    lines.append(Text("prompts: [-only the flawed step's-] {+only the pusher's+}", "dim"))
    shown = Text()
    for part, text in pieces:
        before, after, style = _MARKS.get(part, ("", "", ""))
        shown.append(f"{before}{_visible(text)}{after}", style)
    return [*lines, shown]


def _visible(text: str) -> str:
    """Text without what could steer a terminal: control and direction characters spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"[U+{ord(c):04X}]" for c in text)


def print_separation(numbers: Mapping[str, Any]) -> None:
    """One row per layer; what shuffled labels give stands in brackets."""
    console = Console()
    console.print(
        f"iteration {numbers['iteration']}, {numbers['samples']} distinct labelled steps "
        f"({numbers['flawed']} flawed) of {numbers['tasks']} task instances, {numbers['pool']} of "
        f"the action's tokens, policy {numbers['policy']}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title="separation of good and flawed actions (shuffled labels in brackets)")
    for column in ("layer", "probe", "balanced", "constant", "silhouette", "margin"):
        table.add_column(column, justify="right")
    for row in numbers["layers"]:
        table.add_row(
            str(row["layer"]),
            _number(row["accuracy"], 2),
            _number(row["balanced"], 2),
            _number(row["majority"], 2),
            f"{row['silhouette']:.3f} ({row['silhouette_shuffled']:.3f})",
            f"{row['margin']:.2f} ({row['margin_shuffled']:.2f})",
        )
    console.print(table)


def print_judging(numbers: Mapping[str, Any]) -> None:
    """What a step along each gradient changes, and how far permuted labels go."""
    console = Console()
    right = numbers["right_verdicts"]
    lines = [
        f"iteration {numbers['iteration']}, {numbers['samples']} of {numbers['distinct']} distinct "
        f"trained steps ({numbers['good']} good, {numbers['flawed']} flawed), policy "
        f"{numbers['source']}",
        f"{numbers['questions']} questions ({numbers['objective']})"
        + ("" if right is None else f", {100 * right:.0f} % answered right")
        + f"; their gradient is {numbers['norm_ratio']:.2g} times as long as the policy's, cosine "
        + _number(numbers["cosine"], 3),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table(
        title="what one step changes in log pi of commands",
        caption="steps of equal length, in units of what the policy's changes (root mean square)",
    )
    table.add_column("step down the loss of")
    for column in ("good steps", "flawed steps", "good minus flawed"):
        table.add_column(column, justify="right")
    for name, row in (("policy", numbers["policy"]), ("verdicts", numbers["verdict"])):
        table.add_row(name, *(f"{row[key]:+.3f}" for key in ("good", "flawed", "difference")))
    if numbers["permuted"]:
        cells = []
        for key in ("good", "flawed", "difference"):
            values = [row[key] for row in numbers["permuted"]]
            cells.append(f"{min(values):+.3f} to {max(values):+.3f}")
        table.add_row(f"verdicts, labels permuted ({len(numbers['permuted'])} times)", *cells)
    console.print(table)


def _short(text: str, most: int = 40) -> str:
    line = _visible(" ".join(text.split())) or "(empty)"
    return line if len(line) <= most else line[: most - 1] + "…"
