"""ALFWorld through our protocol."""

from __future__ import annotations

import dataclasses
import pickle
import re
import shutil
from pathlib import Path

import alfworld_cases as cases
import pytest
from rich.console import Console

from untwine.envs.alfworld.env import AlfWorldEnv
from untwine.envs.alfworld.game_file import index_dataset
from untwine.envs.alfworld.games import OfficialGames
from untwine.envs.alfworld.generate import generate
from untwine.envs.alfworld.importing import INDEX_NAME, import_games, read_index
from untwine.envs.protocol import Catalogue, Env
from untwine.envs.registry import get_catalogue, get_family, make_env
from untwine.envs.splits import load_splits
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


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic games in a folder: twelve of two types for training, one of each held out."""
    root = tmp_path_factory.mktemp("written")
    for task in (TYPE, "pick_and_place_simple"):
        for seed in range(12):
            generate(task, seed).write(root / "train")
        for split in ("valid_seen", "valid_unseen"):
            generate(task, 0, split).write(root / split)
    return root


def test_family_keeps_the_protocol(data: Path) -> None:
    family = get_family("alfworld")
    assert isinstance(family.catalogue, Catalogue)
    assert isinstance(family.make({}), Env)
    catalogue = get_catalogue("alfworld", {"data": str(data), "list_commands": True})
    assert isinstance(catalogue, Catalogue)
    assert catalogue.variations(TYPE) == (0, 1, 2)
    assert [catalogue.variations(TYPE, s) for s in ("train", "dev", "test")] == [(0,), (1,), (2,)]


def test_the_built_in_games_are_the_default(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(data))
    for options in (None, {}, {"data": ""}):
        assert len(get_catalogue("alfworld", options).variations(TYPE)) == 680
    env = make_env("alfworld")
    goal, observation = env.reset(TYPE, 679)
    assert "then" in goal or "heat" in goal or "hot" in goal
    for command in env.expert(TYPE, 679) or ():
        observation = env.step(command)
    assert observation.success


def test_official_games_are_those_of_the_variable(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(data))
    assert get_catalogue("alfworld", {"data": "official"}).variations(TYPE) == (0, 1, 2)
    assert make_env("alfworld", {"data": "official"}).reset(TYPE, 2)
    monkeypatch.delenv("ALFWORLD_DATA")
    for call in (make_env, lambda name, options: get_catalogue(name, options).variations(TYPE)):
        with pytest.raises(EnvError, match=r"needs \$ALFWORLD_DATA, which is not set; set it to"):
            call("alfworld", {"data": "official"})


@pytest.mark.parametrize("engine", ["native", "textworld"])
def test_titles_say_what_is_played(data: Path, written: Path, engine: str) -> None:
    suffix = "" if engine == "native" else ", real engine"
    for folder, title in (
        ("", "ALFWorld (synthetic games)"),
        (str(data), "ALFWorld"),
        (str(written), "ALFWorld (synthetic games)"),
    ):
        info = get_catalogue("alfworld", {"engine": engine, "data": folder}).info
        assert (info.title, info.name) == (title + suffix, "alfworld")
        assert info.remote == (engine == "textworld")


def test_kin_is_read_from_the_name_of_the_folder(data: Path, written: Path) -> None:
    catalogue = get_catalogue("alfworld", {"data": str(written)})
    made = [generate(TYPE, seed) for seed in range(12)]
    expected = sorted(f"{game.scene}/{game.obj}/{game.receptacle}" for game in made)
    assert sorted(catalogue.kin(TYPE, v) for v in range(12)) == expected
    other = get_catalogue("alfworld", {"data": str(data)})
    assert other.kin(TYPE, 2) == f"valid_unseen/{TYPE}-X"


def test_sets_of_a_folder_are_computed(written: Path, tmp_path: Path) -> None:
    """By the rule of the packaged file; the checksum belongs to these games."""
    options = {"data": str(written)}
    catalogue = get_catalogue("alfworld", options)
    splits = load_splits("alfworld", "default", options)
    place = "pick_and_place_simple"
    assert splits.held_out_tasks == (TYPE, "pick_two_obj_and_place")
    assert splits.sets["L2"] == {TYPE: (13,)}
    assert (splits.sets["dev"], splits.sets["L1"]) == ({place: (12,)}, {place: (13,)})
    parts = {name: splits.sets[name].get(place, ()) for name in ("train", "L0")}
    assert sorted(parts["train"] + parts["L0"]) == list(range(12))
    kin = {name: {catalogue.kin(place, v) for v in own} for name, own in parts.items()}
    assert not kin["train"] & kin["L0"]
    seen = load_splits("alfworld", "default", options, [place])
    assert seen.sets["L2"] == {place: (13,)}
    assert set(seen.sets["train"]) == {TYPE}
    same, changed = (shutil.copytree(written, tmp_path / name) for name in ("same", "changed"))
    assert load_splits("alfworld", "default", {"data": str(same)}).checksum == splits.checksum
    next((changed / "train").glob("*/*")).rename(changed / "train" / "trial")
    other = load_splits("alfworld", "default", {"data": str(changed)})
    assert len({other.checksum, seen.checksum, splits.checksum}) == 3


def test_built_games_are_shared_by_environments() -> None:
    one, two = make_env("alfworld"), make_env("alfworld")
    one.reset(TYPE, 7)
    two.reset(TYPE, 7)
    assert one._engine.game is two._engine.game  # type: ignore[attr-defined]
    with pytest.raises(EnvError, match="no variation True"):
        one.reset("pick_and_place_simple", True)


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


def test_what_is_carried_may_be_shown() -> None:
    """In the words of the command `inventory`; nothing else changes."""
    plain, shown = make_env("alfworld"), make_env("alfworld", {"observe": "inventory"})
    task = "pick_and_place_simple"
    plan = plain.expert(task, 0)
    assert plan
    first, second = plain.reset(task, 0), shown.reset(task, 0)
    assert first.goal == second.goal
    pairs = [(first.observation, second.observation)]
    pairs += [(plain.step(command), shown.step(command)) for command in ("look", *plan)]
    carried = [ours.text.removeprefix(f"{theirs.text}\n") for theirs, ours in pairs]
    assert carried[0] == "You are not carrying anything."
    for theirs, ours in pairs:
        assert dataclasses.replace(ours, text=theirs.text) == theirs
    taken = next(c for c in plan if c.startswith("take "))
    thing = taken.removeprefix("take ").partition(" from ")[0]
    assert carried[2 + plan.index(taken)] == f"You are carrying: a {thing}."
    assert carried[-1] == "You are not carrying anything."
    # after a snapshot, too, and as the engine itself says
    here = shown.snapshot()
    again = shown.restore(here)
    assert again.text == pairs[-1][1].text
    plain.reset(task, 0)
    for command in plan[: plan.index(taken) + 1]:
        plain.step(command)
    assert plain.step("inventory").text == f"You are carrying: a {thing}."


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
        ({"engine": "textworld", "observe": "inventory"}, "option observe.*native engine only"),
        ({"data": "/nowhere"}, "has no ALFWorld games"),
        ({"dat": "x"}, "no option 'dat'.*Did you mean 'data'"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(EnvError, match=message):
        make_env("alfworld", options).reset(TYPE, 0)


def test_unknown_instances_are_refused(env: AlfWorldEnv) -> None:
    with pytest.raises(EnvError, match=re.escape("no task 'pick_hot'")):
        env.reset("pick_hot", 0)
    with pytest.raises(EnvError, match="no variation 3"):
        env.reset(TYPE, 3)
    with pytest.raises(EnvError, match="call reset"):
        env.step("look")


@pytest.mark.alfworld
def test_the_real_engine_behind_the_same_protocol(data: Path, env: AlfWorldEnv) -> None:
    pytest.importorskip("alfworld.agents", reason="needs the extra alfworld")
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
