"""BabyAI as text: the rendering against worlds drawn by hand, the bot, keys and snapshots.

The worlds in pictures are laid out by hand and what is seen in them was worked out by hand. `^>v<`
is the agent, `#` a wall, `D` a closed, `L` a locked and `O` an open door (all blue), `b` a red
ball, `k` a blue key, `x` a green box.
"""

from __future__ import annotations

import pickle
import random
import sys
from typing import Any

import pytest

pytest.importorskip("minigrid", reason="needs the babyai extra")

from minigrid.core.grid import Grid
from minigrid.core.world_object import Ball, Box, Door, Key, Wall
from minigrid.envs.babyai.core.verifier import GoToInstr, ObjDesc

from untwine.envs.babyai import env as env_module
from untwine.envs.babyai import expert, text
from untwine.envs.babyai.catalogue import (
    CATALOGUE,
    HELD_OUT_TASKS,
    LEVELS,
    VARIATIONS,
    class_of,
    wanted_classes,
)
from untwine.envs.babyai.env import BabyAIEnv
from untwine.envs.babyai.level import draw, new_level, world_key
from untwine.envs.pool import EnvPool, ResetRequest, StepRequest
from untwine.envs.protocol import Catalogue, Env, Reset
from untwine.envs.registry import get_family, make_env
from untwine.errors import EnvError
from untwine.records import Observation

TASKS = tuple(LEVELS)


def babyai(**options: Any) -> BabyAIEnv:
    env = get_family("babyai").make(options)
    assert isinstance(env, BabyAIEnv)
    return env


def thing(letter: str) -> Any:
    return {
        "#": Wall, "D": lambda: Door("blue"), "L": lambda: Door("blue", is_locked=True),
        "O": lambda: Door("blue", is_open=True), "b": lambda: Ball("red"),
        "k": lambda: Key("blue"), "x": lambda: Box("green"),
    }[letter]()  # fmt: skip


def drawn(picture: str, carrying: Any = None, goal: str = "ball") -> Any:
    """A level as in the picture, whose mission is to go to the red ball (or the `goal`)."""
    rows = picture.split()
    level = new_level("GoToObjS6", 7)
    level.reset(seed=0)
    level.grid = Grid(len(rows[0]), len(rows))
    level.room_size, level.room_grid[0][0].size = 20, (20, 20)  # one room holds it all
    for y, row in enumerate(rows):
        for x, letter in enumerate(row):
            if letter in ">v<^":
                level.agent_pos, level.agent_dir = (x, y), ">v<^".index(letter)
            elif letter != ".":
                level.grid.set(x, y, thing(letter))
    level.carrying = carrying
    level.instrs = GoToInstr(ObjDesc(goal))
    level.instrs.reset_verifier(level)
    return level


def holding(level: Any) -> BabyAIEnv:
    """An environment in the middle of an episode in this level."""
    env = babyai()
    env.restore(env_module.Snapshot(level, False, False))
    return env


ROOM = """
#######
#b....#
#.....#
#..k..#
#.....#
#..^.x#
#######
"""


@pytest.mark.parametrize(
    ("heading", "seen"),
    [
        (
            "^",
            "You face north. You see a blue key 2 steps forward, a green box 2 steps right, "
            "a red ball 2 steps left and 4 steps forward, a wall 5 steps forward, "
            "a wall 3 steps left, a wall 3 steps right. You carry nothing.",
        ),
        (
            ">",
            "You face east. You see a green box 2 steps forward, a blue key 2 steps left, "
            "a wall 3 steps forward, a wall 1 step right. You carry nothing.",
        ),
        (
            "v",
            "You face south. You see a green box 2 steps left, "
            "a wall 1 step forward, a wall 3 steps left, a wall 3 steps right. You carry nothing.",
        ),
        (
            "<",
            "You face west. You see a blue key 2 steps right, "
            "a wall 3 steps forward, a wall 1 step left. You carry nothing.",
        ),
    ],
)
def test_the_view_worked_out_by_hand(heading: str, seen: str) -> None:
    assert text.describe(drawn(ROOM.replace("^", heading))) == seen


