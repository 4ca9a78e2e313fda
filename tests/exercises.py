"""Exercises for tests of the update: cross-entropy on the targets of plain rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from untwine.batch import Row
from untwine.gcd.objectives import Exercise
from untwine.gcd.questions import answer_loss
from untwine.policy.loading import Policy
from untwine.scoring import score


def plain_exercise(policy: Policy, rows: Sequence[Row]) -> Exercise:
    def loss(some: Sequence[Row]) -> tuple[torch.Tensor, dict[str, float]]:
        return answer_loss(score(policy, some)), {"verdict_accuracy": len(some) / len(rows)}

    return Exercise(rows, loss)
