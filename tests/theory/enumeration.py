"""Brute force over everything that can happen in a group, in plain Python."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence


def advantages(returns: Sequence[float], normaliser: str) -> list[float]:
    """GRPO's formula, one group."""
    mean = statistics.fmean(returns)
    scale = statistics.stdev(returns) + 1e-6 if normaliser == "std" else 1.0
    return [(r - mean) / scale for r in returns]


def groups(
    chances: Sequence[float], returns: Sequence[float], size: int
) -> Iterator[tuple[float, tuple[int, ...], list[float]]]:
    """(probability, outcomes, returns) of all groups of members with these outcomes."""
    for picks in itertools.product(range(len(chances)), repeat=size):
        yield math.prod(chances[i] for i in picks), picks, [returns[i] for i in picks]


def expected_direction(
    pi: Sequence[float], success: Sequence[float], size: int, normaliser: str
) -> list[float]:
    """E[ 1/G sum_g A_g (onehot(a_g) - pi) ] for actions `pi` that succeed with `success`."""
    outcomes = [(a, r) for a in range(len(pi)) for r in (0.0, 1.0)]
    chances = [pi[a] * (success[a] if r else 1 - success[a]) for a, r in outcomes]
    total = [0.0] * len(pi)
    for chance, picks, returns in groups(chances, [r for _, r in outcomes], size):
        for pick, advantage in zip(picks, advantages(returns, normaliser), strict=True):
            for b, p in enumerate(pi):
                total[b] += chance * advantage * ((outcomes[pick][0] == b) - p) / size
    return total