def test_closed_doors_hide_and_open_doors_show() -> None:
    rows = "###{}### #.....# #.....# #..^..#"
    hidden = "#.b.#.. " + rows
    assert "red ball" not in text.describe(drawn(hidden.format("D")))
    assert "a closed blue door 3 steps forward," in text.describe(drawn(hidden.format("D")))
    assert "a locked blue door 3 steps forward," in text.describe(drawn(hidden.format("L")))
    told = text.describe(drawn(hidden.format("O")))
    assert "an open blue door 3 steps forward, a red ball 1 step left and 4 steps forward" in told
    # the closed door is no wall, and the wall behind it is not seen
    assert "wall 3 steps forward" not in told


@pytest.mark.parametrize(
    ("picture", "carrying", "works"),
    [
        ("..... ..^.. .....", None, "turn left/turn right/go forward"),
        ("..#.. ..^.. .....", None, "turn left/turn right"),
        ("..D.. ..^.. .....", None, "turn left/turn right/toggle"),
        ("..L.. ..^.. .....", None, "turn left/turn right"),
        ("..L.. ..^.. .....", "red", "turn left/turn right"),
        ("..L.. ..^.. .....", "blue", "turn left/turn right/toggle"),
        ("..O.. ..^.. .....", "blue", "turn left/turn right/go forward/toggle"),
        ("..b.. ..^.. .....", None, "turn left/turn right/pick up"),
        ("..b.. ..^.. .....", "blue", "turn left/turn right"),
        ("..x.. ..^.. .....", None, "turn left/turn right/pick up/toggle"),
        ("..... ..^.. .....", "blue", "turn left/turn right/go forward/drop"),
    ],
)
def test_admissible_by_hand_and_everything_else_changes_nothing(
    picture: str, carrying: str | None, works: str
) -> None:
    env = holding(drawn(picture + " b....", Key(carrying) if carrying else None))
    assert env.admissible() == tuple(works.split("/"))
    snapshot, before = env.snapshot(), world_key(env.snapshot().level)
    for command in text.COMMANDS:
        env.restore(snapshot)
        after = env.step(command)
        assert after.invalid is None
        changed = after.state_key.removesuffix("|over") != before
        assert changed == (command in works.split("/")), command


@pytest.mark.parametrize(
    ("picture", "command", "answer"),
    [
        ("..#.. ..^..", "go forward", "You can't go forward: a wall is in the way."),
        ("..D.. ..^..", "go forward", "You can't go forward: a closed blue door is in the way."),
        ("..#.. ..^..", "pick up", "You can't pick up a wall."),
        ("..... ..^..", "pick up", "There is nothing in front of you to pick up."),
        ("..... ..^..", "drop", "You carry nothing to drop."),
        ("..... ..^..", "toggle", "There is nothing in front of you to toggle."),
        ("..k.. ..^..", "toggle", "You can't toggle a blue key."),
        ("..L.. ..^..", "toggle", "The blue door is locked; it needs a blue key."),
        ("..D.. ..^..", "toggle", "You open the blue door."),
        ("..O.. ..^..", "toggle", "You close the blue door."),
        ("..x.. ..^..", "toggle", "You open the green box, and it falls apart."),
        ("..k.. ..^..", "pick up", "You pick up the blue key."),
        ("..... ..^..", "go forward", "You go forward."),
    ],
)
def test_answers_to_commands(picture: str, command: str, answer: str) -> None:
    said = holding(drawn(picture + " ..... b....")).step(command).text
    assert said.startswith(answer + " You face north."), said


def test_going_to_the_ball_ends_the_episode() -> None:
    env = holding(drawn("..b.. ..... ..^.."))
    last = env.step("  GO   forward ")
    assert (last.done, last.success, last.outcome, last.score) == (True, True, 1.0, 1.0)
    assert last.text.startswith("You go forward. The mission is accomplished. You face north.")
    assert env.admissible() == ()
    again = env.step("turn left")
    assert (again.state_key, again.done, again.outcome) == (last.state_key, True, 1.0)


def test_a_late_success_is_one() -> None:
    """minigrid would give it less than nothing: its own limit does not count here."""
    env = babyai()
    env.reset("GoToObjS6", 0)
    plan = env.expert("GoToObjS6", 0)
    assert plan
    for _ in range(4 * 50):  # full turns
        assert not env.step("turn left").done
    for command in plan:
        last = env.step(command)
    assert (last.done, last.success, last.outcome) == (True, True, 1.0)


