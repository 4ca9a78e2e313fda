"""Does outcome reward misjudge a flawed action? One state, closed forms and sampled GRPO.

With probability q the policy takes a flawed action, which lowers the success probability from p to
p - r. Then V = p - q r, the flawed action's true advantage is (p - r) - V = -r (1 - q), and its
contribution to the policy gradient is q r (q - 1). A group of G gives, in expectation, D_G(V)
times this (`untwine.theory.advantage.slope`), for every normaliser that treats members alike. So
the sign is right for every G; the size is not.

All of it holds for returns 0 or 1. For graded returns the group standard deviation can turn the
sign around: `flawed_advantage_graded` sums exactly over all groups and finds such cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from untwine.theory.advantage import (
    NORMALISERS,
    Normaliser,
    check_group_size,
    group_advantages,
    slope,
)

Z95 = 1.959963984540054
_DRAWS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Bandit:
    """One state. `success` p without the flawed action, taken with probability `rate` q at the
    cost `risk` r, 0 <= r <= p <= 1."""

    success: float
    rate: float
    risk: float

    @property
    def value(self) -> float:
        """V = p - q r."""
        return self.success - self.rate * self.risk

    @property
    def advantage(self) -> float:
        """True advantage of the flawed action, -r (1 - q)."""
        return -self.risk * (1 - self.rate)

    @property
    def contribution(self) -> float:
        """Its contribution to the policy gradient, q r (q - 1)."""
        return self.rate * self.advantage

    def group_advantage(self, group_size: int, normaliser: Normaliser) -> float:
        """Exact expectation of GRPO's advantage over flawed samples, D_G(V) times the true one."""
        return float(slope(self.value, group_size, normaliser)) * self.advantage


@dataclass(frozen=True)
class Estimate:
    """A sampled mean with its standard error and 95 % interval."""

    mean: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - Z95 * self.error, self.mean + Z95 * self.error


