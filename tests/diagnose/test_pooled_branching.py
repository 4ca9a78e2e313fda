"""Steps judged together whose probabilities differ: against exact dynamic programming.

The same state is reached with two pasts. The policy reads its past, so it takes the judged action
with another probability, and plays on in another way, after each of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.builders import make_episode, make_step
from untwine.config import SamplingConfig
from untwine.diagnose import branching
from untwine.diagnose.branching import Brancher, Estimate, Occurrence, Settings
from untwine.policy.sampler import Sample
from untwine.records import Episode
from untwine.rollout import RolloutStats

ACTIONS = (0, 1, 2)
JUDGED = 0
PLACES = 2  # where the first action can lead


class World:
    """First an action, which leads to one of two places; then one more, which wins or does not."""

    def __init__(self, seed: int, pasts: int = 2) -> None:
        rng = random.Random(seed)

        def chances(first: float) -> list[float]:
            rest = [rng.random() + 0.1 for _ in ACTIONS[1:]]
            return [first, *((1 - first) * x / sum(rest) for x in rest)]

        # from a likely action to an unlikely one
        likely = (0.9, 0.06, 0.5)[:pasts]
        self.first = [chances(q) for q in likely]
        self.then = [[chances(rng.random()) for _ in range(PLACES)] for _ in likely]
        self.leads = [rng.random() for _ in ACTIONS]  # to place 1
        self.wins = [[rng.random() for _ in ACTIONS] for _ in range(PLACES)]
        self.luck = random.Random(seed + 1000)

    def action_value(self, past: int, action: int) -> float:
        at = [
            math.fsum(map(math.prod, zip(self.then[past][place], self.wins[place], strict=True)))
            for place in range(PLACES)
        ]
        return (1 - self.leads[action]) * at[0] + self.leads[action] * at[1]

    def value(self, past: int) -> float:
        return math.fsum(self.first[past][a] * self.action_value(past, a) for a in ACTIONS)

    def advantage(self, past: int) -> float:
        return self.action_value(past, JUDGED) - self.value(past)

    def play(self, past: int, action: int) -> float:
        place = int(self.luck.random() < self.leads[action])
        (then,) = self.luck.choices(ACTIONS, self.then[past][place])
        return float(self.luck.random() < self.wins[place][then])


@dataclass(frozen=True)
class Begin:
    """What branching reads of a start; the prompt is the past."""

    conversation: Any
    reply: Any = None
    ref: Any = None
    steps: tuple[Any, ...] = ()


def reply(action: int) -> Sample:
    return replace(Sample((0,), (0.0,), None), ids=(action,))


class Collector:
    """Draws and plays in the world above."""

    def __init__(self, world: World, top_p: float) -> None:
        self.world = world
        self.pool = SimpleNamespace(slots=8)
        self.policy = None
        self.sampling = SamplingConfig(top_p=top_p)

    def choices_among(self, *_: Any) -> None:
        return None

    def play_on(self, starts: Sequence[Begin], _: Any) -> tuple[list[Episode], RolloutStats]:
        won = [self.world.play(s.conversation.prompt_ids[0], s.reply.ids[0]) for s in starts]
        return [make_episode(r, [make_step()]) for r in won], RolloutStats()


class Drawer:
    computed_tokens = 0

    def __init__(self, world: World) -> None:
        self._world = world

    def sample(self, prompts: dict[int, tuple[int, ...]], _: Any) -> dict[int, Sample]:
        luck, first = self._world.luck, self._world.first
        return {r: reply(luck.choices(ACTIONS, first[past])[0]) for r, (past,) in prompts.items()}


def estimate(
    monkeypatch: pytest.MonkeyPatch, world: World, settings: Settings, top_p: float = 1.0
) -> Estimate:
    monkeypatch.setattr(branching, "Sampler", lambda *_: Drawer(world))
    brancher = Brancher(Collector(world, top_p), settings)  # type: ignore[arg-type]
    question = [
        Occurrence(
            Begin(SimpleNamespace(prompt_ids=(past,))),  # type: ignore[arg-type]
            reply(JUDGED),
            None,
            first[JUDGED],
        )
        for past, first in enumerate(world.first)
    ]
    (found,) = brancher.estimate([question])
    assert found is not None
    return found


def pooled(world: World) -> tuple[float, float, float]:
    """A*, Q and V of steps judged together, as branching.py defines them: A* is the plain mean; Q
    and V weigh each step with the chance that another reply is drawn there."""
    pasts = range(len(world.first))
    rest = [1 - world.first[p][JUDGED] for p in pasts]
    advantage = math.fsum(world.advantage(p) for p in pasts) / len(rest)
    weighed = math.fsum(r * world.action_value(p, JUDGED) for r, p in zip(rest, pasts, strict=True))
    action_value = weighed / sum(rest)
    return advantage, action_value, action_value - advantage


@pytest.mark.parametrize("top_p", [1.0, 0.9999])
@pytest.mark.parametrize("pasts", [2, 3])
def test_intervals_hold_as_often_as_they_say(
    monkeypatch: pytest.MonkeyPatch, top_p: float, pasts: int
) -> None:
    """Early stopping included: of 120 intervals of error 0.2, 24 may miss on average."""
    settings = Settings(delta=0.05, error=0.2, branches=128)
    missed = [0, 0, 0]
    labels = set()
    for seed in range(120):
        world = World(seed, pasts)
        found = estimate(monkeypatch, world, replace(settings, seed=seed), top_p)
        intervals = (
            (found.low, found.high),
            (found.action_value_low, found.action_value_high),
            (found.value_low, found.value_high),
        )
        truths = pooled(world)
        for k, ((low, high), exact) in enumerate(zip(intervals, truths, strict=True)):
            missed[k] += not low - 1e-9 <= exact <= high + 1e-9
        if found.label != "neutral":
            labels.add(found.label)
    assert max(missed) <= 24
    assert labels == {"good", "flawed"} or top_p < 1


def test_the_mean_is_the_plain_one_and_not_weighted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pairs in a world where the two differ most: weights 1 - q of the pairs, and again in
    each value, would count the unlikely step twice over."""
    world = max((World(seed) for seed in range(200)), key=lambda w: abs(gap(w)))
    settings = Settings(delta=1.0, error=0.05, branches=40000)
    monkeypatch.setattr(Settings, "looks", lambda self: [self.branches])
    advantage, action_value, value = pooled(world)
    found = estimate(monkeypatch, world, settings)
    assert found.n == 40000
    assert abs(gap(world)) > 0.1
    assert found.advantage == pytest.approx(advantage, abs=0.01)
    assert found.action_value == pytest.approx(action_value, abs=0.01)
    assert found.value == pytest.approx(value, abs=0.015)
    assert found.q == pytest.approx((0.9 + 0.06) / 2)


def gap(world: World) -> float:
    """Between A* with weights twice over and the plain mean."""
    rest = [1 - first[JUDGED] for first in world.first]
    both = [world.advantage(p) for p in range(len(rest))]
    twice = math.fsum(map(math.prod, zip(rest, both, strict=True))) / sum(rest)
    return twice - math.fsum(both) / len(both)
