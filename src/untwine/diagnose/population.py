"""The steps of an episode file as a population: their kinds, and samples of them with weights."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from untwine.batch import Row, microbatches, policy_rows
from untwine.envs.protocol import EnvInfo
from untwine.errors import ConfigError
from untwine.gcd.labels import action_key, rule_labels
from untwine.policy.loading import Policy
from untwine.records import Episode, Group, Step, TaskRef
from untwine.scoring import score

Stratum = Literal["", "kind", "position"]
POSITIONS = ("early", "middle", "late")
_RETURNS_ONLY = ("group", "branch")  # sources whose labels say nothing about the kind
UNKNOWN_KIND = "other"
PairKey = tuple[int, str, str]


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One step of an episode file.

    group     number of its group in the file
    t         index in the episode
    kind      what the rules say of it (invalid, repeat, no_effect, undo, setback, fatal, progress),
              else the kind of a label on record that looks at the action, else `other`
    position  third of its episode: early, middle, late
    """

    group: int
    episode: Episode
    t: int
    kind: str
    position: str

    @property
    def step(self) -> Step:
        return self.episode.steps[self.t]

    @property
    def pair(self) -> PairKey:
        """Equal for steps with the same action in the same state of the same task instance."""
        return self.group, self.step.state_key, action_key(self.step)


def recorded_steps(groups: Sequence[Group], info: EnvInfo) -> list[RecordedStep]:
    """All steps of all groups, in order."""
    return [
        RecordedStep(
            number,
            episode,
            t,
            _kind(step, label.kind if (label := rules[t]) else None),
            POSITIONS[3 * t // episode.length],
        )
        for number, group in enumerate(groups)
        for episode, rules in zip(group.episodes, rule_labels(group, info), strict=True)
        for t, step in enumerate(episode.steps)
    ]


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once: positions as they follow each other, kinds by the alphabet."""
    return sorted(
        set(names), key=lambda name: (POSITIONS.index(name) if name in POSITIONS else -1, name)
    )


def _kind(step: Step, rule: str | None) -> str:
    seen = (label.kind for label in step.labels if label.source not in _RETURNS_ONLY)
    return rule or next(seen, UNKNOWN_KIND)


def draw_steps(
    steps: Sequence[RecordedStep], count: int, rng: random.Random, stratified: Stratum = ""
) -> list[tuple[RecordedStep, float]]:
    """`count` different steps, each with the number of steps it stands for (the inverse of its
    chance to be drawn, so weighted sums over the sample are unbiased for sums over all).

    Without strata every step has the same chance. With strata (`kind` or `position`) each of them
    gets an equal share of `count`, and what a small one cannot use goes to the others. ConfigError
    when `count` is too small for one step of each.
    """
    strata: dict[str, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        strata[getattr(step, stratified) if stratified else ""].append(i)
    if not steps or count < len(strata):
        raise ConfigError(
            f"{count} steps cannot be drawn from {len(steps)} in {len(strata)} strata; "
            f"raise --steps to at least {max(len(strata), 1)}"
        )
    drawn: dict[int, float] = {}
    left = min(count, len(steps))
    by_size = sorted(strata.items(), key=lambda item: (len(item[1]), item[0]))
    for number, (_, members) in enumerate(by_size):
        share = min(len(members), left // (len(by_size) - number))
        left -= share
        drawn |= {i: len(members) / share for i in rng.sample(members, share)}
    return [(steps[i], drawn[i]) for i in sorted(drawn)]


@torch.no_grad()
def action_logprobs(
    policy: Policy, steps: Sequence[Step], temperature: float, budget: int
) -> list[float]:
    """log pi(a|s) of each step's reply: the sum over its tokens, at this temperature, over the ids
    each was chosen from.

    budget   padded tokens per forward pass
    """
    numbers: dict[int, int] = {}
    rows: list[Row] = []
    for i, step in enumerate(steps):
        for row in policy_rows([_alone(step)], "token"):
            numbers[id(row)] = i
            rows.append(row)
    logprobs = [0.0] * len(steps)  # a reply without a choice has no row
    for batch in microbatches(rows, budget):
        found_N = score(policy, batch, temperature).logprobs_N.double()
        first = 0
        for row in batch:
            after = first + len(row.targets)
            logprobs[numbers[id(row)]] = float(found_N[first:after].sum())
            first = after
    return logprobs


def _alone(step: Step) -> Group:
    """A group of one episode of one step."""
    ref = TaskRef("", "", 0)
    steps = (dataclasses.replace(step, advantage=1.0),)
    return Group(ref, (Episode("", ref, "", steps, 0.0, 0.0, False, "limit"),))
