"""The built-in games: as many as promised, disjoint, checked, and the same in every process."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from untwine.config import EnvConfig
from untwine.envs.alfworld import generate, pack
from untwine.envs.alfworld.engine import Engine
from untwine.envs.alfworld.game_file import TASK_TYPES, load_game, read_game_file
from untwine.envs.alfworld.oracle import shortest_plan
from untwine.envs.alfworld.pack import FOLDER, PackGames, draw_pack, pack_bytes, read_pack
from untwine.envs.protocol import Split
from untwine.envs.registry import make_env
from untwine.envs.splits import load_splits, write_default_splits
from untwine.errors import EnvError
from untwine.workshop import open_pool

SPLITS: dict[Split, range] = {
    "train": range(600),
    "dev": range(600, 640),
    "test": range(640, 680),
}
HEAT = "pick_heat_then_place_in_recep"
SMALL: dict[Split, int] = {"train": 3, "dev": 2, "test": 1}


@pytest.fixture(scope="module")
def games() -> PackGames:
    return PackGames()


@pytest.fixture(scope="module")
def lines() -> dict[tuple[str, str], list[list[str]]]:
    """The pack as plain text, read without the code under test."""
    tree = json.loads((FOLDER / "pack.json").read_text())
    return {(x["task"], x["split"]): [row.split() for row in x["games"]] for x in tree["lines"]}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    pack.write_pack(tmp_path, SMALL)
    return tmp_path


def won_by(commands: tuple[str, ...], engine: Engine) -> bool:
    engine.reset()
    return not engine.won and all(engine.step(command).valid for command in commands) and engine.won


def test_counts(games: PackGames, lines: dict[tuple[str, str], list[list[str]]]) -> None:
    for task in TASK_TYPES:
        assert games.variations(task) == tuple(range(680))
        for split, numbers in SPLITS.items():
            assert games.variations(task, split) == tuple(numbers)
            assert len(lines[task, split]) == len(numbers)
    assert sum(map(len, lines.values())) == 4080
    assert len({row[4] for rows in lines.values() for row in rows}) == 4080


def test_sets_share_no_room_object_and_target(
    lines: dict[tuple[str, str], list[list[str]]],
) -> None:
    """Not even as another task type."""
    splits = load_splits("alfworld", "default")
    rows = {
        (task, variation): row
        for task in TASK_TYPES
        for variation, row in enumerate(itertools.chain(*(lines[task, s] for s in SPLITS)))
    }
    kin = {
        name: {tuple(rows[task, v][1:4]) for task, own in tasks.items() for v in own}
        for name, tasks in splits.sets.items()
    }
    assert list(kin) == ["train", "L0", "dev", "L1", "L2"]
    assert [len(kin[name]) for name in ("dev", "L1", "L2")] == [160, 160, 80]
    for one, other in itertools.combinations(kin, 2):
        assert not kin[one] & kin[other], (one, other)
    share = len(kin["L0"]) / len(kin["L0"] | kin["train"])
    assert 0.08 < share < 0.12


@pytest.mark.parametrize("held_out", list(itertools.combinations(TASK_TYPES, 2))[::3])
def test_sets_are_disjoint_whatever_is_held_out(games: PackGames, held_out: tuple[str]) -> None:
    splits = load_splits("alfworld", "default", {}, held_out)
    assert set(splits.sets["L2"]) == set(held_out)
    owner: dict[str, str] = {}
    for name, tasks in splits.sets.items():
        for task, variations in tasks.items():
            for variation in variations:
                assert owner.setdefault(games.kin(task, variation), name) == name


def test_unseen_rooms(lines: dict[tuple[str, str], list[list[str]]]) -> None:
    rooms = {
        split: {int(row[1]) for task in TASK_TYPES for row in lines[task, split]}
        for split in SPLITS
    }
    assert not rooms["test"] & (rooms["train"] | rooms["dev"])
    assert {room % 100 for room in rooms["test"]} <= {1, 2, 3, 4, 5, 6}
    assert len(rooms["train"]) == 96  # 24 of each of the four kinds


def check_game(games: PackGames, task: str, variation: int) -> None:
    game, row = games.draw(task, variation), games.row(task, variation)
    text = f"{game.problem}\n{game.task}".encode()
    assert hashlib.sha256(text).hexdigest()[:12] == row.digest
    told = game.trajectory()
    target = told["pddl_params"]["parent_target"] or told["pddl_params"]["toggle_target"]
    assert told["scene"]["scene_num"] == row.scene
    assert (told["pddl_params"]["object_target"], target) == (row.obj, row.target)
    assert games.kin(task, variation) == f"{row.scene}/{row.obj}/{target}"
    built = games.load(task, variation)
    assert won_by(shortest_plan(built), Engine(built))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASK_TYPES)
def test_a_sample_is_what_was_packed_and_can_be_won(
    games: PackGames, task: str, split: Split
) -> None:
    for variation in random.Random(f"{task}/{split}").sample(SPLITS[split], 4):
        check_game(games, task, variation)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASK_TYPES)
def test_every_game_is_what_was_packed_and_can_be_won(games: PackGames, task: str) -> None:
    for variation in games.variations(task):
        check_game(games, task, variation)


@pytest.mark.slow
def test_building_the_pack_again_changes_no_byte() -> None:
    assert pack_bytes(draw_pack()) == (FOLDER / "pack.json").read_bytes()


def test_a_small_pack_twice(small: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    again = tmp_path_factory.mktemp("again")
    pack.write_pack(again, SMALL)
    for name in ("pack.json", "SHA256SUMS"):
        assert (again / name).read_bytes() == (small / name).read_bytes()
    games = PackGames(small)
    assert games.variations(HEAT) == (0, 1, 2, 3, 4, 5)
    assert games.variations(HEAT, "dev") == (3, 4)
    assert read_pack((small / "pack.json").read_bytes()) == draw_pack(SMALL)
    with pytest.raises(EnvError, match="has no variation 6 in the built-in games; use 0 to 5"):
        games.load(HEAT, 6)


def test_a_pack_that_cannot_be_filled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "solved", lambda game: None)
    with pytest.raises(EnvError, match="only 0 of 2 games of pick_and_place_simple in valid_seen"):
        draw_pack(SMALL)


def test_loading_asks_no_oracle(games: PackGames, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise AssertionError("the oracle was asked")

    for module, name in ((pack, "solved"), (pack, "shortest_plan"), (generate, "shortest_plan")):
        monkeypatch.setattr(module, name, fail)
    assert games.load(HEAT, 5)
    with pytest.raises(AssertionError, match="oracle"):
        games.walkthrough(HEAT, 5)


def test_a_tampered_pack_is_refused(small: Path) -> None:
    path = small / "pack.json"
    path.write_text(path.read_text().replace('"0 ', '"7 ', 1))
    with pytest.raises(EnvError, match=r"pack\.json differs from its checksum .* reinstall"):
        PackGames(small).variations(HEAT)
    path.unlink()
    with pytest.raises(EnvError, match=r"pack\.json cannot be read: No such file"):
        PackGames(small).variations(HEAT)


def test_the_installed_package_has_the_pack_and_its_checksums() -> None:
    project = tomllib.loads((FOLDER.parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["untwine"]
    packaged = {path for pattern in patterns for path in FOLDER.parents[1].glob(pattern)}
    assert {FOLDER / name for name in ("pack.json", "scenes.json", "SHA256SUMS")} <= packaged


@pytest.mark.parametrize("field", range(5))
def test_a_tampered_row_is_refused(small: Path, field: int) -> None:
    tree = json.loads((small / "pack.json").read_text())
    line = next(x for x in tree["lines"] if (x["task"], x["split"]) == (HEAT, "train"))
    row = line["games"][1].split()
    row[field] = ("77", "29", "Egg", "Toaster", "0123456789ab")[field]
    line["games"][1] = " ".join(row)
    (small / "pack.json").write_text(json.dumps(tree))
    pack.write_checksums(small, ["pack.json"])
    games = PackGames(small)
    assert games.load(HEAT, 0)
    with pytest.raises(EnvError, match=rf"synthetic game {HEAT}/1 is not the one that was packed"):
        games.load(HEAT, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "pack.json is not well formed"),
        ('{"format": 2, "lines": []}', "it has format 2, not 1"),
        ('{"format": 1, "lines": [{"task": "x", "split": "dev", "games": ["1 2"]}]}', "well form"),
    ],
)
def test_a_pack_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pack.json").write_text(text)
    pack.write_checksums(tmp_path, ["pack.json"])
    with pytest.raises(EnvError, match=message):
        PackGames(tmp_path).load(HEAT, 0)


def test_tampered_rooms_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scenes.json", "SHA256SUMS"):
        shutil.copy(FOLDER / name, tmp_path)
    path = tmp_path / "scenes.json"
    path.write_text(path.read_text().replace('"Apple"', '"Apples"', 1))
    monkeypatch.setattr(generate, "SCENES_FILE", path)
    monkeypatch.setattr(generate, "_data", generate._data.__wrapped__)
    with pytest.raises(EnvError, match=r"scenes\.json differs from its checksum"):
        generate.draw_game(HEAT, "train", 0)


def test_the_split_file_is_the_one_of_this_pack(tmp_path: Path) -> None:
    written = {path.name: path for path in write_default_splits(tmp_path)}
    known = load_splits("alfworld", "default")
    content = written["alfworld-default.json"].read_bytes()
    assert hashlib.sha256(content).hexdigest() == known.checksum
    assert known.held_out_tasks == (HEAT, "pick_two_obj_and_place")


def test_the_real_engine_gets_a_file_with_the_same_game(
    games: PackGames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTWINE_CACHE", str(tmp_path))
    for task, variation in ((HEAT, 0), ("look_at_obj_in_light", 660)):
        path = games.path(task, variation)
        assert path.is_relative_to(tmp_path)
        assert ("valid_unseen" in path.parts) == (variation == 660)
        assert load_game(path) == games.load(task, variation)
        file = read_game_file(path)
        assert (file.task_type, file.scene) == (task, games.row(task, variation).scene)
        assert file.walkthrough == games.walkthrough(task, variation)
        assert won_by(file.walkthrough or (), Engine(load_game(path)))
        assert sorted(p.name for p in path.parent.iterdir()) == ["game.tw-pddl", "traj_data.json"]


def test_the_file_is_written_once(
    games: PackGames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTWINE_CACHE", str(tmp_path / "cache"))
    path = games.path(HEAT, 3)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate.SyntheticGame, "write", fail)
    assert games.path(HEAT, 3) == path
    with pytest.raises(EnvError, match=r"cannot write a game into .*No space left on device"):
        games.path(HEAT, 4)


def test_the_real_engine_needs_worker_processes() -> None:
    env = EnvConfig(name="alfworld", options={"engine": "textworld"})
    with pytest.raises(
        EnvError,
        match=r"^ALFWorld \(synthetic games\), real engine needs worker processes; set env.workers",
    ):
        open_pool(env)
    open_pool(env.model_copy(update={"options": {}})).close()


@pytest.mark.alfworld
def test_the_real_engine_plays_a_pack_game(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("alfworld.agents", reason="needs the extra alfworld")
    monkeypatch.setenv("UNTWINE_CACHE", str(tmp_path))
    ours, real = make_env("alfworld"), make_env("alfworld", {"engine": "textworld"})
    a, b = ours.reset(HEAT, 600), real.reset(HEAT, 600)
    assert (a.goal, a.observation.text) == (b.goal, b.observation.text)
    for command in ours.expert(HEAT, 600) or ():
        assert ours.step(command).text == (after := real.step(command)).text
        assert ours.admissible() == real.admissible()
    assert after.success
    real.close()


TRANSCRIPT = """
import random, sys
from untwine.envs.alfworld.pack import draw_pack, pack_bytes
from untwine.envs.registry import make_env

env, rng = make_env("alfworld", {"list_commands": True}), random.Random(0)
for task in ("pick_two_obj_and_place", "pick_cool_then_place_in_recep"):
    goal, observation = env.reset(task, 17)
    print(goal, observation)
    for _ in range(25):
        observation = env.step(rng.choice(observation.admissible))
        print(observation)
        if observation.done:
            break
    print(env.expert(task, 17))
print(pack_bytes(draw_pack({"train": 2, "dev": 1, "test": 1})))
"""


def test_nothing_depends_on_the_hash_seed() -> None:
    said = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", TRANSCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout)
    assert said[0] == said[1]
    assert said[0].count("admissible=('") > 30