def sample_group_advantage(
    bandit: Bandit,
    group_size: int,
    normaliser: Normaliser,
    groups: int,
    rng: np.random.Generator,
) -> Estimate:
    """Mean GRPO advantage over the flawed samples of many sampled groups.

    Members of a group share a baseline, so the error is that of a ratio of two means over groups.
    NaN when no sample was flawed, or fewer than two groups hold one.
    """
    sums, counts = [], []
    left = groups
    while left:
        rows = min(left, max(1, _DRAWS_AT_ONCE // group_size))
        flawed_MG = rng.random((rows, group_size)) < bandit.rate
        chance_MG = bandit.success - bandit.risk * flawed_MG
        returns_MG = (rng.random((rows, group_size)) < chance_MG).astype(np.float64)
        advantages_MG = group_advantages(returns_MG, normaliser)
        sums.append((advantages_MG * flawed_MG).sum(axis=1))
        counts.append(flawed_MG.sum(axis=1))
        left -= rows
    sum_M, count_M = np.concatenate(sums), np.concatenate(counts)
    if (count_M > 0).sum() < 2:
        return Estimate(math.nan, math.nan)
    mean = float(sum_M.sum() / count_M.sum())
    residual_M = sum_M - mean * count_M
    error = math.sqrt(float(residual_M.var(ddof=1)) / groups) / float(count_M.mean())
    return Estimate(mean, error)


def grid(points: int = 9) -> Iterator[Bandit]:
    """All p, r / p in 1/n .. n/n and q in 1/(n + 1) .. n/(n + 1), for n `points`."""
    for p in range(1, points + 1):
        for share in range(1, points + 1):
            for q in range(1, points + 1):
                success = p / points
                yield Bandit(success, q / (points + 1), success * share / points)


def flawed_advantage_graded(
    flawed_L: ArrayLike,
    other_L: ArrayLike,
    levels_L: ArrayLike,
    rate: float,
    group_size: int,
    normaliser: Normaliser,
) -> float:
    """Exact expected GRPO advantage of the flawed action when returns take L levels.

    `flawed_L` and `other_L` are the distributions of the return over `levels_L` with and without
    the flawed action. Sums over all multisets of the returns of the other G - 1 members.
    """
    levels = np.asarray(levels_L, dtype=np.float64)
    flawed = np.asarray(flawed_L, dtype=np.float64)
    mixed = rate * flawed + (1 - rate) * np.asarray(other_L, dtype=np.float64)
    G, L = check_group_size(group_size), len(levels)
    picks = np.array(list(combinations_with_replacement(range(L), G - 1)))
    counts_CL = np.stack([(picks == level).sum(axis=1) for level in range(L)], axis=1)
    ways_C = np.array(
        [math.factorial(G - 1) / math.prod(map(math.factorial, row)) for row in counts_CL.tolist()]
    )
    weight_C = ways_C * np.prod(mixed**counts_CL, axis=1)
    total = 0.0
    for level in range(L):
        own_C1 = np.full((len(picks), 1), levels[level])
        first_C = group_advantages(np.hstack([own_C1, levels[picks]]), normaliser)[:, 0]
        total += flawed[level] * float(weight_C @ first_C)
    return total


GRADED_EXAMPLE = {"levels": [0.0, 0.5, 1.0], "flawed": [0.3, 0.0, 0.7], "other": [0.0, 0.5, 0.5]}
"""Mean .70 against .75, so the first action is flawed by r = .05. In a pair it beats the other
with probability .7 * .5 = .35 and loses with .3: dividing by the standard deviation of two leaves
only who won, so its expected advantage is positive."""


def study(group_sizes: Sequence[int], groups: int, graded_draws: int, seed: int) -> dict[str, Any]:
    """The statement on a grid: exact signs, sampled GRPO against them, then graded returns."""
    rng = np.random.default_rng(seed)
    return {
        "bandit": [
            _bandit_row(G, normaliser, groups, rng)
            for normaliser in NORMALISERS
            for G in map(check_group_size, group_sizes)
        ],
        "graded": [
            _graded_row(G, normaliser, graded_draws, seed)
            for normaliser in NORMALISERS
            for G in (2, 4, 8)
        ],
        "graded_example": {
            **GRADED_EXAMPLE,
            "rate": 0.5,
            "advantage": {
                f"{normaliser}, G={G}": flawed_advantage_graded(
                    GRADED_EXAMPLE["flawed"],
                    GRADED_EXAMPLE["other"],
                    GRADED_EXAMPLE["levels"],
                    0.5,
                    G,
                    normaliser,
                )
                for normaliser in NORMALISERS
                for G in (2, 4, 8)
            },
        },
    }


def _bandit_row(
    group_size: int, normaliser: Normaliser, groups: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Signs over the fine grid, exactly; then a coarse grid sampled."""
    fine = [b for b in grid() if b.risk > 0]
    exact_N = np.array([b.group_advantage(group_size, normaliser) for b in fine])
    wrong = [b for b, value in zip(fine, exact_N, strict=True) if not value < 0]
    value_N = np.linspace(0.05, 0.95, 19)
    shrink_N = slope(value_N, group_size, normaliser)
    if normaliser == "std":  # what a very large group would give
        shrink_N = shrink_N * np.sqrt(value_N * (1 - value_N))
    sampled = held = above = 0
    for bandit in grid(4):
        estimate = sample_group_advantage(bandit, group_size, normaliser, groups, rng)
        if math.isnan(estimate.mean):
            continue
        low, high = estimate.interval
        sampled += 1
        held += low <= bandit.group_advantage(group_size, normaliser) <= high
        above += low > 0
    return {
        "normaliser": normaliser,
        "group_size": group_size,
        "points": len(fine),
        "not_negative": len(wrong),
        "counter_examples": [vars(b) for b in wrong[:5]],
        "slope_over_large_group_low": float(shrink_N.min()),
        "slope_over_large_group_high": float(shrink_N.max()),
        "sampled": sampled,
        "intervals_holding_exact": held,
        "intervals_above_zero": above,
    }


def _graded_row(group_size: int, normaliser: Normaliser, draws: int, seed: int) -> dict[str, Any]:
    """Random return distributions on three levels; how often a flawed action gains on average."""
    rng = np.random.default_rng(seed)  # the same draws for every row
    levels = (0.0, 0.5, 1.0)
    wrong, worst = 0, 0.0
    example: dict[str, Any] | None = None
    for _ in range(draws):
        first_L, second_L = rng.dirichlet(np.ones(3), size=2)
        rate = float(rng.random())
        means = first_L @ levels, second_L @ levels
        flawed_L, other_L = (first_L, second_L) if means[0] < means[1] else (second_L, first_L)
        value = flawed_advantage_graded(flawed_L, other_L, levels, rate, group_size, normaliser)
        wrong += value > 0
        if value > max(worst, 1e-12):
            worst = value
            example = {
                "flawed": [round(float(x), 4) for x in flawed_L],
                "other": [round(float(x), 4) for x in other_L],
                "rate": round(rate, 4),
                "risk": abs(float(means[0] - means[1])),
                "advantage": value,
            }
    return {
        "normaliser": normaliser,
        "group_size": group_size,
        "draws": draws,
        "positive": int(wrong),
        "counter_example": example,
    }
