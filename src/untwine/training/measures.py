"""Numbers that one optimizer step gathers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

_COUNTED = ("_tokens", "out_of_memory")


@dataclass(slots=True)
class Measures:
    """Sums and maxima over micro-batches; weights already make the sums means over the batch."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        return {**self.sums, **self.maxima}

    def add(self, **new: float | torch.Tensor) -> None:
        for name, value in new.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def top(self, **new: float | torch.Tensor) -> None:
        for name, value in new.items():
            self.maxima[name] = max(self.maxima.get(name, float("-inf")), float(value))

    def join(self, other: Measures) -> None:
        self.add(**other.sums)
        self.top(**other.maxima)


def averaged(taken: Sequence[Measures]) -> dict[str, float]:
    """Means over optimizer steps; tokens, questions and seconds are summed and ratio_max is the
    largest."""
    names = {name for measures in taken for name in measures.values}
    result: dict[str, float] = {}
    for name in sorted(names):
        values = [m.values[name] for m in taken if name in m.values]
        if name == "ratio_max":
            result[name] = max(values)
        elif name.startswith(("seconds_", "verdicts")) or name.endswith(_COUNTED):
            result[name] = sum(values)
        else:
            result[name] = sum(values) / len(values)
    return result
