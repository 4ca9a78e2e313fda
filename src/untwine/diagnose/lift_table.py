"""Who lifts flawed steps, as rows of a table: for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEAST = 0.05
"""Rows that are smaller everywhere, in units of the self term, are left out."""


@dataclass(frozen=True, slots=True)
class LiftRow:
    """One source; `values` by kind in units of the size of the kind's self term, None where the
    kind has no such samples."""

    name: str
    values: Mapping[str, float | None]


def lift_rows(lifts: Mapping[str, Mapping[str, Any]]) -> list[LiftRow]:
    """Rows self, the sources by size, sum; columns are the keys of `lifts` (coupling.json). Kinds
    whose self term is 0, as where all actions were forced, are left out."""
    scales = {kind: abs(found["own"]) for kind, found in lifts.items() if found["own"]}
    if not scales:
        return []
    names: dict[str, dict[str, float]] = {}
    for kind, scale in scales.items():
        for source in lifts[kind]["sources"]:
            name = f"{source['relation']}, {source['credit']}, {source['verdict'] or 'no label'}"
            names.setdefault(name, {})[kind] = source["mean"] / scale
    shown = [name for name, row in names.items() if max(map(abs, row.values())) >= LEAST]
    shown.sort(key=lambda name: -max(names[name].values(), key=abs))
    return [
        LiftRow("self", {kind: lifts[kind]["own"] / scale for kind, scale in scales.items()}),
        *(LiftRow(name, {kind: names[name].get(kind) for kind in scales}) for name in shown),
        LiftRow("sum", {kind: lifts[kind]["delta"] / scale for kind, scale in scales.items()}),
    ]
