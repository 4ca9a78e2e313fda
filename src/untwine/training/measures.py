"""Numbers that one optimizer step gathers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


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
