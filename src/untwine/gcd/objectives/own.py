"""Objectives of one's own, named `module:maker`: what they make is checked before it is trained on,
and their numbers get names that nothing else has."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from untwine.batch import Row
from untwine.errors import ConfigError
from untwine.gcd.objectives.protocol import Exercise, Means, Objective
from untwine.own_code import cut_short
from untwine.records import Episode

_SHARED = ("verdicts", "verdict_accuracy")


def row_fault(row: object, vocabulary: int, positions: int) -> str | None:
    """Why nothing can be trained on a row, and what it must have; None where it can."""
    if not isinstance(row, Row):
        return f"is {cut_short(row)}; it must be a Row, as untwine.batch.completion_row makes it"
    for name in ("ids", "targets"):
        values: object = getattr(row, name)
        if not (isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind == "i"):
            return f"has {name} {cut_short(values)}; they must be an array of integers"
    length, n = row.length, len(row.targets)
    if length > positions:
        return f"has {length} tokens, but the model has positions for {positions}; make it shorter"
    if not n or row.targets.min() < 1 or row.targets.max() >= length:
        return (
            f"has targets {cut_short(row.targets.tolist())}; there must be some, between 1 and "
            f"{length - 1}, the last place of its {length} ids"
        )
    for name in ("weights", "old_logprobs", "advantages"):
        values = getattr(row, name)
        if not isinstance(values, np.ndarray) or values.shape != (n,):
            return f"has {name} {cut_short(values)}; give an array, one for each of {n} targets"
        if not np.isfinite(values).all():
            return f"has {name} {cut_short(values.tolist())}; all must be finite"
    ids = row.ids
    if row.choices is not None:
        shape: tuple[int, ...] = getattr(row.choices, "shape", ())
        if len(shape) != 2 or shape[0] != n:
            return f"has choices of shape {shape}; it must be ({n}, C), C for each target"
        missing = (row.choices >= 0).any(1) & ~(row.choices == ids[row.targets, None]).any(1)
        if missing.any():
            return f"has a target {ids[row.targets][missing][0]} that is not among its choices"
        ids = np.concatenate([ids, row.choices[row.choices >= 0]])
    if ids.min() < 0 or ids.max() >= vocabulary:
        worst = ids.min() if ids.min() < 0 else ids.max()
        return f"has the token id {worst}; the model has ids 0 to {vocabulary - 1}"
    return None


class OwnObjective:
    """An `Objective` around one's own. ConfigError, with its name, for what cannot be trained on.

    Of its counts and measures `verdicts` and `verdict_accuracy` are recorded as they are, all
    others as `objective_NAME`.
    """

    def __init__(self, what: str, maker: Callable[..., Any], means: Means) -> None:
        """what   named first in errors"""
        self._what = what
        self._policy = means.policy
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
        if not isinstance(found.rows, Sequence):
            raise self._wrong("its `rows`", found.rows, "a list of Rows")
        for k, row in enumerate(found.rows):
            if fault := row_fault(row, self._policy.vocabulary, self._policy.max_positions):
                raise ConfigError(f"{self._what}: row {k} of its exercise {fault}")
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
