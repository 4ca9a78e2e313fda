"""The true advantage of recorded actions, by playing on from their states.

    A*(s, a) = Q(s, a) - V(s)      under one policy, within the steps that are left

An action is the whole reply, token by token, so that what follows reads exactly what it read then.
With q = pi(a|s), V = q Q(s, a) + (1 - q) E[return | another reply], hence

    A*(s, a) = (1 - q) (Q(s, a) - E[return | another reply])

which is the lemma's -r (1 - q) with r = E[return | another reply] - Q(s, a). So replies are drawn
at s until one differs from a; from there, and from s with a, one episode each is played on; and

    x = (1 - q) (return after a  -  return after the other reply)

is an unbiased value of A* in [-(1-q), 1-q]. Against two separate means this leaves out all noise of
episodes that begin alike, which at q near 1 is nearly all of it, and bounds |A*| by 1 - q from the
start. The same pair gives Q and V, both in [0, 1]: the return after a, and

    v = q (return after a)  +  (1 - q) (return after the other reply)

Under nucleus sampling q is not known; then x is 0 when the reply drawn is a itself, and the plain
difference otherwise, which has the same mean; V is Q - A*.

Where several recorded steps share state key and command, each draw is made at one of them taken at
random, so pairs begin at step i as often as 1 - q_i says. With the mean q in place of q_i in x, its
mean is then that of the steps' A*; and Q and V are the steps' means weighted by 1 - q_i, which keep
V = q Q + (1 - q) E[return | another reply] and A* = Q - V.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from untwine.diagnose.betting import evidence, mean_bounds
from untwine.policy.choices import Choices
from untwine.policy.sampler import Sample, Sampler
from untwine.records import Episode, Group
from untwine.rollout import Collector, RolloutStats, Start

Verdict3 = Literal["good", "flawed", "neutral"]

FIRST_LOOK = 16
_DRAWS = 16  # replies drawn at a state, at most this many times the pairs wanted
_WAVES = 8  # episodes held in memory at once, in multiples of the pool's slots


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A recorded step to go on from.

    action      its reply
    admissible  commands it could choose among, where the choice is constrained
    q           probability of the reply under the policy that plays on
    """

    start: Start
    action: Sample
    admissible: tuple[str, ...] | None
    q: float


@dataclass(frozen=True, slots=True)
class Settings:
    """What counts as clear, and what it may cost.

    delta     |A*| up to this is neutral
    error     each interval is wrong with probability at most this, early stopping included
    branches  pairs of continuations per question, at most
    returns   what counts as the return of an episode
    """

    delta: float = 0.05
    error: float = 0.05
    branches: int = 256
    returns: Literal["outcome", "success"] = "outcome"
    seed: int = 0

    def looks(self) -> list[int]:
        """Numbers of pairs after which the verdict is looked at: 16, 32, 64, ..., `branches`."""
        looks = [min(FIRST_LOOK, self.branches)]
        while looks[-1] < self.branches:
            looks.append(min(2 * looks[-1], self.branches))
        return looks


@dataclass(frozen=True, slots=True)
class Estimate:
    """What branching found about one action.

    advantage  estimate of A*, within [low, high]
    value, action_value   V(s) and Q(s, a); None when no pair was played. Each has an interval of
                          its own, as likely to be right as that of A*; 0 to 1 without a pair
    q          mean probability of the action under the policy
    n          pairs of continuations
    label      flawed: high < -delta; good: low > delta; neutral: the rest
    clear      more pairs could hardly change the label
    confidence 1 - p of the label, at any time; None for neutral
    """

    advantage: float
    low: float
    high: float
    value: float | None
    action_value: float | None
    q: float
    n: int
    label: Verdict3
    clear: bool
    confidence: float | None
    action_value_low: float
    action_value_high: float
    value_low: float
    value_high: float


