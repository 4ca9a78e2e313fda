"""The native engine against transcripts of the real one, and its own promises.

The transcripts in data/ were recorded from alfworld 0.4.2 (record_transcripts.py), so this needs
no extra.
"""

from __future__ import annotations

import gc
import json
import pickle
import random
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import alfworld_cases as cases
import pytest
from record_transcripts import checksum, games

from untwine.envs.alfworld import engine as engine_module
from untwine.envs.alfworld.engine import (
    Engine,
    State,
    admissible,
    apply,
    command_of,
    moves,
    parse,
    state_key,
    won,
)
from untwine.envs.alfworld.game import Game
from untwine.envs.alfworld.game_file import load_game

TRANSCRIPTS: dict[str, list[list[Any]]] = json.loads(
    (cases.DATA / "transcripts.json").read_text(encoding="utf-8")
)


@pytest.fixture(params=cases.task_types())
def game(request: pytest.FixtureRequest, tmp_path: Path) -> Game:
    return load_game(cases.write_fixture(tmp_path, request.param))


def wandered(game: Game, seed: int, length: int = 60) -> Engine:
    engine = Engine(game)
    for command in cases.walk(engine, "eager", seed, length):
        engine.step(command)
    return engine


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_says_what_the_real_engine_said(name: str, tmp_path: Path) -> None:
    engine = Engine(load_game(cases.write_game(tmp_path, games()[name])))
    for command, text, is_won, listed in TRANSCRIPTS[name]:
        turn = engine.reset() if command is None else engine.step(command)
        found = engine.admissible()
        assert (turn.text, turn.won, turn.score) == (text, is_won, int(is_won))
        assert (list(found) if isinstance(listed, list) else checksum(found)) == listed


def test_transcripts_show_wins_and_every_kind_of_command() -> None:
    rows = [row for rows in TRANSCRIPTS.values() for row in rows]
    solved = [name for name in cases.task_types() if any(row[2] for row in TRANSCRIPTS[name])]
    assert solved == list(cases.task_types())
    verbs = {row[0].split()[0] for row in rows if row[0] and row[1] != engine_module.NOTHING}
    assert verbs >= {"go", "open", "close", "take", "move", "put", "clean", "heat", "cool", "use"}
    assert verbs >= {"slice", "examine", "look", "inventory", "help"}
    assert sum(row[1] == engine_module.NOTHING for row in rows) > 50


def test_every_listed_command_is_understood_and_no_other(game: Game) -> None:
    for seed in range(5):
        engine = wandered(game, seed, 30)
        listed = engine.admissible()
        assert list(listed) == sorted(set(listed))
        for command in listed:
            move = parse(game, engine.state, command)
            assert move is not None
            assert command_of(game, move) == command
        # every pair of names with every verb: what is understood is what is listed
        names = (*game.things, *game.receptacles)
        tried = {
            f"{verb} {a}" for verb in ("go to", "open", "close", "examine", "use") for a in names
        }
        tried |= {f"take {a} from {b}" for a in names for b in names}
        tried |= {f"move {a} to {b}" for a in names for b in names}
        for verb in ("clean", "heat", "cool", "slice"):
            tried |= {f"{verb} {a} with {b}" for a in names for b in names}
        understood = {c for c in tried if parse(game, engine.state, c) is not None}
        assert understood == set(listed) - {"look", "inventory", "help"}


def test_a_snapshot_returns_to_the_same_future(game: Game) -> None:
    engine = wandered(game, 1, 20)
    snapshot, key = engine.snapshot(), engine.key()
    first = [(c, engine.step(c)) for c in cases.walk(engine, "random", 5, 25)]
    engine.restore(snapshot)
    assert engine.key() == key
    assert [(c, engine.step(c)) for c, _ in first] == first


def test_states_and_games_survive_pickling(game: Game) -> None:
    engine = wandered(game, 2)
    other = Engine(pickle.loads(pickle.dumps(game)))
    assert other.game == game
    other.restore(pickle.loads(pickle.dumps(engine.snapshot())))
    for command in cases.walk(engine, "eager", 9, 20):
        assert engine.step(command) == other.step(command)
        assert engine.admissible() == other.admissible()


