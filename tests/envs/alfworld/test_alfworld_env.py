"""ALFWorld through our protocol."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import alfworld_cases as cases
import pytest
from rich.console import Console

from untwine.envs.alfworld.env import AlfWorldEnv, OfficialGames
from untwine.envs.alfworld.game_file import index_dataset
from untwine.envs.alfworld.importing import INDEX_NAME, import_games, read_index
from untwine.envs.protocol import Catalogue, Env
from untwine.envs.registry import get_family, make_env
from untwine.errors import EnvError

TYPE = "pick_heat_then_place_in_recep"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alfworld")
    for split in ("train", "valid_seen", "valid_unseen"):
        for task_type in cases.task_types():
            cases.write_fixture(root / "json_2.1.1" / split / f"{task_type}-X" / "t", task_type)
    return root


@pytest.fixture
def env(data: Path) -> AlfWorldEnv:
    env = make_env("alfworld", {"data": str(data)})
    assert isinstance(env, AlfWorldEnv)
    return env


def test_family_keeps_the_protocol(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = get_family("alfworld")
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    assert isinstance(family.catalogue, Catalogue)
    assert family.catalogue.variations(TYPE) == ()
    monkeypatch.setenv("ALFWORLD_DATA", str(data))
    assert family.catalogue.variations(TYPE) == (0, 1, 2)
    assert [family.catalogue.variations(TYPE, s) for s in ("train", "dev", "test")] == [
        (0,), (1,), (2,),
    ]  # fmt: skip
    assert isinstance(family.make({}), Env)


@pytest.mark.parametrize("task", cases.task_types())
def test_an_episode_is_won_by_the_walkthrough(env: AlfWorldEnv, task: str) -> None:
    goal, observation = env.reset(task, 1)
    assert goal == cases.fixtures()["games"][task]["task"] + "."
    assert "Your task is to" not in observation.text
    assert observation.text.startswith("-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the")
    plan = env.expert(task, 1)
    assert plan
    for command in plan:
        assert not observation.done
        assert command in env.admissible()
        observation = env.step(command)
        assert observation.invalid is None
    assert (observation.score, observation.outcome) == (1.0, 1.0)
    assert observation.done
    assert observation.success


def test_a_bad_command_is_invalid_and_changes_nothing(env: AlfWorldEnv) -> None:
    before = env.reset(TYPE, 0).observation
    after = env.step("take the moon")
    assert (after.text, after.invalid) == ("Nothing happens.", "not_admissible")
    assert after.state_key == before.state_key


def test_a_snapshot_gives_the_same_observation(env: AlfWorldEnv, data: Path) -> None:
    env.reset(TYPE, 0)
    seen = env.step(env.admissible()[0])
    snapshot = pickle.loads(pickle.dumps(env.snapshot()))
    assert len(pickle.dumps(snapshot)) < 10_000
    env.step("go to fridge 1")
    other = make_env("alfworld", {"data": str(data)})
    assert env.restore(snapshot) == other.restore(snapshot) == seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "thor"}, "option engine"),
        ({"data": 3}, "option data"),
        ({"data": "/nowhere"}, "has no ALFWorld games"),
        ({"dat": "x"}, "no option 'dat'.*Did you mean 'data'"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(EnvError, match=message):
        make_env("alfworld", options).reset(TYPE, 0)


def test_unknown_instances_are_refused(env: AlfWorldEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvError, match=re.escape("no task 'pick_hot'")):
        env.reset("pick_hot", 0)
    with pytest.raises(EnvError, match="no variation 3"):
        env.reset(TYPE, 3)
    with pytest.raises(EnvError, match="call reset"):
        env.step("look")
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(EnvError, match="no built-in games yet"):
        make_env("alfworld")


@pytest.mark.alfworld
def test_the_real_engine_behind_the_same_protocol(data: Path, env: AlfWorldEnv) -> None:
    pytest.importorskip("alfworld", reason="needs the extra alfworld")
    real = make_env("alfworld", {"data": str(data), "engine": "textworld"})
    ours, theirs = env.reset(TYPE, 0), real.reset(TYPE, 0)
    assert (ours.goal, ours.observation.text) == (theirs.goal, theirs.observation.text)
    plan = env.expert(TYPE, 0) or ()
    for command in (*plan[:2], "nonsense"):
        a, b = env.step(command), real.step(command)
        assert (a.text, a.score, a.done, a.invalid) == (b.text, b.score, b.done, b.invalid)
        assert env.admissible() == real.admissible()
    snapshot = real.snapshot()
    key = real.step("look").state_key
    real.step("go to fridge 1")
    assert real.restore(snapshot).state_key == key
    with pytest.raises(EnvError, match="other engine"):
        env.restore(snapshot)
    real.close()


def test_import_writes_an_index_that_environments_read(data: Path) -> None:
    root = data / "json_2.1.1"
    plain = index_dataset(root)
    index = import_games(data, Console(quiet=True))
    try:
        assert read_index(root) == index == plain
        assert OfficialGames(str(data)).variations(TYPE) == (0, 1, 2)
        (root / INDEX_NAME).write_text('{"format": 1, "games": {"train": {"x": ["../../y"]}}}')
        with pytest.raises(EnvError, match=r"damaged.*untwine games import"):
            OfficialGames(str(data)).variations(TYPE)
    finally:
        (root / INDEX_NAME).unlink()
