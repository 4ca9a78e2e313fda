"""Truth from three callables, against dynamic programming on a small world with chance in it."""

from __future__ import annotations

import functools
import math
import random
from typing import NamedTuple

import pytest

from untwine.diagnose import BranchSettings, true_advantages
from untwine.errors import UntwineError

STATES, ACTIONS, LIMIT = 4, ("left", "stay", "right"), 4


class State(NamedTuple):
    place: int
    left: int  # actions until the limit


class World:
    """Places 0 to 3 with random transitions, ends and rewards, and a random policy; all known."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.luck = random.Random(seed + 1000)
        self.next = {(s, a): self._chances(rng) for s in range(STATES) for a in ACTIONS}
        self.policy = [self._chances(rng, len(ACTIONS)) for _ in range(STATES)]
        self.worth = [rng.random() for _ in range(STATES)]  # R where an episode ends
        self.over = [False, False, False, True]
        self.now = State(0, LIMIT)

    @staticmethod
    def _chances(rng: random.Random, count: int = STATES) -> list[float]:
        parts = [rng.random() ** 2 + 0.02 for _ in range(count)]
        return [p / sum(parts) for p in parts]

    @functools.lru_cache(None)  # noqa: B019 (the world lives as long as its test)
    def action_value(self, state: State, action: str) -> float:
        chances = self.next[state.place, action]
        return math.fsum(p * self.after(State(s, state.left - 1)) for s, p in enumerate(chances))

    def after(self, state: State) -> float:
        ended = self.over[state.place] or state.left == 0
        return self.worth[state.place] if ended else self.value(state)

    def value(self, state: State) -> float:
        pairs = zip(self.policy[state.place], ACTIONS, strict=True)
        return math.fsum(p * self.action_value(state, a) for p, a in pairs)

    def restore(self, state: State) -> int:
        self.now = state
        return state.place

    def step(self, action: str) -> tuple[int, float, bool]:
        (place,) = self.luck.choices(range(STATES), self.next[self.now.place, action])
        self.now = State(place, self.now.left - 1)
        return place, self.worth[place], self.over[place]

    def act(self, place: int) -> str:
        return self.luck.choices(ACTIONS, self.policy[place])[0]


QUESTIONS = [(State(s, left), a) for s in range(3) for a in ACTIONS for left in (1, LIMIT)]


@pytest.mark.parametrize("known_q", [True, False])
def test_intervals_hold_as_often_as_they_say(known_q: bool) -> None:
    """Early stopping included, in 10 worlds of 18 questions: intervals of error 0.2 may miss 36 of
    180 times on average. And they are no wider than they need be."""
    missed = missed_q = missed_v = early = 0
    narrowest = narrowest_q = narrowest_v = 1.0
    for seed in range(10):
        world = World(seed)
        found = true_advantages(
            QUESTIONS,
            restore=world.restore,
            step=world.step,
            act=world.act,
            steps_left=[state.left for state, _ in QUESTIONS],
            probabilities=[
                world.policy[state.place][ACTIONS.index(action)] for state, action in QUESTIONS
            ]
            if known_q
            else None,
            settings=BranchSettings(delta=0.02, error=0.2, branches=128, seed=seed),
        )
        for (state, action), one in zip(QUESTIONS, found, strict=True):
            action_value, value = world.action_value(state, action), world.value(state)
            missed += not one.low <= action_value - value <= one.high
            missed_q += not one.action_value_low <= action_value <= one.action_value_high
            missed_v += not one.value_low <= value <= one.value_high
            narrowest_q = min(narrowest_q, one.action_value_high - one.action_value_low)
            narrowest_v = min(narrowest_v, one.value_high - one.value_low)
            early += one.n < 128
            narrowest = min(narrowest, one.high - one.low)
            assert one.label == "neutral" or one.clear
    assert max(missed, missed_q, missed_v) <= 36
    assert early > 20
    assert narrowest < 0.2
    assert narrowest_q < 0.2
    assert narrowest_v < (0.2 if known_q else 0.5)


def test_estimates_are_unbiased() -> None:
    """With a single look nothing depends on what was seen: means lie around the exact values."""
    world = World(3)
    state, action = State(1, LIMIT), "stay"
    truth = world.action_value(state, action)
    found = true_advantages(
        [(state, action)] * 200,
        restore=world.restore,
        step=world.step,
        act=world.act,
        steps_left=LIMIT,
        settings=BranchSettings(branches=16),
    )
    for name, exact in (
        ("advantage", truth - world.value(state)),
        ("action_value", truth),
        ("value", world.value(state)),
    ):
        values = [getattr(one, name) for one in found]
        mean = math.fsum(values) / len(values)
        error = math.sqrt(math.fsum((v - mean) ** 2 for v in values)) / len(values)
        assert mean == pytest.approx(exact, abs=4 * error)
    q = math.fsum(one.q for one in found) / len(found)
    assert q == pytest.approx(world.policy[1][1], abs=0.05)


def test_an_action_that_is_always_taken_has_no_advantage() -> None:
    world = World(0)
    world.policy[1] = [0.0, 1.0, 0.0]
    for q in ([1.0], None):
        (found,) = true_advantages(
            [(State(1, 2), "stay")],
            restore=world.restore,
            step=world.step,
            act=world.act,
            steps_left=2,
            probabilities=q,
            settings=BranchSettings(branches=64),
        )
        assert found.advantage == 0
        assert found.label == "neutral"
        assert (found.action_value_low, found.action_value_high) == (0, 1)
        assert (found.value_low, found.value_high) == (0, 1)


def test_bad_input() -> None:
    world = World(0)
    ways = {"restore": world.restore, "step": world.step, "act": world.act}
    with pytest.raises(UntwineError, match="1 questions but 2 steps_left"):
        true_advantages([(State(0, 1), "stay")], **ways, steps_left=[1, 1])  # type: ignore[arg-type]
    with pytest.raises(UntwineError, match="at least 1"):
        true_advantages([(State(0, 1), "stay")], **ways, steps_left=0)  # type: ignore[arg-type]
    world.worth = [7.0] * STATES
    with pytest.raises(UntwineError, match=r"a return must lie in \[0, 1\], and `step` gave 7"):
        true_advantages([(State(0, 1), "stay")], **ways, steps_left=1)  # type: ignore[arg-type]
