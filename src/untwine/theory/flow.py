"""Integration of a small autonomous ODE, many starts at once.

Dormand and Prince, "A family of embedded Runge-Kutta formulae" (1980): order 5, with an error
estimate of order 4 that controls the step. All starts share the step of the most difficult one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from untwine.theory.advantage import Array

Field = Callable[[Array], Array]

RATES = (0.8, 0.2, 0.05)
"""Step sizes at which sampled GRPO is compared with its flow."""

_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def integrate(
    field: Field, start: ArrayLike, times_T: ArrayLike, *, rtol: float = 1e-8, atol: float = 1e-10
) -> Array:
    """Solution of dy/dt = field(y) from `start` (any shape), at `times_T`; shape (T, *start).

    The first time belongs to `start`; times increase. Each step keeps the estimated error of every
    entry below atol + rtol |y|.
    """
    times = np.asarray(times_T, dtype=np.float64)
    if times.ndim != 1 or not len(times) or (np.diff(times) <= 0).any():
        raise ValueError("times must be a list of increasing numbers")
    state = np.asarray(start, dtype=np.float64)
    path = [state]
    size = float(times[-1] - times[0]) / 1000 or 1.0
    for begin, end in pairwise(times.tolist()):
        state, size = _advance(field, state, end - begin, size, rtol, atol)
        path.append(state)
    return np.stack(path)


def thinned(path_TNA: Array, rate: float) -> tuple[Array, Array]:
    """A path of steps of `rate` at multiples of the largest rate only, and their times (T,)."""
    stride = round(RATES[0] / rate)
    return path_TNA[::stride], rate * np.arange(0.0, len(path_TNA), stride)


def distance_to_flow(path_TSA: Array, exact_TA: Array) -> dict[str, float]:
    """Where the mean of S sampled paths is farthest from the flow, and its standard error there."""
    gap_TA = np.abs(path_TSA.mean(axis=1) - exact_TA)
    error_TA = path_TSA.std(axis=1, ddof=1) / math.sqrt(path_TSA.shape[1])
    return {
        "largest_gap": float(gap_TA.max()),
        "standard_error_there": float(error_TA.flat[int(gap_TA.argmax())]),
    }


def _advance(
    field: Field, state: Array, span: float, size: float, rtol: float, atol: float
) -> tuple[Array, float]:
    """The state after `span`, and the step size to go on with."""
    left = span
    while left > 1e-14 * span:
        step = min(size, left)
        if step < 1e-13 * span:
            raise FloatingPointError("the flow cannot be integrated: the step became too small")
        after, error = _step(field, state, step)
        bound = atol + rtol * np.maximum(np.abs(state), np.abs(after))
        ratio = float(np.max(np.abs(error) / bound, initial=0.0))
        factor = 5.0 if ratio < 1e-4 else min(5.0, max(0.2, 0.9 * ratio**-0.2))
        if ratio <= 1:
            state, left = after, left - step
            # a step cut short by the end of the span says nothing against a longer one
            size = max(size, step * factor) if step < size else step * factor
        else:
            size = step * factor
    return state, size


def _step(field: Field, state: Array, step: float) -> tuple[Array, Array]:
    slopes: list[Array] = []
    point = state
    for weights in _STAGES:
        point = state + step * sum((w * k for w, k in zip(weights, slopes, strict=True)), 0.0)
        slopes.append(field(point))
    # the last stage is evaluated at the solution of order 5
    error = step * sum((w * k for w, k in zip(_ERROR, slopes, strict=True)), np.zeros_like(state))
    return point, error
