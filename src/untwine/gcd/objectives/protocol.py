"""What an objective must be, what it is made from, and what it makes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from untwine.batch import Row
from untwine.config import GCDConfig
from untwine.policy.loading import Policy
from untwine.prompting.prompter import Prompter
from untwine.records import Episode
from untwine.scoring import Targets

RowsLoss = Callable[[Sequence[Row]], tuple[torch.Tensor, dict[str, float]]]
Reading = Callable[[Sequence[Row], Targets], tuple[torch.Tensor, dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Means:
    """What an objective is made from.

    temperature  of sampling
    """

    policy: Policy
    prompter: Prompter
    config: GCDConfig
    temperature: float = 1.0

    @property
    def together(self) -> bool:
        """Whether questions that follow replies are computed in one pass with the policy loss."""
        return self.temperature == 1.0 and self.prompter.config.verdict == "after"

    def fits(self, tokens: int) -> bool:
        """Whether the model has positions for so many tokens."""
        return tokens <= self.policy.max_positions


@dataclass(frozen=True, slots=True)
class Exercise:
    """What is trained on in one iteration.

    rows    their weights make the loss a mean over all of them
    loss    of some of the rows: a scalar, and measures; both add up over micro-batches
    counts  for the metrics: `verdicts` (questions, or labelled actions) and what sampling cost
    read    the same as `loss`, from what `score` gave for these rows at temperature 1. With it,
            rows can be computed in one pass with others that begin alike; None: they cannot
    """

    rows: Sequence[Row]
    loss: RowsLoss
    counts: Mapping[str, float] = field(default_factory=dict)
    read: Reading | None = None


class Objective(Protocol):
    """Makes exercises."""

    @property
    def module(self) -> torch.nn.Module | None:
        """Weights of its own, trained and saved beside the policy's; None: it has none."""

    def exercise(
        self, episodes: Sequence[Episode], rng: random.Random, generator: torch.Generator
    ) -> Exercise | None:
        """From labelled episodes, within `gcd.token_budget`; None when they allow none, such as
        labels of one class only.

        rng        draws among the samples
        generator  samples tokens
        """


ObjectiveMaker = Callable[[Means], Objective]
