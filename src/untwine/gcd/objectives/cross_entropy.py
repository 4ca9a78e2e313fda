"""`generative/ce` and `pairwise`: cross-entropy on the right word.

    L = - mean over questions of (mean over the tokens of the right word) log pi(token | before)

`generative/ce` is GCD as published (arXiv 2509.23870); `pairwise` follows agentic critical training
(arXiv 2603.08706).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from untwine.batch import Row
from untwine.gcd.objectives.protocol import Exercise, Means
from untwine.gcd.questions import Quiz, answer_loss, judged_steps
from untwine.records import Episode
from untwine.scoring import score


class CrossEntropy:
    """An `Objective` without weights of its own."""

    module = None

    def __init__(self, means: Means, quiz: Quiz) -> None:
        self._means = means
        self._quiz = quiz
        self._words = quiz.words(means.prompter)

    def exercise(
        self, episodes: Sequence[Episode], rng: random.Random, generator: torch.Generator
    ) -> Exercise | None:
        rows = self.rows(episodes, self._means.config.token_budget, rng)
        return self.drawn(rows) if rows else None

    def rows(self, episodes: Sequence[Episode], budget: int, rng: random.Random) -> list[Row]:
        """Questions about labelled episodes with their answers, of at most `budget` tokens."""
        longest = self._words.longest
        judged = judged_steps(episodes)
        questions = self._quiz.draw(
            judged, self._means.prompter, budget, lambda n: n + longest, rng
        )
        return self._words.rows(questions) if questions else []

    def drawn(self, rows: Sequence[Row]) -> Exercise:
        """The exercise of these rows, whose weights sum to 1."""
        total = len(rows)

        def loss(some: Sequence[Row]) -> tuple[torch.Tensor, dict[str, float]]:
            targets = score(self._means.policy, some)
            correct = self._words.correct(some, targets) / total
            return answer_loss(targets), {"verdict_accuracy": correct}

        return Exercise(rows, loss, {"verdicts": total})
