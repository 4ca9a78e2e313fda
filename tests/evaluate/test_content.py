"""Which games are played from a folder is part of the identity; where they lie is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from untwine.config import EnvConfig
from untwine.envs.alfworld.games import SPLIT_FOLDERS
from untwine.envs.alfworld.generate import generate
from untwine.envs.protocol import EnvFamily
from untwine.envs.registry import register_family
from untwine.envs.rooms import FAMILY as ROOMS
from untwine.errors import EnvError
from untwine.evaluate.content import outside_content
from untwine.evaluate.identity import set_identity
from untwine.evaluate.protocol import evaluation_refs
from untwine.records import TaskRef

TASK = "pick_and_place_simple"


def alfworld_folder(folder: Path, first: int) -> Path:
    for split, name in SPLIT_FOLDERS.items():
        for seed in range(first, first + 2):
            game = generate(TASK, seed, name)
            assert game is not None, split
            game.write(folder / name)
    return folder


def identity(env: EnvConfig) -> dict[str, Any]:
    refs = evaluation_refs(env, "L1", 2)
    return set_identity(env, "L1", refs, decoding="sampled", seed=0)


def official(**options: Any) -> EnvConfig:
    return EnvConfig(name="alfworld", tasks=[TASK], options={"data": "official", **options})


def test_other_games_make_another_examination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for name, first in (("one", 0), ("other", 50)):
        folder = alfworld_folder(tmp_path / name, first)
        monkeypatch.setenv("ALFWORLD_DATA", str(folder))
        found[name] = identity(official())
    assert found["one"]["digest"] != found["other"]["digest"]
    assert found["one"]["content"] != found["other"]["content"]


def test_the_place_of_the_games_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = alfworld_folder(tmp_path / "one", 0)
    monkeypatch.setenv("ALFWORLD_DATA", str(folder))
    there = identity(official(observe="inventory"))
    shutil.copytree(folder, tmp_path / "copy")
    options = {"data": str(tmp_path / "copy"), "observe": "inventory"}
    here = identity(EnvConfig(name="alfworld", tasks=[TASK], options=options))
    assert here == there
    assert here["options"] == {"observe": "inventory"}


def test_a_game_that_is_altered_in_its_place_is_another(tmp_path: Path) -> None:
    folder = alfworld_folder(tmp_path / "one", 0)
    env = EnvConfig(name="alfworld", tasks=[TASK], options={"data": str(folder)})
    before = identity(env)["digest"]
    for file in (folder / "valid_unseen").rglob("game.tw-pddl"):
        tree = json.loads(file.read_text())
        file.write_text(json.dumps({**tree, "walkthrough": ["look"]}))
    assert identity(env)["digest"] != before


def test_textworld_files_count_by_content(tmp_path: Path) -> None:
    for name, text in (("one", "a"), ("copy", "a"), ("other", "b")):
        (tmp_path / name).mkdir()
        for file in ("g.z8", "g.json"):
            (tmp_path / name / file).write_text(text)
    refs = [TaskRef("textworld", "files", 0)]

    def digest(name: str, played: list[TaskRef] = refs) -> str:
        env = EnvConfig(name="textworld", options={"games": str(tmp_path / name)})
        found: str = set_identity(env, "mine", played, decoding="greedy", seed=0)["digest"]
        return found

    assert digest("one") == digest("copy") != digest("other")
    (tmp_path / "one" / "g.json").unlink()
    with pytest.raises(EnvError, match=r"g\.json cannot be read"):
        digest("one")
    made = [TaskRef("textworld", "simple", 0)]
    assert digest("other", made) != digest("copy", made)  # as it was before: an option like others


@pytest.mark.parametrize("name", ["alfworld", "babyai", "rooms", "scienceworld", "textworld"])
def test_what_the_package_makes_has_no_content(name: str) -> None:
    env = EnvConfig(name=name)
    assert outside_content(env, evaluation_refs(env, "L1", 3)) is None


def test_digests_of_built_in_games_stay_what_they_were() -> None:
    """Recorded by runs before this was told apart."""
    env = EnvConfig(name="alfworld", tasks=["look_at_obj_in_light", TASK])
    refs = evaluation_refs(env, "L1", 480)
    found = set_identity(env, "L1", refs, decoding="sampled", seed=3)
    recorded = "ffb6f6f6bd2d21c84a3400ea0e507d26ec034bcdbe948e553b46f847551971b1"
    assert found["digest"] == recorded
    assert "content" not in found


def test_families_of_ones_own_count_by_their_fingerprint() -> None:
    register_family("marked", f"{__name__}:MARKED")
    plain, other = EnvConfig(name="marked"), EnvConfig(name="marked", options={"rooms": 4})
    assert outside_content(plain, []) is None
    assert outside_content(other, []) == ("4", ())


class _Marked:
    info = ROOMS.catalogue.info

    def __init__(self, options: Any) -> None:
        self._options = options

    def tasks(self) -> tuple[str, ...]:
        return ()

    def variations(self, task: str, split: Any = None) -> tuple[int, ...]:
        return ()

    def fingerprint(self) -> str:
        return str(self._options.get("rooms", ""))


MARKED = EnvFamily(_Marked({}), ROOMS.make, ("rooms",), _Marked)