@pytest.mark.parametrize("command", ["", "go", "go north", "pick up ball", "done", "<b>drop</b>"])
def test_unknown_commands_are_invalid_and_change_nothing(command: str) -> None:
    env = babyai()
    start = env.reset("GoToLocalS7N5", 0).observation
    after = env.step(command)
    assert after.invalid == "unknown_command"
    assert after.text == (
        "I don't understand that command; the commands are turn left, turn right, go forward, "
        "pick up, drop, toggle. " + start.text
    )
    assert after.state_key == start.state_key


def test_family_keeps_the_protocol() -> None:
    family = get_family("babyai")
    assert isinstance(family.catalogue, Catalogue)
    assert isinstance(family.make({}), Env)
    assert set(HELD_OUT_TASKS) < set(family.catalogue.tasks())
    listing = make_env("babyai", {"list_commands": True})
    assert "turn left" in (listing.reset("GoToDoor", 0).observation.admissible or ())


@pytest.mark.parametrize("task", TASKS)
def test_the_plan_of_the_bot_solves_the_instance(task: str) -> None:
    env = babyai()
    for variation in (0, 9, 1000, 1100, 1199):
        plan = env.expert(task, variation)
        assert plan is not None
        goal, observation = env.reset(task, variation)
        assert goal
        for command in plan:
            assert not observation.done
            observation = env.step(command)
            assert observation.invalid is None
        assert observation.success
        assert observation.outcome == 1.0


def test_a_bot_that_goes_round_in_circles_or_fails_gives_no_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    level = new_level("UnlockPickup", 7)
    assert expert.solve(level, 0) is not None
    monkeypatch.setattr(expert, "MAX_THOUGHTS", 3)
    assert expert.solve(level, 0) is None
    monkeypatch.undo()
    monkeypatch.setattr(expert, "MAX_PLAN", 3)
    assert expert.solve(level, 0) is None


@pytest.mark.parametrize("task", TASKS)
def test_worlds_of_a_variation_are_of_its_class(task: str) -> None:
    level = new_level(task, 7)
    for variation in (0, 9, 19, 1000, 1100):
        draw(level, variation)
        assert class_of(f"{level.mission}|{world_key(level)}") in wanted_classes(variation)
        again = new_level(task, 7)
        draw(again, variation)
        assert world_key(again) == world_key(level)


def test_no_world_of_one_split_is_in_another() -> None:
    """The smallest level, where the same world comes up again and again."""
    level = new_level("GoToObjS6", 7)
    worlds: dict[str, set[str]] = {"train": set(), "L0": set(), "dev": set(), "test": set()}
    for variation in range(VARIATIONS):
        draw(level, variation)
        name = next(s for s in ("train", "dev", "test") if variation in CATALOGUE.variations(
            "GoToObjS6", s))  # fmt: skip
        if name == "train" and variation % 10 == 9:
            name = "L0"
        worlds[name].add(f"{level.mission}|{world_key(level)}")
    assert sum(map(len, worlds.values())) == len(set.union(*worlds.values()))
    assert len(worlds["test"]) > 50


def walk(env: BabyAIEnv, task: str, variation: int, seed: int) -> list[Observation]:
    rng = random.Random(seed)
    seen = [env.reset(task, variation).observation]
    seen += [env.step(rng.choice([*text.COMMANDS, "dance"])) for _ in range(60)]
    return seen


@pytest.mark.parametrize("task", TASKS)
def test_same_commands_same_observations_and_snapshots(task: str) -> None:
    env = babyai()
    first = walk(env, task, 3, seed=1)
    assert walk(babyai(), task, 3, seed=1) == first
    env.reset(task, 3)
    rng = random.Random(2)
    for _ in range(10):
        env.step(rng.choice(text.COMMANDS))
    snapshot = pickle.loads(pickle.dumps(env.snapshot()))
    commands = [rng.choice(text.COMMANDS) for _ in range(30)]
    expected = [env.step(command) for command in commands]
    for twin in (env, babyai()):
        for _ in range(2):  # the snapshot is not used up
            twin.restore(snapshot)
            assert [twin.step(command) for command in commands] == expected


