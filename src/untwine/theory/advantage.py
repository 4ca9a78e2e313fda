"""Group advantages of GRPO (Shao et al., arXiv 2402.03300, section 4.1) and their expectations.

The letters of shapes: M groups, G episodes per group, S successes in a group, N any points.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from untwine.errors import ConfigError, nearest

Array = NDArray[np.float64]
Normaliser = Literal["std", "none"]
NORMALISERS: tuple[Normaliser, ...] = get_args(Normaliser)

EPS = 1e-6
"""Added to the standard deviation, as `untwine.credit.grpo` does by default."""

MAX_GROUP_SIZE = 1000


def check_group_size(group_size: int) -> int:
    """The group size, if a group of this size has a baseline and its binomials fit a float."""
    if not 2 <= group_size <= MAX_GROUP_SIZE:
        raise ConfigError(
            f"a group size must lie between 2 and {MAX_GROUP_SIZE}, not {group_size}; "
            "a group of one has no baseline"
        )
    return group_size


def as_normaliser(name: str) -> Normaliser:
    """The normaliser of this name."""
    for known in NORMALISERS:
        if name == known:
            return known
    raise ConfigError(
        f"the normaliser must be std or none, not {name!r}.{nearest(name, NORMALISERS)}"
    )


def group_advantages(returns_MG: ArrayLike, normaliser: Normaliser) -> Array:
    """A_g = R_g - mean R, divided by (unbiased std R + EPS) for `std`; shape (M, G), G > 1."""
    returns = np.asarray(returns_MG, dtype=np.float64)
    advantages = returns - returns.mean(axis=-1, keepdims=True)
    if normaliser == "std":
        advantages = advantages / (returns.std(axis=-1, ddof=1, keepdims=True) + EPS)
    return np.asarray(advantages)


def advantages_by_successes(group_size: int, normaliser: Normaliser) -> tuple[Array, Array]:
    """Advantages of a failure and of a success in a group with S = 0..G successes, returns 0 or 1.

    Two arrays (G + 1,). In a group without successes the second entry does not occur, in one
    without failures the first; both are 0 there.
    """
    G = check_group_size(group_size)
    successes_S = np.arange(G + 1, dtype=np.float64)
    scale_S = np.ones(G + 1)
    if normaliser == "std":
        scale_S = np.sqrt(successes_S * (G - successes_S) / (G * (G - 1))) + EPS
    failure_S = -successes_S / G / scale_S
    success_S = (1 - successes_S / G) / scale_S
    failure_S[G] = success_S[0] = 0.0
    return failure_S, success_S


def expected_advantages(
    value_N: ArrayLike, group_size: int, normaliser: Normaliser
) -> tuple[Array, Array]:
    """Expected advantages of an episode that failed and of one that succeeded, both (N,).

    The other G - 1 episodes of the group succeed independently with probability `value_N`, so
    their number of successes is binomial; the sum over it is exact.
    """
    G = check_group_size(group_size)
    value = np.asarray(value_N, dtype=np.float64)[..., None]
    others_K = np.arange(G)
    ways_K = np.array([float(math.comb(G - 1, k)) for k in range(G)])
    weight_NK = ways_K * value**others_K * (1 - value) ** (G - 1 - others_K)
    failure_S, success_S = advantages_by_successes(G, normaliser)
    return weight_NK @ failure_S[:-1], weight_NK @ success_S[1:]


def slope(value_N: ArrayLike, group_size: int, normaliser: Normaliser) -> Array:
    """D_G(V), by which GRPO multiplies true advantages when returns are 0 or 1; shape (N,).

    With V the success probability of the group, an episode that succeeds with probability Q has
    the expected advantage D_G(V) (Q - V): affine in Q, and 0 at Q = V because the advantages of a
    group sum to 0. For `none` D is (G - 1) / G; for `std` it is positive, depends on V, and tends
    to 1 / sqrt(V (1 - V)) for large groups.
    """
    failure_N, success_N = expected_advantages(value_N, group_size, normaliser)
    return success_N - failure_N
