"""Does correcting one flawed action feed another? A softmax over three actions.

Action 0 is good; action 1 lowers the success probability by r2, action 2 by r3, r2 > r3 > 0, so
0 is best, 1 worst and 2 "mild". Logits are linear in features, z = Phi theta, so gradient ascent on
the expected return J = p - w, with w = sum pi_a r_a, moves logits by dz/dt = K grad_z J, where
K = Phi Phi^T is the Gram of the features and (grad_z J)_a = pi_a (w - r_a).

What holds for certain: dJ/dt = |grad_theta J|^2 >= 0, so the *risk-weighted* flawed mass w never
rises, whatever the features. The *plain* flawed mass m = 1 - pi_0 is another matter. With tabular
features (K = 1), u = pi_1 / m the share of the worst and c = r3 / r2,

    m rises  <=>  pi_0 / m < u (1 - u) (1 - 2 u) (1 - c) / (u (1 + u) + c (1 - u) (2 - u)),

so it never does where pi_0 >= pi_2 (a set that the flow does not leave), and can elsewhere.
Under natural gradient (dz/dt = advantage, the replicator equation) d pi_0/dt = pi_0 w > 0 always.

Letters of shapes: N flows or seeds, A = 3 actions, T times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from untwine.errors import ConfigError
from untwine.theory.advantage import (
    NORMALISERS,
    Array,
    Normaliser,
    group_advantages,
    slope,
)
from untwine.theory.flow import RATES, Field, distance_to_flow, integrate, thinned

GOOD, WORST, MILD = 0, 1, 2
TABULAR = np.eye(3)
RISES = 1e-9
"""A probability counts as rising when its velocity, in units of r2, is above this."""


def softmax(logits_NA: ArrayLike) -> Array:
    """Probabilities over the last axis; (..., A)."""
    logits = np.asarray(logits_NA, dtype=np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def logit_gradient(pi_NA: Array, risks_NA: Array) -> Array:
    """grad_z J = pi_a (w - r_a); (N, A), rows sum to 0."""
    w_N1 = (pi_NA * risks_NA).sum(axis=-1, keepdims=True)
    return np.asarray(pi_NA * (w_N1 - risks_NA))


def velocity(pi_NA: Array, risks_NA: Array, gram_NAA: Array = TABULAR) -> Array:
    """d pi / dt under exact gradient flow; (N, A), rows sum to 0."""
    z_NA = (gram_NAA @ logit_gradient(pi_NA, risks_NA)[..., None])[..., 0]
    return np.asarray(pi_NA * (z_NA - (pi_NA * z_NA).sum(axis=-1, keepdims=True)))


def replicator_velocity(pi_NA: Array, risks_NA: Array) -> Array:
    """d pi / dt under natural gradient, pi_a (w - r_a): for contrast; (N, A)."""
    return logit_gradient(pi_NA, risks_NA)


def odds_below_which_total_rises(share_N: ArrayLike, ratio: ArrayLike) -> Array:
    """Bound on pi_0 / m below which the flawed mass rises (tabular); 0 or less where it never does.

    `share_N` is u = pi_1 / (pi_1 + pi_2), `ratio` c = r3 / r2.
    """
    u, c = np.asarray(share_N, dtype=np.float64), np.asarray(ratio, dtype=np.float64)
    rise = u * (1 - u) * (1 - 2 * u) * (1 - c)
    return np.asarray(rise / (u * (1 + u) + c * (1 - u) * (2 - u)))


def flow(
    pi_NA: Array,
    risks_NA: Array,
    gram_NAA: Array,
    times_T: ArrayLike,
    *,
    clock: tuple[float, int, Normaliser] | None = None,
    rtol: float = 1e-8,
) -> Array:
    """Probabilities along the exact flow from `pi_NA`, at `times_T`; (T, N, A).

    `clock` = (p, G, normaliser) runs it at the speed D_G(p - w) of expected GRPO instead of 1:
    the same paths, at another speed.
    """

    def field(logits_NA: Array) -> Array:
        pi = softmax(logits_NA)
        step = (gram_NAA @ logit_gradient(pi, risks_NA)[..., None])[..., 0]
        if clock is None:
            return step
        success, group_size, normaliser = clock
        value_N = success - (pi * risks_NA).sum(axis=-1)
        return slope(value_N, group_size, normaliser)[..., None] * step

    chosen: Field = field
    return softmax(integrate(chosen, np.log(pi_NA), times_T, rtol=rtol))


def sampled(
    start_A: ArrayLike,
    risks_A: ArrayLike,
    gram_AA: Array,
    success: float,
    group_size: int,
    normaliser: Normaliser,
    rate: float,
    steps: int,
    seeds: int,
    rng: np.random.Generator,
) -> Array:
    """Probabilities along GRPO: one group per step, one plain gradient step; (steps + 1, seeds, A).

    Each step samples G actions and their success, and moves logits by rate * K times the mean of
    A_g (one-hot(a_g) - pi). No clipping is needed, since every group is used once.
    """
    start, risks = np.asarray(start_A, dtype=np.float64), np.asarray(risks_A, dtype=np.float64)
    logits_NA = np.tile(np.log(start), (seeds, 1))
    path = [softmax(logits_NA)]
    for _ in range(steps):
        pi = path[-1]
        draws_NG = rng.random((seeds, group_size))
        actions_NG = (draws_NG[..., None] > pi.cumsum(axis=-1)[:, None, :2]).sum(axis=-1)
        returns_NG = rng.random((seeds, group_size)) < success - risks[actions_NG]
        advantages_NG = group_advantages(returns_NG, normaliser)
        chosen_NGA = actions_NG[..., None] == np.arange(3)
        direction = (advantages_NG[..., None] * (chosen_NGA - pi[:, None])).mean(axis=1)
        logits_NA = logits_NA + rate * direction @ gram_AA
        path.append(softmax(logits_NA))
    return np.stack(path)


def check_gram(gram_AA: ArrayLike) -> Array:
    """The Gram, if it is one: symmetric, no negative eigenvalue; (3, 3)."""
    gram = np.asarray(gram_AA, dtype=np.float64)
    if gram.shape != (3, 3) or not np.array_equal(gram, gram.T):
        raise ConfigError("a Gram of three actions must be symmetric with 3 x 3 numbers")
    lowest = float(np.linalg.eigvalsh(gram)[0])
    if not lowest >= -1e-12:
        raise ConfigError(
            f"no features have these overlaps (their Gram has the eigenvalue {lowest:.3g}); "
            "make the overlaps smaller or more alike"
        )
    return gram


def overlaps(good_worst: float, good_mild: float, flawed: float) -> Array:
    """Gram of three unit feature vectors with these inner products; (3, 3)."""
    for value in (good_worst, good_mild, flawed):
        if not -1 <= value <= 1:
            raise ConfigError(f"an overlap must lie between -1 and 1, not {value}")
    return check_gram([[1, good_worst, good_mild], [good_worst, 1, flawed], [good_mild, flawed, 1]])


def simplex_grid(points: int) -> Array:
    """All probabilities i/n, j/n, k/n with i, j, k > 0 that sum to 1; (N, 3)."""
    if points < 4:
        raise ConfigError(f"the grid needs at least 4 points per side, not {points}")
    cells = [(i, j, points - i - j) for i in range(1, points) for j in range(1, points - i)]
    return np.array(cells, dtype=np.float64) / points


def random_grams(n: int, seed: int) -> Array:
    """Grams of three random unit vectors in three dimensions; (n, 3, 3)."""
    vectors = np.random.default_rng(seed).normal(size=(n, 3, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors @ vectors.transpose(0, 2, 1))


def study(
    gram_AA: Array, ratios: Sequence[float], points: int, horizon: float, grams: int, seed: int
) -> dict[str, Any]:
    """The statement over starts and risks: tabular or given features, random ones, and GRPO.

    Risks are r2 = 1 and r3 = ratio; times are in units of 1 / r2.
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise ConfigError(f"a risk ratio r3 / r2 must lie between 0 and 1, not {ratio}")
    if not 0 < horizon < math.inf:
        raise ConfigError(f"the horizon must be positive and finite, not {horizon}")
    starts = simplex_grid(points)
    return {
        "gram": gram_AA.tolist(),
        "starts": len(starts),
        "horizon": horizon,
        "ratios": [_ratio_row(starts, ratio, gram_AA, horizon) for ratio in ratios],
        "random_features": _random_features(starts, ratios, grams, seed) if grams else None,
        "sampled": [_sampled_row(gram_AA, normaliser, seed) for normaliser in NORMALISERS],
    }


