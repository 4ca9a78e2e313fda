"""What the diagnose commands show on the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from untwine.diagnose.truth_file import Truth, TruthRow

_SHOWN = 8


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
        for name, part in sorted(parts.items()):
            _row(table, name, part)
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
    for column in ("step", "action", "q", "Q", "V", "A*", "interval"):
        left = column in ("step", "action")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "action")
    for row in worst:
        table.add_row(
            escape(f"{row.episode}:{row.step}"),
            escape(row.action.replace("\0", "")[:40]),
            f"{row.q:.2f}",
            *("–" if x is None else f"{x:.2f}" for x in (row.action_value, row.value)),
            f"{row.advantage:+.2f}",
            f"{row.low:+.2f} {row.high:+.2f}",
        )
    console.print(table)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


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
        console.print(_side_by_side({n: m["all"] for n, m in methods.items()}))
    for name, method in methods.items():
        console.print(_parts(name, method))
        if method["lemma"]:
            _print_lemma(console, method["lemma"])
    for name in result["methods"].keys() - methods.keys():
        reason = result["methods"][name]["not_applicable"]
        console.print(f"{escape(name)}: not applicable, {escape(reason)}", highlight=False)


def _side_by_side(methods: dict[str, dict[str, Any]]) -> Table:
    table = Table("measure", title="estimated advantage against the truth")
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
            means = ("mean_estimate", "flawed_mean", "miscalibration")
            table.add_row(
                escape(title),
                *(str(row[key]) for key in ("steps", "flawed", "good")),
                _with_interval(row["mean_advantage"]),
                *("–" if row[key] is None else f"{row[key]['value']:+.2f}" for key in means),
            )
    return table


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
