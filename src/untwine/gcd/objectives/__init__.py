"""Objectives: what the actor learns from labelled steps beside acting. One file per kind.

An objective turns the labelled episodes of an iteration into an `Exercise`: rows, and the loss on
any micro-batch of them. The update (training/update.py) knows nothing else of it. One of one's own
is named `module:maker`.
"""

from __future__ import annotations

from functools import partial

from untwine.errors import ConfigError, nearest
from untwine.gcd.objectives.cross_entropy import CrossEntropy
from untwine.gcd.objectives.head import VerdictHead
from untwine.gcd.objectives.own import OwnObjective
from untwine.gcd.objectives.protocol import Exercise, Means, Objective, ObjectiveMaker
from untwine.gcd.objectives.reinforced import Reinforced
from untwine.gcd.questions import PAIRS, SIMILAR, VERDICTS, Quiz
from untwine.own_code import is_own, own_callable

__all__ = [
    "Exercise", "Means", "Objective", "check_objective", "make_objective", "objective_names",
    "register_objective",
]  # fmt: skip

_MAKERS: dict[str, ObjectiveMaker] = {
    "generative/ce": lambda means: CrossEntropy(means, _verdicts(means)),
    "generative/rl": lambda means: Reinforced(means, _verdicts(means)),
    "pairwise": lambda means: CrossEntropy(means, PAIRS),
    "pairwise/rl": lambda means: Reinforced(means, PAIRS),
    "head": VerdictHead,
}


def _verdicts(means: Means) -> Quiz:
    return SIMILAR if means.config.contrast == "similar" else VERDICTS


def register_objective(name: str, maker: ObjectiveMaker) -> None:
    """Add an objective of your own."""
    _MAKERS[name] = maker


def objective_names() -> tuple[str, ...]:
    return tuple(sorted(_MAKERS))


def check_objective(name: str) -> None:
    """ConfigError when there is no such objective."""
    if name != "none":
        _maker(name)


def make_objective(name: str, means: Means) -> Objective | None:
    """The objective `name`, a registered one or `module:maker`; None for `none`. ConfigError when
    there is no such objective, or what is made is none."""
    return None if name == "none" else _maker(name)(means)


def _maker(name: str) -> ObjectiveMaker:
    if name in _MAKERS:
        return _MAKERS[name]
    if not is_own(name):
        known = ", ".join(["none", *objective_names()])
        raise ConfigError(
            f"unknown gcd.objective {name!r}; known are {known}, and one of your own is named "
            f"module:maker, such as my_module:Objective.{nearest(name, _MAKERS)}"
        )
    what = f"gcd.objective {name!r}"
    return partial(OwnObjective, what, own_callable(what, name, "Objective", ConfigError))