def _ratio_row(starts: Array, ratio: float, gram_AA: Array, horizon: float) -> dict[str, Any]:
    risks_A = np.array([0.0, 1.0, ratio])
    times = np.r_[0.0, np.geomspace(horizon / 1e4, horizon, 150)]
    path_TNA = flow(starts, risks_A, gram_AA, times)
    speed_TNA = velocity(path_TNA, risks_A, gram_AA)
    total_TN = -speed_TNA[..., GOOD]
    rises_N = np.asarray((total_TN > RISES).any(axis=0))
    mass_TN = 1 - path_TNA[..., GOOD]
    gain_N = mass_TN.max(axis=0) - mass_TN[0]
    likely_N = starts[:, GOOD] >= starts.max(axis=-1)
    worst = int(gain_N.argmax())
    cost_TN = (path_TNA * risks_A).sum(axis=-1)
    return {
        "ratio": ratio,
        "one_rises": float((speed_TNA[..., 1:] > RISES).any(axis=(0, 2)).mean()),
        "worst_rises": float((speed_TNA[..., WORST] > RISES).any(axis=0).mean()),
        "mild_rises": float((speed_TNA[..., MILD] > RISES).any(axis=0).mean()),
        "total_rises_at_start": float((total_TN[0] > RISES).mean()),
        "total_rises": float(rises_N.mean()),
        "total_rises_where_good_most_likely": float(rises_N[likely_N].mean()),
        "natural_gradient_total_rises": float(
            (replicator_velocity(starts, risks_A)[:, GOOD] <= 0).mean()
        ),
        "risk_weighted_rises": float((np.diff(cost_TN, axis=0) > RISES).any(axis=0).mean()),
        "largest_rise": float(gain_N.max()),
        "largest_rise_from": starts[worst].round(6).tolist(),
        "total_at_end": float(mass_TN[-1].mean()),
        "largest_total_at_end": float(mass_TN[-1].max()),
    }


