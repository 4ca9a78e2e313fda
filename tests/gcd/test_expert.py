"""Expert labels: a planner on a line worked out by hand, native ALFWorld, one known way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.builders import make_episode, make_step
from untwine.config import Recipe, make_recipe
from untwine.demonstrations import demonstration, play_experts
from untwine.envs.guiding import Advice, advice_along
from untwine.envs.pool import AdviceRequest, EnvPool
from untwine.envs.protocol import Reset
from untwine.envs.registry import make_env
from untwine.errors import ConfigError, EnvError
from untwine.gcd.sources.expert import ExpertSource, plan_labels
from untwine.gcd.sources.protocol import Bench
from untwine.progress import Display
from untwine.records import Episode, Group, Label, Observation, TaskRef


class Line:
    """Stand on a line; 3 is the goal, -1 a pit without return. Counts its plans."""

    def __init__(self) -> None:
        self.at, self.plans = 0, 0

    def reset(self, task: str, variation: int) -> Reset:
        self.at = 0
        return Reset("go to 3", self._seen())

    def step(self, command: str) -> Observation:
        self.at += {"right": 1, "left": -1, "fall": -100}.get(command, 0)
        return self._seen()

    def plan(self) -> tuple[str, ...] | None:
        self.plans += 1
        return None if self.at < 0 else ("right",) * (3 - self.at)

    def _seen(self) -> Observation:
        won = self.at == 3
        return Observation("here", str(self.at), float(won), float(won), won, won)


def test_advice_on_a_line() -> None:
    env: Any = Line()
    known: Any = {}
    commands = ["right", "left", "wait", "right", "right", "right", "right"]
    way = advice_along(env, "t", 0, commands, known)
    assert [a.left for a in way] == [3, 2, 3, 3, 2, 1, 0]  # it ends with the goal
    assert env.plans == 3  # each state once
    way = advice_along(env, "t", 0, ["right", "fall", "right"], known)
    assert [a.left for a in way] == [3, 2, None, None]


def on_line(*moves: tuple[str | None, int, int]) -> Episode:
    steps = [
        make_step(t, state=str(a), after=str(b), command=c, invalid=None if c else "empty")
        for t, (c, a, b) in enumerate(moves)
    ]
    return make_episode(0.0, steps)


def kinds(labels: list[Label | None]) -> list[tuple[str, str] | None]:
    return [x and (x.verdict, x.kind) for x in labels]


def test_labels_on_a_line() -> None:
    episode = on_line(
        ("right", 0, 1), ("left", 1, 0), (None, 0, 0), ("wait", 0, 0), ("fall", 0, -100),
        ("right", -100, -99),
    )  # fmt: skip
    env: Any = Line()
    commands = [s.command for s in episode.steps if s.command]
    way = advice_along(env, "t", 0, commands, {})
    off = ("flawed", "off_plan")
    assert kinds(plan_labels(episode, way)) == [
        ("good", "expert"), off, off, off, ("flawed", "lost"), None,
    ]  # fmt: skip


def test_a_state_that_is_not_the_one_on_record_ends_the_labels() -> None:
    episode = on_line(("right", 0, 1), ("right", 1, 2), ("right", 2, 3))
    way = [Advice("0", 3), Advice("1", 2), Advice("other", 1), Advice("3", 0)]
    assert kinds(plan_labels(episode, way)) == [("good", "expert"), None, None]


def test_an_expert_that_searches() -> None:
    moves = [("open box", 0, 1), ("open bin", 1, 2), ("open box", 2, 3), ("take it", 3, 4)]
    episode = on_line(*moves)
    way = [
        Advice("0", 5, "open bin", lucky=True),  # any new box would do
        Advice("1", 5, "go on"),  # another command is due, and the plan gets shorter: luck
        Advice("2", 4, "open chest", lucky=True),  # this box has been opened
        Advice("3", 4),
        Advice("4", 4),
    ]
    assert kinds(plan_labels(episode, way)) == [
        ("good", "expert"), None, ("flawed", "off_plan"), ("flawed", "off_plan"),
    ]  # fmt: skip


def bench(pool: EnvPool, **gcd: Any) -> Bench:
    recipe: Recipe = make_recipe({"gcd": gcd})
    return Bench(recipe, pool, None, Path(), Display(quiet=True))


def transcript_group(pool: EnvPool, policy: Any, ref: TaskRef, **options: Any) -> Group:
    from untwine.config import PromptConfig
    from untwine.prompting.prompter import Prompter

    (found,) = play_experts(pool, [ref], 60, **options)
    return Group(ref, (demonstration(found, Prompter(policy.chat, PromptConfig())),))


ALFWORLD = TaskRef("alfworld", "pick_and_place_simple", 3)


def test_alfworld_oracle_is_good_at_every_step(policy: Any) -> None:
    with EnvPool("alfworld", {}, workers=0, sessions=2, timeout_s=60) as pool:
        group = transcript_group(pool, policy, ALFWORLD)
        (table,), counts = ExpertSource(bench(pool)).label([group], 0)
        assert set(kinds(table[0])) == {("good", "expert")}
        assert counts["expert_mismatches"] == 0
        # errors of a demonstrator who wanders are judged as it judges them itself
        wandering = transcript_group(pool, policy, ALFWORLD, noise=0.5, seed=2)
        (table,), _ = ExpertSource(bench(pool)).label([wandering], 0)
        steps = wandering.episodes[0].steps
        own = [s.labels[0].verdict if s.labels else None for s in steps]
        assert "flawed" in own
        found = [x and x.verdict for x in table[0]]
        for mine, theirs, step in zip(own, found, steps, strict=True):
            if mine is not None:
                assert mine == theirs, step.command


def test_alfworld_expert_that_searches_agrees_with_itself(policy: Any) -> None:
    with EnvPool("alfworld", {}, workers=0, sessions=2, timeout_s=60) as pool:
        ref = next(
            TaskRef("alfworld", "pick_and_place_simple", k)
            for k in range(12)
            if play_experts(
                pool, [TaskRef("alfworld", "pick_and_place_simple", k)], 60, expert="search"
            )
        )
        group = transcript_group(pool, policy, ref, expert="search")
        (table,), _ = ExpertSource(bench(pool, expert="search")).label([group], 0)
        assert set(kinds(table[0])) == {("good", "expert")}


def test_workers_give_the_same_advice() -> None:
    env = make_env("alfworld", {})
    env.reset(ALFWORLD.task, ALFWORLD.variation)
    commands = env.expert(ALFWORLD.task, ALFWORLD.variation)
    assert commands
    request = AdviceRequest(ALFWORLD.task, ALFWORLD.variation, ("look", *commands))
    with EnvPool("alfworld", {}, workers=1, sessions=1, timeout_s=60) as pool:
        (way,) = pool.advice([request])
    n = len(commands)
    assert [a.left for a in way] == [n, n, *range(n - 1, -1, -1)]


def test_one_way_only(policy: Any) -> None:
    """In `rooms`, which cannot plan from anywhere."""
    ref = TaskRef("rooms", "fetch", 5)
    with EnvPool("rooms", {}, workers=0, sessions=2, timeout_s=60) as pool:
        group = transcript_group(pool, policy, ref)
        source = ExpertSource(bench(pool))
        (table,), _ = source.label([group], 0)
        assert set(kinds(table[0])) == {("good", "expert")}
        keys = [s.state_key for s in group.episodes[0].steps]
        steps = [
            make_step(0, state=keys[1], after=keys[0]),
            make_step(1, state=keys[1], after=keys[1]),
            make_step(2, state=keys[1], after="elsewhere"),
            make_step(3, state="elsewhere", after=keys[1]),
        ]
        (table,), _ = source.label([Group(ref, (make_episode(0.0, steps, ref=ref),))], 1)
    off = ("flawed", "off_plan")
    assert kinds(table[0]) == [off, off, ("flawed", "off_expert"), None]
    left = table[0][2]
    assert left is not None
    assert left.confidence == 0.5


def test_experts_that_are_not_there() -> None:
    with EnvPool("rooms", {}, workers=0, sessions=1, timeout_s=60) as pool:
        with pytest.raises(ConfigError, match=r"set gcd\.expert: oracle"):
            ExpertSource(bench(pool, expert="search"))
        with pytest.raises(EnvError, match="no expert that can start anywhere"):
            pool.advice([AdviceRequest("fetch", 0, ())])
