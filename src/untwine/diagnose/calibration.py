"""Does a credit method judge steps as they are? Its estimates against the true advantages.

Plain arrays in, plain numbers out; nothing here knows runs, models or files. N is the number of
judged steps. Weights are the numbers of steps each one stands for (1 where all are judged).

Intervals are percentile bootstraps over groups, as the episodes of a group share their baseline:
whole groups are drawn with replacement, 2000 times.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Interval = tuple[float, float]

SIGNS: Mapping[str, int] = {"good": 1, "flawed": -1, "neutral": 0}
"""Verdicts as numbers."""


@dataclass(frozen=True, slots=True)
class Judged:
    """N judged steps and what one method says of them.

    estimates_N   the method's advantage of each step
    verdicts_N    +1 good, -1 flawed, 0 neutral
    advantages_N  A* of each step; NaN where only a verdict is known
    weights_N     how many steps each one stands for
    groups_N, episodes_N   numbers of its group and of its episode
    """

    estimates_N: Floats
    verdicts_N: Ints
    advantages_N: Floats
    weights_N: Floats
    groups_N: Ints
    episodes_N: Ints

    @classmethod
    def of(
        cls,
        estimates: Sequence[float],
        verdicts: Sequence[int],
        *,
        advantages: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
        groups: Sequence[Hashable] | None = None,
        episodes: Sequence[Hashable] | None = None,
    ) -> Judged:
        """From plain lists; groups and episodes by any name. By default weights are 1, and every
        step is a group and an episode of its own. ValueError when lengths differ."""
        n = len(estimates)
        judged = cls(
            np.asarray(estimates, dtype=np.float64),
            np.asarray(verdicts, dtype=np.int64),
            np.asarray([np.nan] * n if advantages is None else advantages, dtype=np.float64),
            np.asarray([1.0] * n if weights is None else weights, dtype=np.float64),
            _numbers(range(n) if groups is None else groups),
            _numbers(range(n) if episodes is None else episodes),
        )
        lengths = {len(getattr(judged, name)) for name in cls.__slots__}
        if len(lengths) > 1:
            raise ValueError(f"the lists of a calibration have different lengths: {lengths}")
        return judged

    def where(self, chosen_N: NDArray[np.bool_]) -> Judged:
        """The steps where `chosen_N` is true."""
        return Judged(*(getattr(self, name)[chosen_N] for name in self.__slots__))

    def of_advantages(self) -> Judged:
        """A* in the place of the estimate, where it is known."""
        known = self.where(~np.isnan(self.advantages_N))
        return replace(known, estimates_N=known.advantages_N)

    def by_episode(self) -> Judged:
        """One line per episode and verdict, of weight 1: the weighted mean of its steps. Long
        episodes then count no more than short ones."""
        cells = np.stack([self.episodes_N, self.verdicts_N], 1)
        _, first, cell_N = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        cell_N = cell_N.reshape(-1)
        weights = np.bincount(cell_N, self.weights_N)
        return Judged(
            np.bincount(cell_N, self.weights_N * self.estimates_N) / weights,
            self.verdicts_N[first],
            np.bincount(cell_N, self.weights_N * self.advantages_N) / weights,
            np.ones(len(first)),
            self.groups_N[first],
            self.episodes_N[first],
        )


def calibrate(judged: Judged, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """All measures of one method on one set of steps; None for what cannot be computed.

    flawed_mean, good_mean, difference    mean estimate over flawed and good steps, and good minus
                                          flawed; each with an interval
    by_episode                            the same with every episode counting once
    mean_estimate, mean_advantage         over all steps: of the estimate, and of A* itself; pooled
                                          over many steps A* is clear where single ones are not
    miscalibration                        share of flawed steps with a positive estimate
    sign_agreement                        share of good and flawed steps whose estimate has the
                                          right sign; an estimate of 0 has none
    rank_correlation                      Spearman's, with A*
    variance                              of the estimates over all steps
    """
    bootstrap = _Bootstrap(judged.groups_N, resamples, seed)
    positive = replace(judged, estimates_N=(judged.estimates_N > 0).astype(np.float64))
    return {
        "steps": len(judged.estimates_N),
        "flawed": int((judged.verdicts_N < 0).sum()),
        "good": int((judged.verdicts_N > 0).sum()),
        **_means(judged, bootstrap),
        "by_episode": _means(judged.by_episode(), bootstrap),
        "mean_estimate": bootstrap.mean(judged),
        "mean_advantage": bootstrap.mean(judged.of_advantages()),
        "miscalibration": bootstrap.mean(positive, -1),
        "sign_agreement": sign_agreement(judged),
        "rank_correlation": rank_correlation(
            judged.estimates_N, judged.advantages_N, judged.weights_N
        ),
        "variance": variance(judged.estimates_N, judged.weights_N),
    }


def means_by_verdict(judged: Judged, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """`flawed_mean`, `good_mean` and `difference` of `calibrate`, each with an interval."""
    return _means(judged, _Bootstrap(judged.groups_N, resamples, seed))


def sign_agreement(judged: Judged) -> float | None:
    """Weighted share of good and flawed steps whose estimate has the sign of the verdict."""
    known = judged.where(judged.verdicts_N != 0)
    right_N = np.sign(known.estimates_N) == known.verdicts_N
    return _mean(right_N.astype(np.float64), known.weights_N)


def variance(values_N: Floats, weights_N: Floats) -> float | None:
    """Weighted variance around the weighted mean (divided by the sum of weights)."""
    mean = _mean(values_N, weights_N)
    return None if mean is None else _mean((values_N - mean) ** 2, weights_N)


def rank_correlation(x_N: Floats, y_N: Floats, weights_N: Floats) -> float | None:
    """Spearman's rank correlation: Pearson's on mean ranks, ties sharing theirs. A step of weight w
    counts as w equal steps. None when a side is constant, or a value is NaN."""
    if not len(x_N) or np.isnan(x_N).any() or np.isnan(y_N).any():
        return None
    x_N, y_N = mean_ranks(x_N, weights_N), mean_ranks(y_N, weights_N)
    x_N, y_N = x_N - np.average(x_N, weights=weights_N), y_N - np.average(y_N, weights=weights_N)
    scale = np.sqrt((weights_N * x_N**2).sum() * (weights_N * y_N**2).sum())
    return float((weights_N * x_N * y_N).sum() / scale) if scale > 0 else None


def mean_ranks(values_N: Floats, weights_N: Floats) -> Floats:
    """Rank of each value, from 1, were each repeated as often as its weight says; equal values
    share the mean of their ranks."""
    _, value_N = np.unique(values_N, return_inverse=True)
    tied = np.bincount(value_N, weights_N)
    ranks: Floats = (np.cumsum(tied) - tied + (tied + 1) / 2)[value_N]
    return ranks


def lemma_advantage(advantages_N: Floats, policy_q_N: Floats, q_N: Floats) -> Floats:
    """The lemma's -r (1 - q) for actions taken with frequency `q_N`.

    The risk r, by how much the return falls when the action takes the place of the policy's other
    ones, does not depend on how often that is: r = -A* / (1 - pi(a|s)). 0 where pi(a|s) is 1.
    """
    other_N = 1.0 - policy_q_N
    risk_N = np.divide(-advantages_N, other_N, out=np.zeros_like(other_N), where=other_N > 1e-9)
    predicted: Floats = -risk_N * (1.0 - q_N)
    return predicted


def _numbers(names: Sequence[Hashable]) -> Ints:
    """Names as numbers, in the order in which they first occur."""
    known = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.asarray([known[name] for name in names], dtype=np.int64)


def _means(judged: Judged, bootstrap: _Bootstrap) -> dict[str, Any]:
    return {
        "flawed_mean": bootstrap.mean(judged, -1),
        "good_mean": bootstrap.mean(judged, +1),
        "difference": bootstrap.difference(judged),
    }


def _mean(values_N: Floats, weights_N: Floats) -> float | None:
    total = weights_N.sum()
    return float((weights_N * values_N).sum() / total) if total > 0 else None


class _Bootstrap:
    """Resampled groups, the same ones for every statistic."""

    def __init__(self, groups_N: Ints, resamples: int, seed: int) -> None:
        self._groups = np.unique(groups_N)
        n = len(self._groups)
        rng = np.random.default_rng(seed)
        # how often each group is drawn, shape (resamples, groups)
        self._times_RG = rng.multinomial(n, [1 / n] * n, size=resamples) if n > 1 else None

    def mean(self, judged: Judged, verdict: int | None = None) -> dict[str, Any] | None:
        """Weighted mean estimate over all steps, or those of one verdict, with its interval."""
        own = judged if verdict is None else judged.where(judged.verdicts_N == verdict)
        value = _mean(own.estimates_N, own.weights_N)
        if value is None:
            return None
        return {"value": value, "interval": _interval(self._means(own))}

    def difference(self, judged: Judged) -> dict[str, Any] | None:
        """Mean over good steps minus mean over flawed steps, with its interval."""
        good, flawed = (judged.where(judged.verdicts_N == verdict) for verdict in (1, -1))
        a = _mean(good.estimates_N, good.weights_N)
        b = _mean(flawed.estimates_N, flawed.weights_N)
        if a is None or b is None:
            return None
        found_R, other_R = self._means(good), self._means(flawed)
        gaps_R = None if found_R is None or other_R is None else found_R - other_R
        return {"value": a - b, "interval": _interval(gaps_R)}

    def _means(self, own: Judged) -> Floats | None:
        """The mean in every resample; NaN where it holds no such step."""
        if self._times_RG is None:
            return None
        at_N = np.searchsorted(self._groups, own.groups_N)
        size = len(self._groups)
        sums_G = np.bincount(at_N, own.weights_N * own.estimates_N, size)
        weights_G = np.bincount(at_N, own.weights_N, size)
        sums_R, weights_R = self._times_RG @ sums_G, self._times_RG @ weights_G
        means_R: Floats = np.full(len(sums_R), np.nan)
        np.divide(sums_R, weights_R, out=means_R, where=weights_R > 0)
        return means_R


def _interval(values_R: Floats | None, confidence: float = 0.95) -> Interval | None:
    """Percentiles of the resamples; None for fewer than two groups."""
    known = np.empty(0) if values_R is None else values_R[~np.isnan(values_R)]
    if not len(known):
        return None
    tail = 50 * (1 - confidence)
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)
