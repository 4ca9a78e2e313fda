"""Verdict data: questions about labelled actions, balanced, deduplicated and within a budget.

verdict_questions   is this action good or bad?        answers good, bad
pair_questions      which of these two is better?      answers A, B
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from untwine.batch import Row, completion_row
from untwine.config.gcd import Contrast
from untwine.errors import ModelError
from untwine.gcd.labels import action_key, agreed_verdict
from untwine.own_code import is_own
from untwine.prompting.prompter import PAIR_WORDS, VERDICT_WORDS, Prompter, action_as_shown
from untwine.records import Episode, Verdict
from untwine.scoring import Targets


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its right answer.

    prompt_ids  ids of the question
    answer      key of the right word: good or flawed, or first or second
    kind        kind of the first label of the action asked about (of a pair: of the flawed one)
    shared      tokens at the beginning of the prompt that the policy's update computes, too; where
                both are computed in one pass, they cost nothing
    """

    prompt_ids: tuple[int, ...]
    answer: str
    kind: str
    shared: int = 0

    @property
    def added(self) -> int:
        """Tokens that the question adds to such a pass."""
        return len(self.prompt_ids) - self.shared


Cost = Callable[[Question], float]  # tokens computed for a question; inf: it cannot be asked


@dataclass(frozen=True, slots=True)
class Judged:
    """A step whose labels agree, standing for all equal ones."""

    episode: Episode
    t: int
    verdict: Verdict

    @property
    def kind(self) -> str:
        return self.episode.steps[self.t].labels[0].kind


Draw = Callable[[Sequence[Judged], Prompter, int, Cost, random.Random], list[Question]]


def judged_steps(episodes: Iterable[Episode]) -> list[Judged]:
    """One step for each task instance, state and action with a verdict, in order of appearance.

    Steps without a label are left out, and so are those whose labels disagree, in one step or
    between equal ones.
    """
    first_seen: dict[tuple[str, str, str], tuple[Episode, int]] = {}
    verdicts: dict[tuple[str, str, str], set[Verdict]] = defaultdict(set)
    for episode in episodes:
        for t, step in enumerate(episode.steps):
            if labels := {label.verdict for label in step.labels}:
                key = (str(episode.ref), step.state_key, action_key(step))
                if agreed_verdict(step):
                    first_seen.setdefault(key, (episode, t))
                verdicts[key] |= labels
    return [
        Judged(*first_seen[key], next(iter(found)))
        for key, found in verdicts.items()
        if len(found) == 1
    ]


def why_no_questions(episodes: Iterable[Episode], objective: str) -> str:
    """Why the objective asks nothing about these episodes, and what to change."""
    verdicts = Counter(judged.verdict for judged in judged_steps(episodes))
    good, flawed = verdicts["good"], verdicts["flawed"]
    if is_own(objective):  # only its author knows
        why = f"{objective} made nothing of them"
    elif good and flawed:
        why = (
            "no state has both kinds, or a question is longer than gcd.token_budget or the model "
            "allow"
        )
    else:
        why = "both kinds are needed: add a source to gcd.labels or lower gcd.min_confidence"
    return f"{good} distinct actions are labelled good, {flawed} flawed; {why}"


def verdict_questions(
    judged: Sequence[Judged],
    prompter: Prompter,
    budget: int,
    cost: Cost,
    rng: random.Random,
    contrast: Contrast = "random",
) -> list[Question]:
    """Whether actions are good: as many good ones as flawed ones, paired as `contrast` says, until
    `budget` tokens are used. Returns [] when one class is empty."""
    drawn = balanced(judged, rng, contrast)
    pairs = ([_asked(j, prompter) for j in (good, flawed)] for good, flawed in drawn)
    return within(budget, pairs, cost)


def pair_questions(
    judged: Sequence[Judged], prompter: Prompter, budget: int, cost: Cost, rng: random.Random
) -> list[Question]:
    """Which of two actions in one state is better: every good one against every flawed one of the
    state, drawn at random, until `budget` tokens are used. They are shown with the past of the
    flawed one, as what makes it flawed (`repeat`, `undo`) may lie there. The better one comes first
    in every other question. Returns [] when no state has both kinds."""
    states: dict[tuple[str, str], dict[Verdict, list[Judged]]] = {}
    for j in judged:
        step = j.episode.steps[j.t]
        kinds = states.setdefault((str(j.episode.ref), step.state_key), {"good": [], "flawed": []})
        kinds[j.verdict].append(j)
    pairs = [
        (good, flawed)
        for kinds in states.values()
        for good in kinds["good"]
        for flawed in kinds["flawed"]
    ]
    rng.shuffle(pairs)
    first = rng.random() < 0.5

    def questions() -> Iterator[list[Question]]:
        for number, (good, flawed) in enumerate(pairs):
            good_first = first == (number % 2 == 0)
            shown = [good, flawed] if good_first else [flawed, good]
            ids = prompter.pair_ids(flawed.episode, flawed.t, *(_action(j) for j in shown))
            yield [Question(ids, "first" if good_first else "second", flawed.kind)]

    return within(budget, questions(), cost)


