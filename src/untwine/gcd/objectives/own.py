"""Objectives of one's own, named `module:maker`: what they make is checked before it is trained on,
and their numbers get names that nothing else has."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from untwine.errors import ConfigError
from untwine.gcd.objectives.protocol import Exercise, Means, Objective
from untwine.own_code import cut_short
from untwine.records import Episode

_SHARED = ("verdicts", "verdict_accuracy")


class OwnObjective:
    """An `Objective` around one's own. ConfigError, with its name, for what cannot be trained on.

    Of its counts and measures `verdicts` and `verdict_accuracy` are recorded as they are, all
    others as `objective_NAME`.
    """

    def __init__(self, what: str, maker: Callable[..., Any], means: Means) -> None:
        """what   named first in errors"""
        self._what = what
        objective = maker(means)
        module = getattr(objective, "module", self)
        if not callable(getattr(objective, "exercise", None)) or not (
            module is None or isinstance(module, torch.nn.Module)
        ):
            raise ConfigError(
                f"{self._what} makes a {type(objective).__name__}; it must have a method `exercise`"
                ", and `module`: None, or a torch.nn.Module with weights of its own"
            )
        self._objective: Objective = objective
        self.module: torch.nn.Module | None = module

    def exercise(
        self, episodes: Sequence[Episode], rng: random.Random, generator: torch.Generator
    ) -> Exercise | None:
        found: Any = self._objective.exercise(episodes, rng, generator)
        if found is None:
            return None
        if not isinstance(found, Exercise):
            raise self._wrong("`exercise`", found, "an Exercise or None")
        return replace(
            found,
            loss=self._checked(found.loss),
            counts=self._numbers(found.counts),
            read=found.read and self._checked(found.read),
        )

    def _checked(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any) -> tuple[torch.Tensor, dict[str, float]]:
            found = loss(*arguments)
            if not isinstance(found, tuple) or len(found) != 2:
                raise self._wrong("its loss", found, "a tensor and a dict of measures")
            value, measures = found
            if not isinstance(value, torch.Tensor) or value.numel() != 1:
                raise self._wrong("its loss", value, "a tensor with one number")
            return value.reshape(()), self._numbers(measures)

        return checked

    def _numbers(self, found: Any) -> dict[str, float]:
        if not isinstance(found, Mapping):
            raise self._wrong("its measures", found, "a dict of numbers")
        try:
            return {
                key if key in _SHARED else f"objective_{key}": float(value)
                for key, value in found.items()
            }
        except (TypeError, ValueError):
            raise self._wrong("its measures", found, "a dict of numbers") from None

    def _wrong(self, where: str, found: object, wanted: str) -> ConfigError:
        return ConfigError(f"{self._what}: {where} gave {cut_short(found)}; it must give {wanted}")
