"""Intervals and robust means for evaluation results.

Success rates come from a few dozen episodes, so a number without an interval misleads. Here are a
percentile bootstrap of the mean, the interquartile mean, the Wilson interval for a share of
successes, which stays honest at 0 of n and n of n where a bootstrap collapses to a point, and
Student's interval for the mean of a few differences. `aggregate.py` has what is taken over runs.

Every bootstrap is seeded, so the same episodes always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.floating]
Interval = tuple[float, float]

_CHUNK = 2_000_000
"""Resampled values held in memory at once."""


def mean(values: Values) -> float:
    """Arithmetic mean of at least one finite value."""
    return float(np.mean(_finite(values)))


def iqm(values: Values) -> float:
    """Interquartile mean: the mean of the middle half.

    `floor(n / 4)` values are cut from each end and the rest is averaged. This is what
    `scipy.stats.trim_mean(values, 0.25)` gives, which rliable uses: when n is not a multiple of
    four, a little less than half is cut and no value counts by a fraction.
    """
    values_N = np.sort(_finite(values))
    cut = len(values_N) // 4
    return float(np.mean(values_N[cut : len(values_N) - cut]))


def bootstrap_interval(
    values: Values, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of `values`."""
    values_N = _finite(values)
    _check(confidence, resamples)
    rng = np.random.default_rng(seed)
    means_R = np.empty(resamples)
    rows = max(1, _CHUNK // len(values_N))
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        picks_RN = rng.integers(len(values_N), size=(stop - start, len(values_N)))
        means_R[start:stop] = values_N[picks_RN].mean(axis=1)
    return _percentiles(means_R, confidence)


def wilson_interval(successes: float, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a success rate; `(0, 1)` when there were no trials."""
    _check(confidence, 1)
    if n < 0 or not 0 <= successes <= max(n, 0):
        raise ValueError(f"{successes} successes of {n} trials is not possible")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    scale = 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def student_interval(values: Values, *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of at least two values."""
    values_N = _finite(values)
    _check(confidence, 1)
    n = len(values_N)
    if n < 2:
        raise ValueError("Student's interval needs at least two values")
    centre = float(values_N.mean())
    error = float(values_N.std(ddof=1)) / math.sqrt(n)
    half = student_quantile(confidence, n - 1) * error
    return centre - half, centre + half


def student_quantile(confidence: float, freedom: int) -> float:
    """The t > 0 with P(|T| < t) = confidence, T of Student's distribution with `freedom` (a whole
    number) degrees of freedom. Bisection on the angle atan(t / sqrt(freedom))."""
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if _student_mass(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _student_mass(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)): the finite series of Abramowitz and Stegun, 26.7.3 for odd
    and 26.7.4 for even degrees of freedom."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(freedom // 2):
        total += term
        term *= cosine * cosine * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _finite(values: Values) -> NDArray[np.float64]:
    values_N = np.asarray(values, dtype=np.float64).reshape(-1)
    if not len(values_N):
        raise ValueError("a mean needs at least one value")
    if not np.isfinite(values_N).all():
        raise ValueError("values must be finite numbers")
    return values_N


def _check(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be positive, not {resamples}")


def _percentiles(statistics_R: NDArray[np.float64], confidence: float) -> Interval:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(statistics_R, [tail, 100 - tail])
    return float(low), float(high)