def test_key_tells_situations_apart_and_knows_equal_ones() -> None:
    room = "..... .b.b. ..^.. ....."
    level = drawn(room)
    env = holding(level)
    start = world_key(level)
    assert env.step("turn left").state_key != start
    assert env.step("turn right").state_key == start
    assert world_key(drawn("..... .b.k. ..^.. .....")) != start
    assert world_key(drawn("..... .b... ..^.. .....")) != start
    assert world_key(drawn(room, Key("blue"))) != world_key(drawn(room, Key("red"))) != start
    # two balls alike: picking up either leaves the other one, but elsewhere
    doors = {world_key(drawn(room.replace(".b.b.", f".b.{d}."))) for d in "DLO"}
    assert len(doors) == 3


def test_key_knows_which_of_two_balls_the_mission_means() -> None:
    """Same look, but in one world only the left ball is meant."""
    both, left = drawn(".b.b. ..^.. ....."), drawn(".b.b. ..^.. .....")
    left.instrs = GoToInstr(ObjDesc("ball", loc="left"))
    left.instrs.reset_verifier(left)
    assert len(left.instrs.desc.obj_set) == 1
    assert text.describe(both) == text.describe(left)
    assert world_key(both) != world_key(left)


def test_key_remembers_which_part_of_the_mission_is_done() -> None:
    """`open A, then open B`: with the first door opened and closed again all looks as before."""
    env = babyai()
    plan = env.expert("OpenTwoDoors", 0)
    assert plan is not None
    first = plan.index("toggle")
    env.reset("OpenTwoDoors", 0)
    for command in plan[:first]:
        before = env.step(command)
    env.step("toggle")
    after = env.step("toggle")
    assert after.text.partition(". ")[2] == before.text.partition(". ")[2]
    assert after.state_key != before.state_key


def test_global_random_state_is_left_alone() -> None:
    random.seed(5)
    before = random.getstate()
    env = babyai()
    env.reset("GoToObjMazeS4R2", 7)
    env.expert("GoToObjMazeS4R2", 7)
    assert random.getstate() == before


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """minigrid prints a line for each rejected draw."""
    env = babyai()
    for variation in range(20):
        env.reset("GoToObjMazeS4R2", variation)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("view", [0, 4, 13, "7", True])
def test_wrong_options_are_refused(view: object) -> None:
    with pytest.raises(EnvError, match="view must be 3, 5, 7, 9 or 11"):
        make_env("babyai", {"view": view})


def test_the_option_view_sets_how_far_one_sees() -> None:
    far = {v: babyai(view=v).reset("GoToRedBall", 1).observation.text for v in (3, 11)}
    assert far[3] != far[11]
    assert len(far[3]) < len(far[11])


def test_without_minigrid_the_tasks_are_known_and_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "minigrid", None)
    family = get_family("babyai")
    assert len(family.catalogue.variations("GoToDoor", "test")) == 100
    with pytest.raises(EnvError, match=r"pip install .*'\.\[babyai\]'"):
        family.make({}).reset("GoToDoor", 0)


def test_wrong_instances_and_wrong_use() -> None:
    env = babyai()
    with pytest.raises(EnvError, match="Did you mean 'GoToDoor'"):
        env.reset("GoToDor", 0)
    for variation in (-1, VARIATIONS):
        with pytest.raises(EnvError, match="variations 0 to 1199"):
            env.reset("GoToDoor", variation)
        with pytest.raises(EnvError, match="variations 0 to 1199"):
            env.expert("GoToDoor", variation)
    with pytest.raises(EnvError, match="reset"):
        env.step("drop")
    env.reset("GoToDoor", 0)
    env.close()
    env.close()
    with pytest.raises(EnvError, match="reset"):
        env.admissible()


def test_spawned_workers_see_what_this_process_sees() -> None:
    env = babyai()
    plans = [env.expert(task, 5) for task in TASKS[:4]]
    with EnvPool("babyai", {}, workers=2, sessions=2, timeout_s=30.0) as pool:
        assert pool.experts([(task, 5) for task in TASKS[:4]]) == plans
        starts = pool.call({slot: ResetRequest(TASKS[slot], 5) for slot in range(4)})
        for slot, answer in starts.items():
            assert isinstance(answer, Reset)
            assert answer == env.reset(TASKS[slot], 5)
            plan = plans[slot]
            assert plan
            for command in plan:
                after = pool.call({slot: StepRequest(command)})[slot]
                assert after == env.step(command)
            assert isinstance(after, Observation)
            assert after.success
        with pytest.raises(EnvError, match="unknown babyai task"):
            pool.call({0: ResetRequest("GoToMars", 0)})