def _random_features(
    starts: Array, ratios: Sequence[float], grams: int, seed: int
) -> dict[str, Any]:
    """Velocities at all starts under random shared features; no integration is needed."""
    total = likely = total_rises = likely_rises = cost_rises = 0
    example: dict[str, Any] | None = None
    for gram in random_grams(grams, seed):
        for ratio in ratios:
            risks_A = np.array([0.0, 1.0, ratio])
            speed = velocity(starts, risks_A, gram)
            rises = speed[:, GOOD] < -RISES
            most = starts[:, GOOD] > 0.5
            total, likely = total + len(starts), likely + int(most.sum())
            total_rises += int(rises.sum())
            likely_rises += int((rises & most).sum())
            cost_rises += int((speed @ risks_A > RISES).sum())
            if example is None and (rises & most).any():
                where = int(np.flatnonzero(rises & most)[0])
                example = {
                    "gram": gram.round(4).tolist(),
                    "ratio": ratio,
                    "start": starts[where].round(6).tolist(),
                    "velocity_of_total": float(-speed[where, GOOD]),
                }
    return {
        "grams": grams,
        "points": total,
        "total_rises": total_rises / total,
        "total_rises_where_good_above_half": likely_rises / likely,
        "risk_weighted_rises": cost_rises / total,
        "example_where_good_above_half": example,
    }


SAMPLED_START, SAMPLED_RISKS = (0.1, 0.35, 0.55), (0.0, 0.6, 0.03)
SAMPLED_SUCCESS, SAMPLED_GROUP_SIZE = 0.7, 8
"""A case in which the flawed mass first rises (tabular), for GRPO against the flow."""


def _sampled_row(gram_AA: Array, normaliser: Normaliser, seed: int) -> dict[str, Any]:
    """Mean over seeds of sampled GRPO against the flow, with smaller and smaller steps."""
    start, risks = np.array(SAMPLED_START), np.array(SAMPLED_RISKS)
    success, group_size = SAMPLED_SUCCESS, SAMPLED_GROUP_SIZE
    span, rows = 40.0, []
    clock = (success, group_size, normaliser)
    for rate in RATES:
        steps, seeds = round(span / rate), 400
        rng = np.random.default_rng(seed)
        path = sampled(
            start, risks, gram_AA, success, group_size, normaliser, rate, steps, seeds, rng
        )
        path, times = thinned(path, rate)
        exact = flow(start[None], risks, gram_AA, times, clock=clock)
        rows.append(
            {
                "rate": rate,
                "seeds": seeds,
                **distance_to_flow(path, exact[:, 0]),
                "mean_total_highest": float(1 - path.mean(axis=1)[:, GOOD].min()),
                "spread_over_seeds": float(path[-1, :, GOOD].std(ddof=1)),
            }
        )
    mass_T = 1 - exact[:, 0, GOOD]
    return {
        "normaliser": normaliser,
        "rows": rows,
        "flow_total_first": float(mass_T[0]),
        "flow_total_highest": float(mass_T.max()),
        "flow_total_last": float(mass_T[-1]),
    }