def judge(
    values: Sequence[float],
    after_action: Sequence[float],
    q: float,
    settings: Settings,
    *,
    known_q: bool,
) -> Estimate:
    """The estimate from values x of A*.

    values        within [-(1 - q), 1 - q] and one for each pair if `known_q`, else within [-1, 1]
                  and also one for each reply that was the action
    after_action  the return after the action, of each pair that was played; in [0, 1]
    q             probability of the action
    """
    error, planned, delta = settings.error, settings.branches, settings.delta
    most = 1.0 - q if known_q else 1.0
    low, high = mean_bounds(values, -most, most, error=error, planned=planned)
    label: Verdict3 = "flawed" if high < -delta else "good" if low > delta else "neutral"
    doubt = None
    if label != "neutral":
        mean = -delta if label == "flawed" else delta
        sides = evidence(values, -most, most, mean, error=error, planned=planned)
        doubt = sides[label == "flawed"]
    advantage = sum(values) / len(values) if values else 0.0
    action_value = sum(after_action) / len(after_action) if after_action else None
    return Estimate(
        advantage=advantage,
        low=low,
        high=high,
        value=None if action_value is None else action_value - advantage,
        action_value=action_value,
        q=q,
        n=len(values),
        label=label,
        clear=label != "neutral" or (low >= -delta and high <= delta),
        confidence=None if doubt is None else 1.0 - doubt,
        **_value_bounds(values, after_action, settings, known_q=known_q),
    )


def _value_bounds(
    values: Sequence[float], after_action: Sequence[float], settings: Settings, *, known_q: bool
) -> dict[str, float]:
    """Bounds of Q and V. Without q, V = Q - A* shares the permitted error between the two."""
    error, planned = settings.error, settings.branches

    def bounds(found: Sequence[float], low: float, error: float) -> tuple[float, float]:
        return mean_bounds(found, low, 1.0, error=error, planned=planned)

    low, high = bounds(after_action, 0.0, error)
    if known_q:
        mixed = [a - x for a, x in zip(after_action, values, strict=True)]
        value_low, value_high = bounds(mixed, 0.0, error)
    else:
        a_low, a_high = bounds(after_action, 0.0, error / 2)
        x_low, x_high = bounds(values, -1.0, error / 2)
        value_low, value_high = max(0.0, a_low - x_high), min(1.0, a_high - x_low)
    return {
        "action_value_low": low,
        "action_value_high": high,
        "value_low": value_low,
        "value_high": value_high,
    }


