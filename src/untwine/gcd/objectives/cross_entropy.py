"""`generative/ce` and `pairwise`: cross-entropy on the right word.

    L = - mean over questions of (mean over the tokens of the right word) log pi(token | before)

`generative/ce` is GCD as published (arXiv 2509.23870); `pairwise` follows agentic critical training
(arXiv 2603.08706).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from untwine.batch import Row
from untwine.gcd.objectives.protocol import Exercise, Means
from untwine.gcd.questions import Judged, Question, Quiz, answer_loss, judged_steps
from untwine.records import Episode
from untwine.scoring import Targets, score


class CrossEntropy:
    """An `Objective` without weights of its own."""

    module = None

    def __init__(self, means: Means, quiz: Quiz) -> None:
        self._means = means
        self.quiz = quiz
        self._words = quiz.words(means.prompter)

    def exercise(
        self, episodes: Sequence[Episode], rng: random.Random, generator: torch.Generator
    ) -> Exercise | None:
        budget = self._means.config.token_budget
        questions = self.questions(judged_steps(episodes), budget, rng)
        return self.drawn(self.rows(questions)) if questions else None

    def questions(
        self, judged: Sequence[Judged], budget: int, rng: random.Random
    ) -> list[Question]:
        """Questions about labelled steps that cost, with their answers, at most `budget` tokens."""
        longest = self._words.longest
        together = self._means.together

        def cost(question: Question) -> float:
            whole = len(question.prompt_ids) + longest
            if not self._means.fits(whole):
                return math.inf
            return whole - question.shared if together else whole

        return self.quiz.draw(judged, self._means.prompter, budget, cost, rng)

    def rows(self, questions: Sequence[Question]) -> list[Row]:
        """The questions with their answers; the weights sum to 1."""
        return self._words.rows(questions)

    def drawn(self, rows: Sequence[Row]) -> Exercise:
        """The exercise of these rows, whose weights sum to 1."""
        total = len(rows)

        def read(some: Sequence[Row], targets: Targets) -> tuple[torch.Tensor, dict[str, float]]:
            correct = self._words.correct(some, targets) / total
            return answer_loss(targets), {"verdict_accuracy": correct}

        def loss(some: Sequence[Row]) -> tuple[torch.Tensor, dict[str, float]]:
            return read(some, score(self._means.policy, some))

        follows = self._means.prompter.config.verdict == "after"
        return Exercise(rows, loss, {"verdicts": total}, read if follows else None)
