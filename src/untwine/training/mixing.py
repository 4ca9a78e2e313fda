"""How the verdict loss joins the policy loss.

    fixed   g = g_policy + lambda g_gcd
    held    the same, with lambda chosen in each step so that |lambda g_gcd| = ratio |g_policy|; or
            in every n-th step only, lambda / ratio staying what it was in between
    own     a step on g_policy, then one on g_gcd by an optimizer of its own, whose learning rate
            is lambda times that of the first (Adam's steps do not depend on the scale of a loss)

Both gradients are taken at the same weights. Norms are over the trained weights of the policy,
before clipping. Weights of the objective itself (`head`) act on nothing else, and begin at 0, where
no gradient comes through them to the policy; in `held` they get the gradient of the verdict loss as
it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from untwine.batch import Row
from untwine.config import GCDConfig
from untwine.gcd.objectives import Exercise
from untwine.training.measures import Measures

if TYPE_CHECKING:
    from untwine.training.update import Updater

Mixing = Callable[["Updater", Sequence[Row], Exercise | None, float], Measures]

NORMS_EVERY = 10  # steps of `fixed` between two whose norms are measured
DROWNED = 3.0  # ratio of |lambda g_gcd| to |g_policy| above which steps go mostly after verdicts


def make_mixing(config: GCDConfig) -> Mixing:
    if config.step == "own":
        return own
    if config.weight_of == "gradient":
        return partial(held, every=config.norms_every)
    return fixed


def fixed(
    updater: Updater, rows: Sequence[Row], exercise: Exercise | None, weight: float
) -> Measures:
    """One step on the weighted sum, from one backward pass. In every tenth step there are two, so
    that it is known how large the verdict gradient is beside that of the policy."""
    measured = exercise is not None and weight > 0 and updater.steps % NORMS_EVERY == 0
    if measured or not updater.everywhere:
        return _summed(updater, rows, exercise, lambda policy, verdicts: weight, weight)
    return _at_once(updater, rows, exercise, weight)


def held(
    updater: Updater,
    rows: Sequence[Row],
    exercise: Exercise | None,
    ratio: float,
    *,
    every: int = 1,
) -> Measures:
    """One step on the sum, with lambda = ratio |g_policy| / |g_gcd|; 0 where either norm is 0.

    every  the norms are measured in the steps whose number it divides. In the others the quotient
           found last holds, and there is one backward pass; but not where a loss has no rows, the
           verdict loss enters some weights only, or has weights of its own
    """
    known = updater.norm_quotient
    usual = updater.everywhere and updater.module is None and rows and exercise is not None
    if known is not None and usual and updater.steps % every:
        measures = _at_once(updater, rows, exercise, ratio * known)
        measures.add(gcd_lambda=ratio * known)
        return measures

    def weigh(policy: float, verdicts: float) -> float:
        if every > 1 and policy > 0 and verdicts > 0:
            updater.norm_quotient = policy / verdicts
        return ratio * policy / verdicts if verdicts > 0 else 0.0

    return _summed(updater, rows, exercise, weigh, 1.0)


def own(
    updater: Updater, rows: Sequence[Row], exercise: Exercise | None, weight: float
) -> Measures:
    """Two steps, each only where there is something to learn from."""
    verdicts: list[torch.Tensor | None] = []

    def accumulate(measures: Measures) -> None:
        verdicts[:] = updater.add_apart(rows, exercise, measures)

    measures = updater.gather(accumulate)
    if rows:
        measures.add(grad_norm=updater.take(updater.optimizer))
    if exercise is not None and exercise.rows:
        assert updater.own is not None
        for p, gradient in zip(updater.parameters, verdicts, strict=True):
            p.grad = gradient
        measures.add(grad_norm_gcd=updater.take(updater.own, weight))
    return measures


def _at_once(
    updater: Updater, rows: Sequence[Row], exercise: Exercise | None, weight: float
) -> Measures:
    """One step on g_policy + weight g_gcd, from one backward pass."""
    return updater.apply(lambda found: updater.add_both(rows, exercise, weight, found))


def _summed(
    updater: Updater,
    rows: Sequence[Row],
    exercise: Exercise | None,
    weigh: Callable[[float, float], float],
    extra: float,
) -> Measures:
    """One step on g_policy + lambda g_gcd; lambda from both norms. Weights of the objective get
    `extra` times the gradient of the verdict loss."""

    def accumulate(measures: Measures) -> None:
        verdicts = updater.add_apart(rows, exercise, measures)
        acting = updater.acting
        norm = _norm(p.grad for p in updater.parameters[:acting])
        other = _norm(verdicts[:acting])
        weight = weigh(norm, other)
        for k, (p, gradient) in enumerate(zip(updater.parameters, verdicts, strict=True)):
            factor = weight if k < acting else extra
            if gradient is not None and factor:  # a gradient of 0 would be a step by momentum
                p.grad = factor * gradient if p.grad is None else p.grad + factor * gradient
        measures.add(grad_norm_policy=norm, grad_norm_gcd=other, gcd_lambda=weight)
        if norm > 0:
            measures.add(gcd_ratio=weight * other / norm)

    return updater.apply(accumulate)


def _norm(gradients: Iterable[torch.Tensor | None]) -> float:
    norms = [g.norm() for g in gradients if g is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0
