"""Bounds on a mean that hold however often one looks, and when one stops because of what one saw.

Hedged capital (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
JRSS-B 2024, arXiv 2010.09686, theorem 3). For values x_1, x_2, ... in [0, 1], each of mean mu given
the past, and every candidate m, two gamblers bet against "the mean is m":

    K+_t(m) = prod_i (1 + min(b_i, c/m)       (x_i - m))      grows when the mean is above m
    K-_t(m) = prod_i (1 - min(b_i, c/(1 - m)) (x_i - m))      grows when it is below

At m = mu both are non-negative martingales that begin at 1, so with probability 1 - error neither
ever reaches 2/error (Ville). K+ falls and K- rises with m, hence the candidates on which neither
has reached it form an interval. It holds for every t at once, for any bounded values, whatever the
sample size: no normal approximation, and stopping early costs no coverage.

Any b_i that depends on the past only is allowed. Here it is sqrt(2 ln(2/error) / (n v_i)) with n
the number of values planned and v_i the variance so far (one observation of variance 1/4 added),
which makes the interval short at n; it is valid, though a little wide, before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_TRUNCATION = 0.5
_HALVINGS = 50

Values = NDArray[np.float64]


def mean_bounds(
    values: Sequence[float], low: float, high: float, *, error: float, planned: int
) -> tuple[float, float]:
    """Lower and upper bound of the mean of values in [low, high]; (low, high) without values.

    Over a whole sequence of looks, each bound is ever wrong with probability at most error / 2.

    planned   about how many values there will be at the end; must not depend on the values
    """
    if high <= low:
        return low, high
    x_N = _scaled(values, low, high)
    bets_N = _bets(x_N, error, planned)
    wanted = math.log(2 / error)
    lower = _lower(x_N, bets_N, wanted)
    upper = 1 - _lower(1 - x_N, bets_N, wanted)
    return low + (high - low) * lower, low + (high - low) * upper


def evidence(
    values: Sequence[float], low: float, high: float, mean: float, *, error: float, planned: int
) -> tuple[float, float]:
    """(p that the mean is at most `mean`, p that it is at least `mean`), valid at any time.

    By Ville a gambler's capital reaches 1/p with probability at most p, so p is 1 / capital.
    """
    if high <= low:
        return 1.0, 1.0
    x_N = _scaled(values, low, high)
    bets_N = _bets(x_N, error, planned)
    m = min(max((mean - low) / (high - low), 0.0), 1.0)
    above = _log_capital(x_N, bets_N, m)
    below = _log_capital(1 - x_N, bets_N, 1 - m)
    return math.exp(min(0.0, -above)), math.exp(min(0.0, -below))


def _scaled(values: Sequence[float], low: float, high: float) -> Values:
    x_N = (np.asarray(values, dtype=np.float64) - low) / (high - low)
    if len(x_N) and not (x_N.min() >= -1e-9 and x_N.max() <= 1 + 1e-9):
        raise ValueError(f"values must lie in [{low}, {high}]")
    return np.clip(x_N, 0.0, 1.0)


def _bets(x_N: Values, error: float, planned: int) -> Values:
    """The bet on each value, from those before it."""
    count_N = np.arange(1, len(x_N) + 1)
    means_N = (0.5 + np.cumsum(x_N)) / (count_N + 1)
    variances_N = (0.25 + np.cumsum((x_N - means_N) ** 2)) / (count_N + 1)
    before_N = np.concatenate([[0.25], variances_N[:-1]])[: len(x_N)]
    bets_N: Values = np.sqrt(2 * math.log(2 / error) / (max(planned, 1) * before_N))
    return bets_N


def _log_capital(x_N: Values, bets_N: Values, m: float) -> float:
    """Log of K+ at m."""
    most = _TRUNCATION / m if m > 0 else math.inf
    return float(np.log1p(np.minimum(bets_N, most) * (x_N - m)).sum())


def _lower(x_N: Values, bets_N: Values, wanted: float) -> float:
    """The largest m whose log-capital reaches `wanted`, rounded down; 0 when there is none."""
    below, above = 0.0, 1.0
    if _log_capital(x_N, bets_N, 0.0) < wanted:
        return 0.0
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        if _log_capital(x_N, bets_N, middle) >= wanted:
            below = middle
        else:
            above = middle
    return below
