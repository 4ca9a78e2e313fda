"""Who lifts flawed steps, as rows of a table: for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEAST = 0.1
"""Size from which a source is shown, in units of the self term."""
FEWEST = 5
"""Kinds with fewer steps are left out; key `all` stays."""


@dataclass(frozen=True, slots=True)
class LiftRow:
    """One source; `values` by kind in units of the size of the kind's self term, None where the
    kind has no such samples."""

    name: str
    values: Mapping[str, float | None]


def lift_rows(lifts: Mapping[str, Mapping[str, Any]], *, least: float = LEAST) -> list[LiftRow]:
    """Rows self, the sources, sum; columns are keys of `lifts` (coupling.json). Sources are ordered
    by the first column, what lifts before what holds down. Empty where nothing has a self term, as
    where all actions were forced.

    least  sources that are smaller for every kind are left out
    """
    shown = {k: own for k, own in lifts.items() if k == "all" or own["targets"] >= FEWEST}
    scales = {kind: abs(own["own"]) for kind, own in shown.items() if own["own"]}
    sources: dict[str, dict[str, float]] = {}
    for kind, scale in scales.items():
        for source in lifts[kind]["sources"]:
            name = f"{source['relation']}, {source['credit']}, {source['verdict'] or 'no label'}"
            sources.setdefault(name, {})[kind] = source["mean"] / scale
    large = {name: row for name, row in sources.items() if max(map(abs, row.values())) >= least}
    order = sorted(large, key=lambda name: -next(iter(large[name].values())))
    ends = (
        LiftRow(name, {kind: lifts[kind][key] / scale for kind, scale in scales.items()})
        for name, key in (("self", "own"), ("sum", "delta"))
    )
    first, last = ends
    middle = (LiftRow(name, {kind: large[name].get(kind) for kind in scales}) for name in order)
    return [first, *middle, last] if scales else []
