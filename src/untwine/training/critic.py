"""The verdict data of the cold start: questions about what experts did, and about what they might
have done instead.

The expert's command is good; its errors, and commands beside its own, are what their labels say.
Questions of their own prompts (`prompt.verdict: apart`) are drawn from all episodes, so many tokens
for each token of imitation. Questions that follow the reply in the acting prompt (`after`) come
with the steps that are imitated: one good and one flawed command of the same state for each.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from untwine.batch import Row
from untwine.demonstrations import Transcript
from untwine.envs.protocol import EnvInfo
from untwine.gcd.labels import EXPERT_GOOD, OFF_PLAN, label_group
from untwine.gcd.objectives.cross_entropy import CrossEntropy
from untwine.gcd.objectives.protocol import Exercise
from untwine.gcd.questions import Judged, judged_steps, within
from untwine.prompting.prompter import Prompter, reply_text
from untwine.records import Episode, Group, Verdict

FEW = 16  # verdicts below which a model soon knows the answers by heart


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of imitation, the number of its episode, and which of its steps it imitates."""

    row: Row
    episode: int
    steps: Sequence[int]

    @property
    def length(self) -> int:
        return self.row.length


class Critic(Protocol):
    """Asks about what experts do."""

    @property
    def size(self) -> int:
        """How many different questions or steps there are to ask about."""

    def exercise(self, drawn: Sequence[Sample], rng: random.Random) -> Exercise | None:
        """Questions for a step that imitates `drawn`; None when there are none."""


class Apart:
    """Questions in prompts of their own, as many with either answer, drawn anew for each step. None
    comes twice in a step, so where one kind is rare, there are fewer.

    tokens  of questions in each step, exceeded by the last of them
    """

    def __init__(
        self, objective: CrossEntropy, episodes: Iterable[Episode], tokens: int, seed: int
    ) -> None:
        self._objective = objective
        self._judged = judged_steps(episodes)
        rows = objective.rows(objective.questions(self._judged, 10**12, random.Random(seed)))
        self._size, n = len(rows), objective.quiz.at_once
        parts = [rows[first : first + n] for first in range(0, len(rows), n)]
        longest = max((sum(row.length for row in part) for part in parts), default=0)
        self._budget = tokens + longest - 1

    @property
    def size(self) -> int:
        return self._size

    def exercise(self, drawn: Sequence[Sample], rng: random.Random) -> Exercise | None:
        questions = self._objective.questions(self._judged, self._budget, rng)
        return self._objective.drawn(self._objective.rows(questions)) if questions else None


class Alongside:
    """Questions in the acting prompts: about a good and a flawed command of the same state where
    both are known, and else about as many good as flawed ones of what is imitated.

    episodes  for each episode that is imitated, itself and the copies that `alternatives` made
    share     tokens of questions per token of imitation, at most
    """

    def __init__(
        self, objective: CrossEntropy, episodes: Sequence[Sequence[Episode]], share: float
    ) -> None:
        self._objective, self._share = objective, share
        self._sides: list[dict[int, dict[Verdict, list[Judged]]]] = []
        for copies in episodes:
            own: dict[int, dict[Verdict, list[Judged]]] = defaultdict(
                lambda: {"good": [], "flawed": []}
            )
            for copy in copies:
                for t, step in enumerate(copy.steps):
                    for label in step.labels[:1]:
                        own[t][label.verdict].append(Judged(copy, t, label.verdict))
            self._sides.append(dict(own))

    @property
    def size(self) -> int:
        known = [sides for own in self._sides for sides in own.values()]
        both = sum(all(sides.values()) for sides in known)
        alone = Counter(v for sides in known if not all(sides.values()) for v in sides if sides[v])
        return both + min(alone["good"], alone["flawed"])

    def exercise(self, drawn: Sequence[Sample], rng: random.Random) -> Exercise | None:
        pairs: list[list[Judged]] = []
        alone: dict[Verdict, list[Judged]] = {"good": [], "flawed": []}
        for sample in drawn:
            for t in sample.steps:
                if sides := self._sides[sample.episode].get(t):
                    found = {v: rng.choice(side) for v, side in sides.items() if side}
                    if len(found) == 2:
                        pairs.append(list(found.values()))
                    else:
                        for verdict, one in found.items():
                            alone[verdict].append(one)
        number = min(map(len, alone.values()))
        pairs += map(list, zip(*(rng.sample(side, number) for side in alone.values()), strict=True))
        rng.shuffle(pairs)
        parts = (self._objective.questions(pair, 10**12, rng) for pair in pairs)
        first = next(parts, [])
        budget = self._share * sum(sample.length for sample in drawn)
        budget -= sum(question.added for question in first)
        questions = [*first, *within(budget, parts, lambda question: question.added)]
        return self._objective.drawn(self._objective.rows(questions)) if questions else None


def draw(pools: Sequence[Sequence[Sample]], tokens: int, rng: random.Random) -> list[Sample]:
    """Random samples with about `tokens` tokens, at least one where there are any; every pool is as
    likely as the others."""
    drawn: list[Sample] = []
    used = 0
    filled = [pool for pool in pools if pool]
    while filled and (not drawn or used < tokens):
        one = rng.choice(filled[0] if len(filled) == 1 else rng.choice(filled))
        drawn.append(one)
        used += one.length
    return drawn


def judged(episode: Episode, info: EnvInfo, *, imitate_noise: bool = False) -> Episode:
    """The episode with its own labels, and those of the rules for flawed noise steps without.

    Where the expert does not plan anew, its plan knows nothing of the errors put into it, and a
    step may have nothing left to do: what a rule calls flawed after an error is an error, too, not
    imitated unless they are. Before any error plan and rule disagree, and the step has no label.
    """
    ruled = label_group(Group(episode.ref, (episode,)), ["rule"], info).episodes[0]
    steps, erred = [], False
    for own, by_rule in zip(episode.steps, ruled.steps, strict=True):
        flawed = tuple(label for label in by_rule.labels if label.verdict == "flawed")
        labels, advantage = own.labels or flawed, own.advantage
        if flawed and EXPERT_GOOD in own.labels and not info.replans:
            labels = flawed if erred else ()
            advantage = advantage if imitate_noise or not erred else None
        erred |= EXPERT_GOOD not in own.labels
        steps.append(dataclasses.replace(own, labels=labels, advantage=advantage))
    return dataclasses.replace(episode, steps=tuple(steps))


def alternatives(episode: Episode, transcript: Transcript, prompter: Prompter) -> list[Episode]:
    """For each command that was judged beside one of the episode's, a copy of the episode up to
    there that gives it instead, in the same words (else these would tell good from bad). Only this
    last step has a label."""
    found = []
    unlabelled = tuple(dataclasses.replace(step, labels=()) for step in episode.steps)
    for t, move in enumerate(transcript.moves):
        for command, good in move.command.others:
            written = reply_text(prompter.config, command, unlabelled[t].text)
            reply = prompter.written_ids(written)
            step = dataclasses.replace(
                unlabelled[t],
                command=command,
                text=written,
                action_ids=reply,
                logprobs=(0.0,) * len(reply),
                allowed=None,
                labels=(EXPERT_GOOD if good else OFF_PLAN,),
            )
            found.append(dataclasses.replace(episode, steps=(*unlabelled[:t], step)))
    return found
