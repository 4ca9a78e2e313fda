"""Synthetic games: each can be won, a seed always gives the same, the real engine agrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from untwine.envs.alfworld.engine import Engine
from untwine.envs.alfworld.game_file import TASK_TYPES, index_dataset, load_game, read_game_file
from untwine.envs.alfworld.generate import ATTEMPTS, draw_game, generate, scenes_of, solved
from untwine.errors import EnvError


@pytest.mark.parametrize("task", TASK_TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_games_are_won_by_their_walkthrough(task: str, seed: int, tmp_path: Path) -> None:
    made = generate(task, seed)
    path = made.write(tmp_path / "train")
    game = load_game(path)
    assert game == made.build()
    engine = Engine(game)
    assert not engine.won
    for command in made.walkthrough:
        assert engine.step(command).valid
    assert engine.won
    file = read_game_file(path)
    assert (file.task_type, file.scene, file.walkthrough) == (task, made.scene, made.walkthrough)
    assert index_dataset(tmp_path).games["train"] == {task: (path,)}


def test_a_seed_gives_one_game_and_seeds_differ() -> None:
    task = "pick_cool_then_place_in_recep"
    assert generate(task, 1) == generate(task, 1)
    assert len({generate(task, seed).problem for seed in range(4)}) == 4
    # fixed, so that a change of the games is noticed
    assert generate(task, 1).task_id == "synthetic_train_16_e451b8e095"


def test_one_attempt_needs_no_oracle_and_has_a_generator_of_its_own() -> None:
    task = "pick_clean_then_place_in_recep"
    drawn = [draw_game(task, "train", seed) for seed in range(ATTEMPTS, 2 * ATTEMPTS)]
    assert drawn[3] == draw_game(task, "train", ATTEMPTS + 3)
    assert not any(game.walkthrough for game in drawn if game)
    checked = [solved(game) for game in drawn if game]
    assert next(game for game in checked if game) == generate(task, 1)
    assert len({game.digest for game in drawn if game}) == sum(map(bool, drawn))


@pytest.mark.parametrize("task", TASK_TYPES)
def test_unseen_rooms_are_in_no_other_split(task: str) -> None:
    unseen = set(scenes_of(task, "valid_unseen"))
    assert unseen
    assert not unseen & {*scenes_of(task, "train"), *scenes_of(task, "valid_seen")}
    assert generate(task, 0, "valid_unseen").scene in unseen


def test_the_room_can_be_chosen() -> None:
    assert generate("pick_and_place_simple", 0, scene=7).scene == 7


@pytest.mark.parametrize(
    ("task", "split", "scene", "message"),
    [
        ("pick_hot", "train", None, "no task type 'pick_hot'"),
        ("pick_and_place_simple", "tran", None, "no split 'tran'.*Did you mean 'train'"),
        ("pick_and_place_simple", "train", 1, "no room 1 in train"),
    ],
)
def test_bad_arguments_are_one_sentence(
    task: str, split: str, scene: int | None, message: str
) -> None:
    with pytest.raises(EnvError, match=message):
        generate(task, 0, split, scene)


@pytest.mark.alfworld
@pytest.mark.parametrize("task", TASK_TYPES)
def test_the_real_engine_loads_and_wins_them(task: str, tmp_path: Path) -> None:
    pytest.importorskip("alfworld.agents", reason="needs the extra alfworld")
    from untwine.envs.alfworld.stock import StockEngine

    made = generate(task, 5)
    real, ours = StockEngine(made.write(tmp_path)), Engine(made.build())
    assert real.reset() == ours.reset()
    for command in made.walkthrough:
        assert real.step(command) == ours.step(command)
        assert real.admissible() == ours.admissible()
    assert ours.won
    real.close()
