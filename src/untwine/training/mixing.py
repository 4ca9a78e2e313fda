"""How the verdict loss joins the policy loss.

    fixed   g = g_policy + lambda g_gcd
    held    the same, with lambda chosen in each step so that |lambda g_gcd| = ratio |g_policy|
    own     a step on g_policy, then one on g_gcd by an optimizer of its own, whose learning rate
            is lambda times that of the first (Adam's steps do not depend on the scale of a loss)

Norms are over the trained weights of the policy, before clipping. Weights of the objective itself
(`head`) get the gradient of the verdict loss as it is: they act on nothing else, and begin at 0,
where no gradient comes through them to the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from untwine.batch import Row
from untwine.config import GCDConfig
from untwine.gcd.objectives import Exercise
from untwine.training.measures import Measures

if TYPE_CHECKING:
    from untwine.training.update import Updater

Mixing = Callable[["Updater", Sequence[Row], Exercise | None, float], Measures]


def make_mixing(config: GCDConfig) -> Mixing:
    if config.step == "own":
        return own
    return held if config.weight_of == "gradient" else fixed


def fixed(
    updater: Updater, rows: Sequence[Row], exercise: Exercise | None, weight: float
) -> Measures:
    """One step on the weighted sum."""

    return updater.apply(lambda found: updater.add_both(rows, exercise, weight, found))


def held(
    updater: Updater, rows: Sequence[Row], exercise: Exercise | None, ratio: float
) -> Measures:
    """One step on the sum, with lambda = ratio |g_policy| / |g_gcd|; 0 where either norm is 0."""

    def accumulate(measures: Measures) -> None:
        updater.add_policy(rows, measures)
        policy = [p.grad for p in updater.parameters]
        for p in updater.parameters:
            p.grad = None
        updater.add_verdicts(exercise, 1.0, measures)
        verdicts = [p.grad for p in updater.parameters]
        acting = updater.acting
        norm, other = _norm(policy[:acting]), _norm(verdicts[:acting])
        weight = ratio * norm / other if other > 0 else 0.0
        together = list(zip(updater.parameters, policy, verdicts, strict=True))
        for p, first, second in together[:acting]:
            if second is None:
                p.grad = first
            else:
                p.grad = second.mul_(weight) if first is None else first.add_(second, alpha=weight)
        for p, _, second in together[acting:]:
            p.grad = second
        measures.add(grad_norm_policy=norm, grad_norm_gcd=other, gcd_lambda=weight)

    return updater.apply(accumulate)


def own(
    updater: Updater, rows: Sequence[Row], exercise: Exercise | None, weight: float
) -> Measures:
    """Two steps, each only where there is something to learn from."""
    measures = Measures()
    if rows:
        measures.join(updater.apply(lambda found: updater.add_policy(rows, found)))
    if exercise is not None and exercise.rows:
        found = updater.apply(
            lambda found: updater.add_verdicts(exercise, 1.0, found), updater.own, weight
        )
        found.sums["grad_norm_gcd"] = found.sums.pop("grad_norm")
        measures.join(found)
    return measures


def _norm(gradients: Iterable[torch.Tensor | None]) -> float:
    norms = [g.norm() for g in gradients if g is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0
