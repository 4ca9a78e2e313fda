"""Plans of the oracle: they win, none is shorter, and what cannot be done is said."""

from __future__ import annotations

import random
import re
from pathlib import Path

import alfworld_cases as cases
import pytest

from untwine.envs.alfworld import oracle
from untwine.envs.alfworld.engine import Engine, State, admissible, apply, moves, won
from untwine.envs.alfworld.env import AlfWorldEnv
from untwine.envs.alfworld.game import Game
from untwine.envs.alfworld.game_file import load_game
from untwine.envs.alfworld.oracle import Unreachable, shortest_plan
from untwine.envs.registry import make_env
from untwine.errors import EnvError

_KINDS = {"receptacle": 5, "object": 5}
_APPLIANCES = {"clean": "Sink", "heat": "Microwave", "cool": "Fridge"}


def plays(game: Game, plan: tuple[str, ...]) -> Engine:
    """The engine after the plan, every command of which must be possible."""
    engine = Engine(game)
    for command in plan:
        assert not engine.won
        assert command in engine.admissible()
        engine.step(command)
    return engine


def plain_length(game: Game, most: int) -> int | None:
    """Length of a shortest plan by search over all moves; None when it has more than `most`."""
    seen: set[State] = {game.start}
    front = [game.start]
    for depth in range(most + 1):
        if any(won(game, state) for state in front):
            return depth
        later = []
        for state in front:
            for move in moves(game, state):
                after = apply(game, state, move)
                if after not in seen:
                    seen.add(after)
                    later.append(after)
        front = later
    return None


def small(task: str, seed: int) -> dict[str, object]:
    """A scrambled game with few receptacles and things, so that all moves can be searched."""
    rng = random.Random(f"small/{task}/{seed}")
    tree = cases.scrambled(task, seed)
    problem = str(tree["pddl_problem"])
    names = cases.fixtures()["games"][task]["traj_data"]["pddl_params"]
    wanted = tuple(
        f"{names[key]}_bar_"
        for key in ("object_target", "parent_target", "toggle_target")
        if names[key]
    )
    ids = {kind: set(re.findall(rf"^(\S+) - {kind}$", problem, re.M)) for kind in _KINDS}
    for kind, most in _KINDS.items():
        kept = sorted(x for x in ids[kind] if x.startswith(wanted))[:3]
        if kind == "receptacle":
            needed = _APPLIANCES.get(task.split("_")[1], "-")
            kept += sorted(x for x in ids[kind] if x.startswith(needed))[:1]
        rest = sorted(ids[kind] - set(kept))
        kept += rng.sample(rest, min(len(rest), max(0, most - len(kept))))
        for gone in ids[kind] - set(kept):
            problem = re.sub(rf"^{re.escape(gone)} - {kind}$\n", "", problem, flags=re.M)
            problem = re.sub(rf"\([^()]*{re.escape(gone)}(?=[ )])[^()]*\)\n", "", problem)
    return {**tree, "pddl_problem": problem}


@pytest.mark.parametrize("task", cases.task_types())
def test_plans_win_and_are_not_longer_than_the_walkthrough(task: str, tmp_path: Path) -> None:
    game = load_game(cases.write_fixture(tmp_path, task))
    plan = shortest_plan(game)
    assert plays(game, plan).won
    assert len(plan) <= len(cases.fixtures()["games"][task]["walkthrough"])
    assert plan == shortest_plan(game)


@pytest.mark.parametrize("task", cases.task_types())
def test_no_plan_is_shorter(task: str, tmp_path: Path) -> None:
    lengths = set()
    for seed in range(25):
        game = load_game(cases.write_game(tmp_path / str(seed), small(task, seed)))
        try:
            plan = shortest_plan(game)
        except Unreachable:
            assert plain_length(game, 5) is None, seed
            continue
        assert plays(game, plan).won
        assert len(plan) == plain_length(game, len(plan)), seed
        lengths.add(len(plan))
    assert len(lengths) > 2


@pytest.mark.parametrize("task", cases.task_types())
def test_scrambled_games_are_solved_too(task: str, tmp_path: Path) -> None:
    solved = 0
    for seed in range(20):
        game = load_game(cases.write_game(tmp_path / str(seed), cases.scrambled(task, seed)))
        try:
            plan = shortest_plan(game)
        except Unreachable:
            continue
        assert plays(game, plan).won
        solved += 1
    assert solved > 10


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"\(heatable [^)]*\)", "", "cannot be made hot"),
        (r"\(receptacleType \S+ MicrowaveType\)", "", "nothing here makes tomato 1 hot"),
        (r"\(pickupable Tomato[^)]*\)", "", "tomato 1 cannot be taken"),
        (r"\(canContain \S+ TomatoType\)", "", "does not take tomato 1"),
    ],
)
def test_a_goal_out_of_reach_is_reported(old: str, new: str, message: str, tmp_path: Path) -> None:
    tree = cases.game_tree("pick_heat_then_place_in_recep")
    problem, count = re.subn(old, new, tree["pddl_problem"])
    assert count
    path = cases.write_game(tmp_path, {**tree, "pddl_problem": problem})
    with pytest.raises(Unreachable, match=message):
        shortest_plan(load_game(path))


def changed_goal(task: str, goal: str, folder: Path) -> Game:
    tree = cases.game_tree(task)
    problem = tree["pddl_problem"]
    start = problem.index("(:goal")
    text = f"{problem[:start]}(:goal {goal}))"
    return load_game(cases.write_game(folder, {**tree, "pddl_problem": text}))


def test_goals_of_other_kinds_are_searched_over_all_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "MAX_STATES", 2000)
    task = "pick_and_place_simple"
    held = "(exists (?o - object) (and (objectType ?o StatueType) (holds agent1 ?o)))"
    away = changed_goal(task, f"(and (not (holdsAny agent1)) (not {held}))", tmp_path / "a")
    assert shortest_plan(away) == ()
    full = changed_goal(task, "(holdsAny agent1)", tmp_path / "b")
    plan = shortest_plan(full)
    assert len(plan) == 2
    assert plays(full, plan).won
    never = changed_goal(task, "(and (holdsAny agent1) (not (holdsAny agent1)))", tmp_path / "c")
    with pytest.raises(EnvError, match="no plan within 2000 states"):
        shortest_plan(never)


def test_experts_of_the_environment_are_shortest_plans(tmp_path: Path) -> None:
    task = "pick_heat_then_place_in_recep"
    folder = tmp_path / "train" / f"{task}-X"
    cases.write_fixture(folder / "a", task)
    tree = cases.game_tree(task)
    spoiled = re.sub(r"\(heatable [^)]*\)", "", tree["pddl_problem"])
    trajectory = cases.fixtures()["games"][task]["traj_data"]
    cases.write_game(folder / "b", {**tree, "pddl_problem": spoiled}, trajectory)
    env = make_env("alfworld", {"data": str(tmp_path)})
    assert isinstance(env, AlfWorldEnv)
    game = load_game(folder / "a" / "game.tw-pddl")
    assert env.expert(task, 0) == shortest_plan(game)
    assert shortest_plan(game)[0] in admissible(game, game.start)
    assert env.expert(task, 1) is None
