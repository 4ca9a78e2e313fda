"""What the evaluations of a finished run found. What is damaged is left out, with a note."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from untwine.config import Recipe
from untwine.report.run_data import RunData, number
from untwine.report.shape import Misshapen, each, shaped, share

Key = tuple[str, str]
"""Set and decoding of an evaluation."""

Row = Mapping[str, Any]
Results = dict[Key, list[Row]]
"""Rows by key, the newest last."""

_SCORES = {"success_rate": share, "outcome_mean": float}
_SHAPE = {
    "set": str,
    "identity": {"digest": str, "decoding": str, "environment": str, "episodes": int},
    "by_task": each(_SCORES),
    **_SCORES,
}


def read_results(data: RunData, recipe: Recipe, who: str, notes: list[str]) -> Results:
    """The evaluations of the policy a run ended with, by that agent; with a note on others, and one
    when there is none.

    who  what notes call the run
    """
    results: Results = {}
    left_out: Counter[str] = Counter()
    for row in _last_rows(data, recipe):
        if why := _unfit(row):
            left_out[why] += 1
        else:
            results.setdefault((row["set"], row["identity"]["decoding"]), []).append(row)
    said = " and ".join(f"{count} {why}" for why, count in left_out.items())
    if not results:
        notes.append(
            f"{who}: no evaluation after the last iteration ({said or 'none'}), make one with "
            f"`{evaluate_command(data, recipe)}`."
        )
    elif said:
        notes.append(f"{who}: evaluations left out: {said}.")
    return results


def evaluate_command(data: RunData, recipe: Recipe) -> str:
    """What evaluates a run as its recipe says, or with what the recipe leaves open."""
    sets = "" if recipe.evaluate.sets else " --sets L0,L1"
    episodes = "" if recipe.evaluate.episodes else " --episodes N"
    return f"untwine evaluate {data.path}{sets}{episodes}"


def _last_rows(data: RunData, recipe: Recipe) -> Iterator[Row]:
    last = number(data.info.get("iterations"))
    last = recipe.rl.iterations if last is None else last
    phase = "rl" if last else "cold_start"
    for row in data.evaluate:
        if row.get("phase") == phase and (not last or row["step"] == last):
            yield row
    yield from data.evaluated


def _unfit(row: Row) -> str:
    """Why a row does not count; "" when it does."""
    if not row.get("identity"):
        return "of an older version"
    if changes := row.get("overrides"):
        keys = ", ".join(map(str, changes)) if isinstance(changes, Mapping) else str(changes)
        return f"of another agent (overrides of {keys})"
    try:
        if not shaped(row, _SHAPE)["by_task"]:
            return "damaged (by_task is empty)"
    except Misshapen as error:
        return f"damaged ({error})"
    return ""


def lacking_tasks(found: Sequence[Results]) -> list[str]:
    """For each run the tasks that its results lack, though the same evaluation has them elsewhere;
    such results are taken out."""
    tasks: dict[str, set[str]] = {}
    for results in found:
        for row in _rows(results):
            tasks.setdefault(row["identity"]["digest"], set()).update(row["by_task"])
    said = []
    for results in found:
        missing: set[str] = set()
        for key, rows in list(results.items()):
            lacks = [tasks[row["identity"]["digest"]] - row["by_task"].keys() for row in rows]
            missing.update(*lacks)
            results[key] = [row for row, lack in zip(rows, lacks, strict=True) if not lack]
            if not results[key]:
                del results[key]
        said.append(", ".join(sorted(missing)))
    return said


def _rows(results: Results) -> Iterator[Row]:
    for rows in results.values():
        yield from rows