def balanced(
    judged: Sequence[Judged], rng: random.Random, contrast: Contrast = "random"
) -> list[tuple[Judged, Judged]]:
    """(good, flawed) steps, as many pairs as the rarer class has steps.

    random   paired at random
    similar  commands of the same words, in two states, first; then those with the largest share of
             words in common (of all words of the two, each counted once); ties at random
    """
    classes: dict[Verdict, list[Judged]] = {"good": [], "flawed": []}
    for j in judged:
        classes[j.verdict].append(j)
    for steps in classes.values():
        rng.shuffle(steps)
    if contrast == "random":
        return list(zip(classes["good"], classes["flawed"], strict=False))
    good, flawed = (_by_words(classes[verdict]) for verdict in ("good", "flawed"))
    nearest_first = sorted(
        ((one, other) for one in good for other in flawed),
        key=lambda pair: len(pair[0] & pair[1]) / max(1, len(pair[0] | pair[1])),
        reverse=True,
    )
    pairs: list[tuple[Judged, Judged]] = []
    for one, other in nearest_first:
        while good[one] and flawed[other]:
            pairs.append((good[one].pop(), flawed[other].pop()))
    return pairs


def _by_words(steps: Iterable[Judged]) -> dict[frozenset[str], list[Judged]]:
    """The steps by the words of their actions."""
    found: dict[frozenset[str], list[Judged]] = defaultdict(list)
    for j in steps:
        found[frozenset(_action(j).lower().split())].append(j)
    return found


def within(budget: float, parts: Iterable[list[Question]], cost: Cost) -> list[Question]:
    """Whole parts, in order, until the next one would exceed `budget` tokens; without those that
    cannot be asked."""
    taken: list[Question] = []
    used = 0.0
    for part in parts:
        tokens = sum(map(cost, part))
        if tokens == math.inf:
            continue
        used += tokens
        if used > budget:
            break
        taken += part
    return taken


class Words:
    """The two answers to a kind of question as token ids, for one tokenizer."""

    def __init__(self, prompter: Prompter, words: Mapping[str, str] = VERDICT_WORDS) -> None:
        self.ids = {answer: prompter.chat.word_ids(word) for answer, word in words.items()}
        self.texts = dict(words)
        one, other = (ids[0] for ids in self.ids.values())
        if one == other:
            shown = " and ".join(words.values())
            raise ModelError(f"this tokenizer begins the answers {shown} with the same token")

    @property
    def longest(self) -> int:
        return max(map(len, self.ids.values()))

    def rows(self, questions: Sequence[Question]) -> list[Row]:
        """Rows whose cross-entropy is a mean over the questions."""
        return [
            completion_row(q.prompt_ids, self.ids[q.answer], 1.0 / len(questions))
            for q in questions
        ]

    def correct(self, rows: Sequence[Row], targets: Targets) -> int:
        """How many rows of `rows` put more weight on the right word than on the wrong one."""
        one, other = (ids[0] for ids in self.ids.values())
        firsts = np.cumsum([0, *(len(row.targets) for row in rows[:-1])])
        logits_nV = targets.logits(firsts.tolist())
        says_one = (logits_nV[:, one] > logits_nV[:, other]).tolist()
        wanted = [int(row.ids[row.targets[0]]) == one for row in rows]
        return sum(x == y for x, y in zip(says_one, wanted, strict=True))


@dataclass(frozen=True, slots=True)
class Quiz:
    """A kind of question: how it is drawn, its answers, and how many come together, as many with
    either answer."""

    draw: Draw
    answers: Mapping[str, str]
    at_once: int = 1

    def words(self, prompter: Prompter) -> Words:
        return Words(prompter, self.answers)


VERDICTS = Quiz(verdict_questions, VERDICT_WORDS, at_once=2)
SIMILAR = Quiz(partial(verdict_questions, contrast="similar"), VERDICT_WORDS, at_once=2)
PAIRS = Quiz(pair_questions, PAIR_WORDS)


def answer_loss(targets: Targets) -> torch.Tensor:
    """Cross-entropy on the answers' tokens, weighted (form `ce` of docs/methods/gcd.md)."""
    return -(targets.weights_N * targets.logprobs_N).sum()


def _asked(judged: Judged, prompter: Prompter) -> Question:
    step = judged.episode.steps[judged.t]
    follows = prompter.config.verdict == "after" and step.advantage is not None
    shared = len(step.prompt_ids) if follows else 0
    ids = prompter.verdict_ids(judged.episode, judged.t)
    return Question(ids, judged.verdict, judged.kind, shared)


def _action(judged: Judged) -> str:
    step = judged.episode.steps[judged.t]
    return action_as_shown(step.command, step.text)
