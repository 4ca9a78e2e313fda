"""Steps that lead away from the goal, in `untwine diagnose calibration`: against a search of our
own, and on ALFWorld as worked out by hand."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders import make_step
from tests.diagnose.untwine_ledge_env import WAYS, LedgeEnv
from untwine.config import make_recipe
from untwine.diagnose.measure_calibration import calibrate_run
from untwine.diagnose.tables import print_calibration
from untwine.envs import registry
from untwine.envs.protocol import Env
from untwine.envs.registry import make_env
from untwine.episodes import write_groups
from untwine.progress import Display
from untwine.records import Episode, Group, Label, Step, TaskRef

JUDGED = (Label("branch", "flawed", "advantage", 0.9),)  # says nothing about the kind


@pytest.fixture
def ledges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    registry.register_family("ledges", "tests.diagnose.untwine_ledge_env:FAMILY")


def play(env: Env, ref: TaskRef, commands: Sequence[str], id: str) -> Episode:
    """What would be on record if these commands had been given."""
    seen = env.reset(ref.task, ref.variation).observation
    steps: list[Step] = []
    for t, command in enumerate(commands):
        after = env.step(command)
        steps.append(
            make_step(
                t, state=seen.state_key, after=after.state_key, command=command,
                reward=after.score - seen.score, done=after.done, labels=JUDGED,
                invalid=after.invalid,
            )
        )  # fmt: skip
        seen = after
        if seen.done:
            break
    won = seen.success
    return Episode(
        id, ref, "goal", tuple(steps), float(won), float(won), won, "success" if won else "limit"
    )


def run_of(folder: Path, env: dict[str, Any], groups: list[Group]) -> Path:
    """A run directory with nothing but a recipe and episodes."""
    (folder / "episodes").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "hand", "env": env}))
    write_groups(folder / "episodes" / "iter-000000.jsonl.gz", groups)
    return folder


def calibrated(run: Path, env: dict[str, Any]) -> dict[str, Any]:
    recipe = make_recipe({"name": "hand", "env": env})
    return calibrate_run(run, recipe, Display(quiet=True), labels="branch")


def steps_by_kind(numbers: dict[str, Any]) -> dict[str, int]:
    return {k: m["steps"] for k, m in numbers["methods"]["grpo"]["by_kind"].items()}


def distances() -> dict[str, int]:
    """Commands to G from each room that has a way there: breadth first, from G backwards, over
    what the environment's `step` does."""
    arrows: dict[str, set[str]] = {}
    for room, ways in WAYS.items():
        for command in ways:
            env = LedgeEnv({"starts": room})
            env.reset("climb", 0)
            arrows.setdefault(env.step(command).state_key, set()).add(room)
    found, queue = {"G": 0}, deque(["G"])
    while queue:
        room = queue.popleft()
        for before in arrows.get(room, ()):
            if before not in found:
                found[before] = found[room] + 1
                queue.append(before)
    return found


def test_kinds_are_those_of_a_search(ledges: None, tmp_path: Path) -> None:
    """Random walks. Which rule applies to a step is worked out here again."""
    env, rng = LedgeEnv({}), random.Random(0)
    groups = []
    for variation in range(3):
        ref = TaskRef("ledges", "climb", variation)
        walks = [rng.choices(["left", "right", "down", "jump"], k=5) for _ in range(6)]
        groups.append(
            Group(ref, tuple(play(env, ref, w, f"{ref}-{i}") for i, w in enumerate(walks)))
        )
    left = distances()
    expected: dict[str, int] = {}
    for episode in (e for group in groups for e in group.episodes):
        path = [s.state_key for s in episode.steps]
        for t, step in enumerate(episode.steps):
            here, there = step.state_key, step.next_state_key
            if there == "G":
                kind = "progress"
            elif there == "X":
                kind = "fatal"
            elif here == there:
                alike = any(p == here and s.command == step.command
                            for p, s in zip(path[:t], episode.steps, strict=False))  # fmt: skip
                kind = "repeat" if alike else "no_effect"
            elif t and there == path[t - 1]:
                kind = "undo"
            elif here not in left:
                kind = "other"  # nothing to lose
            elif there not in left:
                kind = "lost"
            else:
                kind = "expert" if left[there] < left[here] else "off_plan"
            expected[kind] = expected.get(kind, 0) + 1
    assert {"off_plan", "expert", "lost", "undo"} <= expected.keys()
    chosen = {"name": "ledges"}
    numbers = calibrated(run_of(tmp_path / "run", chosen, groups), chosen)
    assert numbers["plans"]["abstained"] is None
    assert steps_by_kind(numbers) == expected
    assert numbers["plans"]["mismatches"] == 0
    assert numbers["plans"]["steps"] >= expected["off_plan"]


def test_an_environment_that_changed_says_nothing(
    ledges: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = TaskRef("ledges", "climb", 0)
    walk = play(LedgeEnv({}), ref, ["right", "left", "left"], "e0")
    other = {"name": "ledges", "options": {"starts": "E"}}
    numbers = calibrated(run_of(tmp_path / "run", other, [Group(ref, (walk,))]), other)
    assert steps_by_kind(numbers) == {"other": 2, "undo": 1}
    assert numbers["plans"]["mismatches"] == 1
    print_calibration(numbers)
    assert "episodes that went otherwise: 1" in " ".join(capsys.readouterr().out.split())


def test_an_environment_that_cannot_plan_anew_abstains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ref = TaskRef("rooms", "fetch", 0)
    env = make_env("rooms", {})
    walk = play(env, ref, ["go north", "go south", "go east", "go west"], "e0")
    chosen = {"name": "rooms"}
    numbers = calibrated(run_of(tmp_path / "run", chosen, [Group(ref, (walk,))]), chosen)
    assert not {"off_plan", "expert", "lost"} & steps_by_kind(numbers).keys()
    assert "other" in steps_by_kind(numbers)
    assert "cannot plan from every state" in numbers["plans"]["abstained"]
    print_calibration(numbers)
    assert "cannot plan from every state" in " ".join(capsys.readouterr().out.split())
    json.dumps(numbers)


def test_alfworld_worked_out_by_hand(tmp_path: Path) -> None:
    """The shortest plan is followed, except that the agent first walks to a place that is not on
    it: whatever is planned, it still has to go to the first place of the plan, so the plan is no
    shorter."""
    ref = TaskRef("alfworld", "pick_and_place_simple", 3)
    env = make_env("alfworld", {"list_commands": True})
    env.reset(ref.task, ref.variation)
    plan = env.expert(ref.task, ref.variation)
    assert plan is not None
    assert plan[0].startswith("go to ")
    aside = next(c for c in env.admissible() if c.startswith("go to ") and c not in plan)
    walks = [plan, (aside, *plan), ("look", *plan), (*plan[:1], aside, *plan[0:])]
    episodes = tuple(play(env, ref, walk, f"e{i}") for i, walk in enumerate(walks))
    assert all(e.success for e in episodes)
    chosen = {"name": "alfworld"}
    numbers = calibrated(run_of(tmp_path / "run", chosen, [Group(ref, episodes)]), chosen)
    kinds = steps_by_kind(numbers)
    # three walks in full, less the last step that makes progress; in the fourth the agent comes
    # back, which is nearer again
    assert kinds["progress"] == 4
    assert kinds["off_plan"] == 1 + 1 + 1  # aside, look, aside
    assert sum(kinds.values()) == sum(e.length for e in episodes)
    assert kinds["expert"] + kinds.get("undo", 0) == sum(kinds.values()) - 7
