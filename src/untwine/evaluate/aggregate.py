"""Numbers over the runs of an arm: what rliable defines, and paired differences.

The definitions are those of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice" (arXiv 2108.13264), written from the paper. Scores of an arm are a matrix
scores_NM of N runs (seeds) by M tasks.

    interquartile mean           mean of the middle half of all N x M scores
    probability of improvement   P(X > Y) = 1/M sum_m 1/(N K) sum_ij S(x_im, y_jm), with S = 1 for
                                 x > y, 1/2 for x = y, 0 otherwise (their equation of section 4.3)
    performance profile          share of the N x M scores above tau, for each tau

Intervals are percentile bootstraps with two kinds of strata. `tasks` is the paper's: the N scores
of each task are drawn anew, independently of the other tasks. That is right where every score is a
training run of its own. Here one run gives the scores of all M tasks, so they share its luck, and
intervals that treat them as independent are too narrow. `runs` draws whole runs, and is what
untwine shows. With one task they are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from untwine.evaluate.statistics import Interval, student_interval

Array = NDArray[np.float64]
Strata = Literal["runs", "tasks"]

_MOST_SIGNS = 16
"""Differences up to which every assignment of signs is tried."""


def probability_of_improvement(x_NM: Array, y_KM: Array) -> float:
    """P(X > Y) for a random run of each arm and a random task; a tie counts half."""
    above = x_NM[:, None, :] > y_KM[None, :, :]
    equal = x_NM[:, None, :] == y_KM[None, :, :]
    return float(np.mean(above + 0.5 * equal))


def performance_profile(scores_NM: Array, thresholds_T: Array) -> Array:
    """Share of all scores above each threshold, shape (T,)."""
    shares_T: Array = (scores_NM.reshape(-1, 1) > thresholds_T).mean(axis=0)
    return shares_T


def bootstrap(
    statistic: Callable[..., float | Array],
    *scores: Array,
    strata: Strata = "runs",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Ends of the percentile interval of `statistic(*scores)`, each of the statistic's shape.

    scores   one matrix (runs, tasks) for each arm; arms are resampled independently of each other
    strata   what stays together, see the top of this file
    """
    rng = np.random.default_rng(seed)
    found = np.stack(
        [
            np.asarray(statistic(*[_resampled(own, strata, rng) for own in scores]))
            for _ in range(resamples)
        ]
    )
    tail = 50 * (1 - confidence)
    ends: Array = np.percentile(found, [tail, 100 - tail], axis=0)
    return ends[0], ends[1]


def _resampled(scores_NM: Array, strata: Strata, rng: np.random.Generator) -> Array:
    runs, tasks = scores_NM.shape
    size = (runs, 1) if strata == "runs" else (runs, tasks)
    drawn_NM: Array = np.take_along_axis(scores_NM, rng.integers(runs, size=size), axis=0)
    return drawn_NM


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of x - y over pairs.

    interval    Student's 95 % interval; None for a single pair
    deviation   standard deviation of the differences; None for a single pair
    p_value     two-sided sign-flip test of a mean of 0: the share of assignments of signs with a
                mean at least as far from 0 (all of them up to 16 pairs, else 20 000 at random)
    """

    pairs: int
    mean: float
    interval: Interval | None
    deviation: float | None
    p_value: float


def paired_difference(x_P: Array, y_P: Array) -> PairedDifference:
    """Difference of two arms over pairs that share cold start and seed."""
    differences_P = np.asarray(x_P, dtype=np.float64) - np.asarray(y_P, dtype=np.float64)
    n = len(differences_P)
    return PairedDifference(
        pairs=n,
        mean=float(differences_P.mean()),
        interval=student_interval(differences_P) if n > 1 else None,
        deviation=float(differences_P.std(ddof=1)) if n > 1 else None,
        p_value=_sign_flip(differences_P),
    )


def _sign_flip(differences_P: Array) -> float:
    n = len(differences_P)
    exact = n <= _MOST_SIGNS
    if exact:
        signs_RP = np.array(list(itertools.product((-1.0, 1.0), repeat=n)))
    else:
        signs_RP = np.random.default_rng(0).choice((-1.0, 1.0), size=(20_000, n))
    means_R = np.abs(signs_RP @ differences_P)
    extreme = int(np.sum(means_R >= abs(differences_P.sum()) - 1e-12))
    return extreme / len(means_R) if exact else (extreme + 1) / (len(means_R) + 1)