def test_threads_share_a_game(game: Game) -> None:
    def walk(seed: int) -> list[Any]:
        engine = Engine(game)
        return [(c, engine.step(c), engine.key()) for c in cases.walk(engine, "eager", seed, 80)]

    expected = [walk(seed) for seed in range(8)]
    found: list[list[Any]] = [[] for _ in expected]

    def run(seed: int) -> None:
        found[seed] = walk(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_keys_are_equal_exactly_when_states_are(game: Game) -> None:
    by_key: dict[str, State] = {}
    for seed in range(10):
        engine = Engine(game)
        for command in cases.walk(engine, "eager", seed, 60):
            engine.step(command)
            assert by_key.setdefault(engine.key(), engine.state) == engine.state
    assert len(by_key) == len(set(by_key.values()))


def test_taking_and_putting_back_is_the_same_state(game: Game) -> None:
    engine = Engine(game)
    undone = 0
    for command in cases.walk(engine, "random", 3, 200):
        engine.step(command)
        for move in list(moves(game, engine.state)):
            if move.verb == "take" and move.first in game.start.near[engine.state.location]:
                taken = apply(game, engine.state, move)
                back = move._replace(verb="put")
                if back in moves(game, taken):
                    put = apply(game, taken, back)
                    assert state_key(game, put) == state_key(game, engine.state)
                    undone += 1
    assert undone


def test_goal_agrees_with_a_plain_evaluation_of_the_formula(game: Game, tmp_path: Path) -> None:
    """The grounded goal against nested loops over the facts of the state."""
    from untwine.envs.alfworld.problem import read_problem

    task_type = next(t for t in cases.task_types() if cases_match(game, t, tmp_path))
    problem = read_problem(cases.game_tree(task_type)["pddl_problem"], "x")
    for seed in range(3):
        engine = Engine(game)
        plan = cases.game_tree(task_type)["walkthrough"]
        for command in [*plan, *cases.walk(engine, "eager", seed, 25)]:
            engine.step(command)
            assert won(game, engine.state) == formula_holds(problem, game, engine.state)


def cases_match(game: Game, task_type: str, folder: Path) -> bool:
    return load_game(cases.write_fixture(folder / task_type, task_type)) == game


def formula_holds(problem: Any, game: Game, state: State) -> bool:
    from untwine.envs.alfworld.problem import Atom, Junction, Not

    facts = {f for f in problem.facts if f[0] not in ("inreceptacle", "atlocation")}
    facts |= {
        ("inreceptacle", game.thing_ids[o], game.receptacle_ids[r])
        for r, row in enumerate(state.contents)
        for o in row
    }
    facts |= {("holds", game.agent_id, game.thing_ids[o]) for o in state.held}
    facts.add(("atlocation", game.agent_id, game.location_ids[state.location]))
    for name, bits in (("clean", state.clean), ("hot", state.hot), ("cool", state.cool)):
        facts |= {(f"is{name}", x) for i, x in enumerate(game.thing_ids) if bits >> i & 1}
    facts |= {("istoggled", x) for i, x in enumerate(game.thing_ids) if state.toggled >> i & 1}
    domain: dict[str, list[str]] = {}
    for name in {x for f in problem.facts for x in f[1:]}:
        domain.setdefault(problem.objects[name], []).append(name)

    def holds(part: Any, scope: dict[str, str]) -> bool:
        if isinstance(part, Atom):
            arguments = [scope.get(x, x) for x in part.arguments]
            if part.predicate == "=":
                return arguments[0] == arguments[1]
            return (part.predicate, *arguments) in facts
        if isinstance(part, Not):
            return not holds(part.part, scope)
        if isinstance(part, Junction):
            return (all if part.kind == "and" else any)(holds(p, scope) for p in part.parts)
        if not part.variables:
            return holds(part.part, scope)
        (name, kind), *rest = part.variables
        inner = type(part)(part.kind, tuple(rest), part.part)
        quantifier = any if part.kind == "exists" else all
        return quantifier(holds(inner, {**scope, name: x}) for x in domain[kind])

    return holds(problem.goal, {})


def test_live_games_are_small(game: Game) -> None:
    engine = wandered(game, 4)
    state = pickle.dumps(engine.snapshot())
    gc.collect()
    tracemalloc.start()
    kept = []
    for _ in range(100):
        other = Engine(game)
        other.restore(pickle.loads(state))
        other.admissible()
        kept.append(other)
    used = tracemalloc.get_traced_memory()[0] / len(kept)
    tracemalloc.stop()
    assert used < 200_000


def test_admissible_is_a_function_of_the_state(game: Game) -> None:
    engine = wandered(game, 6)
    rng = random.Random(0)
    for _ in range(20):
        before = engine.admissible()
        engine.step(rng.choice(("look", "inventory", "help", "Look", "nonsense")))
        assert engine.admissible() == before == admissible(game, engine.state)
