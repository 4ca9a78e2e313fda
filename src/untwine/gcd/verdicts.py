"""Verdict data: prompts that ask "good or bad?", balanced, deduplicated and within a budget."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from untwine.batch import Row, completion_row
from untwine.errors import ModelError
from untwine.gcd.labels import agreed_verdict
from untwine.prompting.prompter import VERDICT_WORDS, Prompter
from untwine.records import Episode, Verdict
from untwine.scoring import Targets


@dataclass(frozen=True, slots=True)
class VerdictSample:
    """A verdict prompt and its right answer.

    prompt_ids  ids of the question
    verdict     good or flawed
    kind        kind of the first label, for the statistics
    """

    prompt_ids: tuple[int, ...]
    verdict: Verdict
    kind: str


def verdict_samples(
    episodes: Iterable[Episode], prompter: Prompter, budget: int, rng: random.Random
) -> list[VerdictSample]:
    """Balanced verdict samples from labelled episodes.

    Steps without a label are left out, and so are those whose labels disagree, in one step or
    between steps with the same task, state and command; of such equal steps one is kept. Both
    classes get the same number of samples, drawn at random, until `budget` tokens are used.
    Returns [] when one class is empty.
    """
    first_seen: dict[tuple[str, str, str], tuple[Episode, int]] = {}
    verdicts: dict[tuple[str, str, str], set[Verdict]] = defaultdict(set)
    for episode in episodes:
        for t, step in enumerate(episode.steps):
            if verdict := agreed_verdict(step):
                key = (str(episode.ref), step.state_key, step.command or step.text)
                first_seen.setdefault(key, (episode, t))
                verdicts[key].add(verdict)
    candidates: dict[Verdict, list[tuple[Episode, int]]] = {"good": [], "flawed": []}
    for key, found in verdicts.items():
        if len(found) == 1:
            candidates[found.pop()].append(first_seen[key])
    for steps in candidates.values():
        rng.shuffle(steps)
    samples: list[VerdictSample] = []
    used = 0
    for pair in zip(candidates["good"], candidates["flawed"], strict=False):
        new = [_sample(episode, t, prompter) for episode, t in pair]
        used += sum(len(s.prompt_ids) + 1 for s in new)
        if used > budget:
            break
        samples += new
    return samples


class VerdictWords:
    """The two answers as token ids, for one tokenizer."""

    def __init__(self, prompter: Prompter) -> None:
        self.ids = {
            verdict: prompter.chat.word_ids(word) for verdict, word in VERDICT_WORDS.items()
        }
        if self.ids["good"][0] == self.ids["flawed"][0]:
            raise ModelError("this tokenizer begins both verdict words with the same token")

    def rows(self, samples: Sequence[VerdictSample]) -> list[Row]:
        """Rows whose cross-entropy is a mean over the samples."""
        return [
            completion_row(s.prompt_ids, self.ids[s.verdict], 1.0 / len(samples)) for s in samples
        ]

    def correct(self, rows: Sequence[Row], targets: Targets) -> int:
        """How many of the rows put more weight on the right verdict than on the wrong one."""
        good, flawed = self.ids["good"][0], self.ids["flawed"][0]
        firsts = np.cumsum([0, *(len(row.targets) for row in rows[:-1])])
        logits_nV = targets.logits(firsts.tolist())
        says_good = (logits_nV[:, good] > logits_nV[:, flawed]).tolist()
        wanted = [int(row.ids[row.targets[0]]) == good for row in rows]
        return sum(x == y for x, y in zip(says_good, wanted, strict=True))


def verdict_loss(targets: Targets) -> torch.Tensor:
    """Cross-entropy on the verdict tokens, weighted (form `ce` of docs/methods/gcd.md)."""
    return -(targets.weights_N * targets.logprobs_N).sum()


def _sample(episode: Episode, t: int, prompter: Prompter) -> VerdictSample:
    step = episode.steps[t]
    verdict = agreed_verdict(step)
    assert verdict is not None
    return VerdictSample(prompter.verdict_ids(episode, t), verdict, step.labels[0].kind)
