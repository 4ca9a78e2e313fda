"""`generative/rl` and `pairwise/rl`: the verdict as an action with a reward of its own.

Each question gets `gcd.replies` sampled replies. A reply earns 1 when its verdict is right and 0
otherwise, and its advantage is that of GRPO inside the replies to the question,

    A_k = (r_k - mean r) / (std r + eps),   eps = 1e-6, std unbiased,

so questions whose replies all earn the same teach nothing. The loss is the clipped surrogate per
token, each reply with the same weight. With `gcd.rationale_tokens: 0` a reply is one of the two
words, drawn from the policy's distribution over these two; otherwise it is free text of at most so
many tokens, and its verdict is the last of the two words in it. The letters A and B are read as
they are written, since "a" is a word of its own.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence

import numpy as np
import torch

from untwine.batch import Row, choice_lines, chosen_places
from untwine.config import SamplingConfig
from untwine.gcd.objectives.protocol import Exercise, Means
from untwine.gcd.questions import Question, Quiz, Words, judged_steps
from untwine.losses.policy import clipped_surrogate
from untwine.policy.choices import Node
from untwine.policy.sampler import Sample, Sampler
from untwine.records import Episode
from untwine.scoring import score

CLIP = 0.2
EPS = 1e-6
_SLOTS = 128  # replies sampled side by side


class Reinforced:
    """An `Objective` without weights of its own."""

    module = None

    def __init__(self, means: Means, quiz: Quiz) -> None:
        self._means = means
        self._quiz = quiz
        self._words = quiz.words(means.prompter)
        self._choices = None if means.config.rationale_tokens else word_trie(self._words)

    def exercise(
        self, episodes: Sequence[Episode], rng: random.Random, generator: torch.Generator
    ) -> Exercise | None:
        config = self._means.config
        longest = config.rationale_tokens or self._words.longest

        def cost(question: Question) -> float:
            prompt = len(question.prompt_ids)
            return (
                prompt + config.replies * longest
                if self._means.fits(prompt + longest)
                else math.inf
            )

        questions = self._quiz.draw(
            judged_steps(episodes), self._means.prompter, config.token_budget, cost, rng
        )
        if not questions:
            return None
        replies, read = self._replies(questions, generator)
        rewards = [
            [self.reward(q, r) for r in own] for q, own in zip(questions, replies, strict=True)
        ]
        rows = reply_rows(questions, replies, rewards)
        right = sum(map(sum, rewards))
        sampled = [reply for own in replies for reply in own]
        counts = {
            "verdicts": len(questions),
            "verdict_accuracy": right / len(sampled),
            "verdicts_mixed": sum(len(set(own)) > 1 for own in rewards),
            "gcd_sampled_tokens": sum(len(reply.ids) for reply in sampled),
            "gcd_computed_tokens": read,
        }
        return Exercise(rows, self._loss, counts)

    def reward(self, question: Question, reply: Sample) -> float:
        """1 for the right verdict, 0 for the wrong one or none."""
        if self._choices is not None:
            return float(reply.ids == self._words.ids[question.answer])
        text, _ = self._means.policy.chat.decode(reply.ids)
        return float(verdict_in(text, self._words) == question.answer)

    def _replies(
        self, questions: Sequence[Question], generator: torch.Generator
    ) -> tuple[list[list[Sample]], int]:
        """`gcd.replies` replies to each question, and how many prompt tokens were computed."""
        config = self._means.config
        sampling = SamplingConfig(
            temperature=self._means.temperature,
            max_new_tokens=config.rationale_tokens or self._words.longest,
        )
        n, computed = config.replies, 0
        found: list[list[Sample]] = []
        most = max(1, _SLOTS // n)
        for first in range(0, len(questions), most):
            part = questions[first : first + most]
            sampler = Sampler(self._means.policy, sampling, generator)
            prompts = {i * n + k: q.prompt_ids for i, q in enumerate(part) for k in range(n)}
            choices = dict.fromkeys(prompts, self._choices) if self._choices else None
            samples = sampler.sample(prompts, choices)
            computed += sampler.computed_tokens
            found += [[samples[i * n + k] for k in range(n)] for i in range(len(part))]
        return found, computed

    def _loss(self, rows: Sequence[Row]) -> tuple[torch.Tensor, dict[str, float]]:
        targets = score(self._means.policy, rows, self._means.temperature)
        surrogate_N = clipped_surrogate(
            targets.logprobs_N, targets.old_logprobs_N, targets.advantages_N, CLIP, CLIP
        )
        return (targets.weights_N * surrogate_N).sum(), {}


def word_trie(words: Words) -> Node:
    """The two words as the only replies."""
    root: Node = {}
    for ids in words.ids.values():
        node = root
        for token in ids:
            node = node.setdefault(token, {})
    return root


def verdict_in(text: str, words: Words) -> str | None:
    """Key of the last of the two words in a text; None when it holds neither. Case counts where the
    words are letters."""
    letters = all(len(word) == 1 for word in words.texts.values())
    keys = {word if letters else word.lower(): key for key, word in words.texts.items()}
    pattern = "|".join(map(re.escape, keys))
    found = re.findall(rf"\b({pattern})\b", text if letters else text.lower())
    return keys[found[-1]] if found else None


def advantages(rewards: Sequence[float]) -> list[float]:
    """Advantages of GRPO in one group of replies; 0 where all earn the same."""
    n = len(rewards)
    mean = math.fsum(rewards) / n
    if n < 2 or len(set(rewards)) == 1:
        return [0.0] * n
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (n - 1))
    return [(r - mean) / (deviation + EPS) for r in rewards]


def reply_rows(
    questions: Sequence[Question],
    replies: Sequence[Sequence[Sample]],
    rewards: Sequence[Sequence[float]],
) -> list[Row]:
    """A row for every reply with an advantage; every reply, also those without, counts for one in
    the mean."""
    total = sum(map(len, replies))
    rows = []
    for question, own, earned in zip(questions, replies, rewards, strict=True):
        for reply, advantage in zip(own, advantages(earned), strict=True):
            if advantage:
                rows.append(_row(question, reply, advantage, 1.0 / total))
    return [row for row in rows if len(row.targets)]


def _row(question: Question, reply: Sample, advantage: float, weight: float) -> Row:
    """A question and a reply, its weight shared by the tokens that were chosen, not forced."""
    chosen = chosen_places(reply.allowed, len(reply.ids))
    n = len(chosen)
    return Row(
        ids=np.array(question.prompt_ids + reply.ids, dtype=np.int64),
        targets=len(question.prompt_ids) + chosen,
        weights=np.full(n, weight / max(n, 1), dtype=np.float32),
        old_logprobs=np.array(reply.logprobs, dtype=np.float32)[chosen],
        advantages=np.full(n, advantage, dtype=np.float32),
        choices=None if reply.allowed is None else choice_lines(reply.allowed, chosen),
    )