@dataclass(slots=True)
class _Tally:
    """One question and what is known so far."""

    occurrences: Sequence[Occurrence]
    rng: random.Random
    known_q: bool
    values: list[float] = field(default_factory=list)
    after_action: list[float] = field(default_factory=list)
    drawn: int = 0
    failed: bool = False
    closed: bool = False

    @property
    def q(self) -> float:
        """Mean over the occurrences."""
        return sum(o.q for o in self.occurrences) / len(self.occurrences)

    def reserve(self) -> int:
        """The place of a value that is still to be played for, so that values stand in the order
        of the draws, whatever they are: the bounds need that."""
        self.values.append(math.nan)
        return len(self.values) - 1

    def fill(self, place: int, after_action: float, after_other: float) -> None:
        share = 1.0 - self.q if self.known_q else 1.0
        self.values[place] = share * (after_action - after_other)
        self.after_action.append(after_action)

    def judge(self, settings: Settings) -> Estimate:
        return judge(self.values, self.after_action, self.q, settings, known_q=self.known_q)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A reply that differs from the action, waiting to be played beside it."""

    tally: _Tally
    place: int
    occurrence: Occurrence
    other: Sample

    def starts(self) -> tuple[Start, Start]:
        start = self.occurrence.start
        return (
            dataclasses.replace(start, reply=self.occurrence.action),
            dataclasses.replace(start, reply=self.other),
        )


class Brancher:
    """Plays on from recorded steps with one policy.

    stats   what it cost so far
    """

    def __init__(self, collector: Collector, settings: Settings) -> None:
        self.collector = collector
        self.settings = settings
        self.stats = RolloutStats()
        self.episodes = 0
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._sampler = Sampler(collector.policy, collector.sampling, self._generator)
        self._known_q = collector.sampling.top_p >= 1.0

    @property
    def computed_tokens(self) -> int:
        """Tokens read to draw replies at the states, beside those in `stats`."""
        return self._sampler.computed_tokens

    def estimate(
        self,
        questions: Sequence[Sequence[Occurrence]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Estimate | None]:
        """One estimate for each question; None where an environment did not come back to the
        state. A question is one or several occurrences of the same action in the same state.

        on_progress   called with (questions answered, questions in all); may raise to stop
        """
        tallies = [
            _Tally(occurrences, random.Random(f"{self.settings.seed}/{i}"), self._known_q)
            for i, occurrences in enumerate(questions)
        ]
        for n in self.settings.looks():
            live = [t for t in tallies if not (t.closed or t.failed)]
            if on_progress:
                on_progress(len(tallies) - len(live), len(tallies))
            pairs = self._draw(live, n)
            self._play(pairs)
            for tally in live:
                out_of_draws = len(tally.values) < n
                tally.closed = tally.failed or out_of_draws or tally.judge(self.settings).clear
        return [None if tally.failed else tally.judge(self.settings) for tally in tallies]

    def _draw(self, tallies: Sequence[_Tally], n: int) -> list[_Pair]:
        """Replies at the states until every tally can come to `n` values, or has drawn too often.
        Prompts stay in the sampler's cache from draw to draw."""
        pairs: list[_Pair] = []
        missing = [n - len(tally.values) for tally in tallies]
        while rows := list(self._rows(tallies, missing)):
            occurrences = [tallies[i].rng.choice(tallies[i].occurrences) for i in rows]
            prompts = {r: o.start.conversation.prompt_ids for r, o in enumerate(occurrences)}
            choices = {
                r: node for r, o in enumerate(occurrences) if (node := self._choices(o)) is not None
            }
            samples = self._sampler.sample(prompts, choices or None)
            for row, (i, occurrence) in enumerate(zip(rows, occurrences, strict=True)):
                tally, sample = tallies[i], samples[row]
                tally.drawn += 1
                self.stats.sampled_tokens += len(sample.ids)
                if missing[i] <= 0:
                    continue
                if sample.ids != occurrence.action.ids:
                    pairs.append(_Pair(tally, tally.reserve(), occurrence, sample))
                elif self._known_q:
                    continue
                else:
                    tally.values.append(0.0)
                missing[i] -= 1
        return pairs

    def _choices(self, occurrence: Occurrence) -> Choices | None:
        start = occurrence.start
        return self.collector.choices_among(occurrence.admissible, start.ref, len(start.steps))

    def _rows(self, tallies: Sequence[_Tally], missing: Sequence[int]) -> Iterator[int]:
        """Which tally each row of the next draw is for; about a poolful of rows."""
        most = _DRAWS * self.settings.branches
        needy = [i for i, tally in enumerate(tallies) if missing[i] > 0 and tally.drawn < most]
        slots = self.collector.pool.slots
        share = max(1, slots // max(1, len(needy)))
        for i in needy[:slots]:
            for _ in range(min(share, missing[i], most - tallies[i].drawn)):
                yield i

    def _play(self, pairs: Sequence[_Pair]) -> None:
        wave = max(1, _WAVES * self.collector.pool.slots // 2)
        for first in range(0, len(pairs), wave):
            part = pairs[first : first + wave]
            starts = [start for pair in part for start in pair.starts()]
            episodes, stats = self.collector.play_on(starts, self._generator)
            self.episodes += len(starts)
            _add(self.stats, stats)
            for pair, action, other in zip(part, episodes[::2], episodes[1::2], strict=True):
                if action is None or other is None:
                    pair.tally.failed = True
                else:
                    pair.tally.fill(pair.place, self._return(action), self._return(other))

    def _return(self, episode: Episode) -> float:
        return Group(episode.ref, (episode,), self.settings.returns).returns_G[0]


def _add(total: RolloutStats, part: RolloutStats) -> None:
    for f in dataclasses.fields(RolloutStats):
        setattr(total, f.name, getattr(total, f.name) + getattr(part, f.name))
