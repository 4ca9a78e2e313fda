"""Split files: sets are disjoint, checked against their checksum, and regenerated bit for bit."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untwine.envs import splits as splits_module
from untwine.envs.protocol import EnvInfo
from untwine.envs.registry import get_family
from untwine.envs.splits import (
    FOLDER,
    SplitFile,
    default_sets,
    format_ranges,
    load_splits,
    parse_ranges,
    write_default_splits,
    write_splits,
)
from untwine.errors import EnvError
from untwine.records import TaskRef


@pytest.fixture
def splits() -> SplitFile:
    return load_splits("scienceworld", "default")


def own_file(folder: Path, sets: dict[str, dict[str, list[int]]]) -> Path:
    return write_splits("scienceworld", "mine", "a test", sets, folder=folder)


def test_default_sets_of_scienceworld(splits: SplitFile) -> None:
    catalogue = get_family("scienceworld").catalogue
    held_out = set(splits.held_out_tasks)
    seen = set(catalogue.tasks()) - held_out
    assert (len(held_out), len(seen)) == (11, 19)
    assert list(splits.sets) == ["train", "L0", "dev", "L1", "L2"]
    assert set(splits.sets["L2"]) == held_out
    assert set(splits.sets["L1"]) == set(splits.sets["train"]) == seen
    for task in seen:
        train, tenth = splits.sets["train"][task], splits.sets["L0"].get(task, ())
        of_package = catalogue.variations(task, "train")
        assert tuple(sorted(train + tenth)) == of_package
        assert len(tenth) == len(of_package) // 10
        assert splits.sets["dev"][task] == catalogue.variations(task, "dev")
        assert splits.sets["L1"][task] == catalogue.variations(task, "test")
    for task in held_out:
        assert splits.sets["L2"][task] == catalogue.variations(task, "test")
    instances = [(t, v) for tasks in splits.sets.values() for t, vs in tasks.items() for v in vs]
    assert len(instances) == len(set(instances))


def test_regenerating_changes_no_byte(tmp_path: Path) -> None:
    written = write_default_splits(tmp_path)
    assert "scienceworld-default.json" in [path.name for path in written]
    for path in written:
        assert path.read_bytes() == (FOLDER / path.name).read_bytes()
    ours = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert set(ours) <= set((FOLDER / "SHA256SUMS").read_text().splitlines())


def test_every_packaged_file_loads() -> None:
    paths = sorted(FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        env, _, name = path.stem.partition("-")
        assert load_splits(env, name).refs(next(iter(load_splits(env, name).sets)))


def test_refs(splits: SplitFile) -> None:
    refs = splits.refs("train", ["melt", "boil"], limit=2)
    assert refs == tuple(
        TaskRef("scienceworld", t, v)
        for t, v in [("melt", 0), ("melt", 1), ("boil", 0), ("boil", 1)]
    )
    every = splits.refs("train")
    assert len(every) == sum(len(v) for v in splits.sets["train"].values())
    assert {ref.task for ref in every} == set(splits.sets["train"])
    assert len(splits.refs("train", ["melt", "melt"])) == len(splits.sets["train"]["melt"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("trian", ()), r"no set 'trian', only train, L0, .*Did you mean 'train'"),
        (("train", ["bol"]), r"unknown task 'bol'.*Did you mean 'boil'"),
        (("train", ["freeze"]), r"'freeze' is not in set 'train' .* it is in L2$"),
        (("L2", ["boil"]), r"'boil' is not in set 'L2' .* it is in train, L0, dev, L1$"),
    ],
)
def test_wrong_sets_and_tasks(splits: SplitFile, call: tuple[str, list[str]], message: str) -> None:
    with pytest.raises(EnvError, match=message):
        splits.refs(*call)


def test_unknown_names_answer_with_the_nearest() -> None:
    with pytest.raises(EnvError, match=r"'defualt'; known are default.*Did you mean 'default'"):
        load_splits("scienceworld", "defualt")
    with pytest.raises(EnvError, match="No such file"):
        load_splits("scienceworld", "/nowhere/mine.json")


def test_changed_packaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_default_splits(tmp_path)
    monkeypatch.setattr(splits_module, "FOLDER", tmp_path)
    path = tmp_path / "scienceworld-default.json"
    assert load_splits("scienceworld", "default").checksum in (tmp_path / "SHA256SUMS").read_text()
    path.write_text(path.read_text().replace('"boil": "0-8', '"boil": "0-7'))
    with pytest.raises(EnvError, match="differs from its checksum"):
        load_splits("scienceworld", "default")
    assert load_splits("scienceworld", path).refs("train", ["boil"])  # by its path it may be used


def test_file_of_your_own(tmp_path: Path) -> None:
    path = own_file(tmp_path, {"a": {"boil": [1, 0]}, "b": {"boil": [2], "melt": [5]}})
    splits = load_splits("scienceworld", path)
    assert splits.sets == {"a": {"boil": (0, 1)}, "b": {"boil": (2,), "melt": (5,)}}
    with pytest.raises(EnvError, match=r"is for environment 'scienceworld', not 'rooms'"):
        load_splits("rooms", path)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"a": {"boil": [0, 1]}, "b": {"boil": [1]}}, "boil/1 is in both a and b"),
        ({"a": {"bol": [0]}}, "unknown scienceworld task 'bol'"),
        ({"a": {"boil": [29, 30]}}, "boil has no variation 30"),
    ],
)
def test_wrong_instances_are_refused(
    tmp_path: Path, sets: dict[str, dict[str, list[int]]], message: str
) -> None:
    with pytest.raises(EnvError, match=message):
        load_splits("scienceworld", own_file(tmp_path, sets))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tree: tree.pop("sets"), "lacks 'sets'"),
        (lambda tree: tree["sets"]["a"].update(boil="3-"), "not well formed"),
        (lambda tree: tree["sets"]["a"].update(boil="3,2"), "do not rise"),
        (lambda tree: tree.update(sets=[1]), "not well formed"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, edit: object, message: str) -> None:
    path = own_file(tmp_path, {"a": {"boil": [0]}})
    tree = json.loads(path.read_text())
    edit(tree)  # type: ignore[operator]
    path.write_text(json.dumps(tree))
    with pytest.raises(EnvError, match=re.escape(message)):
        load_splits("scienceworld", path)
    path.write_text("{")
    with pytest.raises(EnvError, match="not well formed"):
        load_splits("scienceworld", path)


@given(st.sets(st.integers(0, 300)))
def test_ranges_are_inverse(numbers: set[int]) -> None:
    assert parse_ranges(format_ranges(numbers)) == tuple(sorted(numbers))


def test_default_sets_leave_out_tasks_without_variations() -> None:
    sets = default_sets(get_family("scienceworld").catalogue, ())
    assert "identify-life-stages-1" not in sets["L0"]  # six train variations: no tenth one
    assert sets["L2"] == {}


class Kinned:
    """1000 train variations of each task; the kin of `a` and `b` overlap."""

    info = EnvInfo("kin", deterministic=True, snapshots=True, lists_commands=True, has_expert=True)

    def tasks(self) -> tuple[str, ...]:
        return ("a", "b", "c")

    def variations(self, task: str, split: str | None = None) -> tuple[int, ...]:
        ranges = {"train": range(1000), "dev": range(1000, 1010), "test": range(1010, 1020)}
        return tuple(ranges[split] if split else range(1020))

    def kin(self, task: str, variation: int) -> str:
        return f"room {(variation * 7 + (task == 'b') * 100) % 450}"


def test_kin_is_never_separated() -> None:
    catalogue = Kinned()
    sets = default_sets(catalogue, ["c"])
    kin = {
        name: {catalogue.kin(task, v) for task in sets[name] for v in sets[name][task]}
        for name in ("train", "L0")
    }
    assert not kin["train"] & kin["L0"]
    assert len(kin["train"] | kin["L0"]) == 450
    assert 25 < len(kin["L0"]) < 65  # 45 expected
    for task in ("a", "b"):
        assert sorted(sets["train"][task] + sets["L0"][task]) == list(range(1000))
    assert sets["L2"] == {"c": tuple(range(1010, 1020))}
    # the choice depends on the name of the kin only, not on what else there is
    alone = default_sets(catalogue, ["b", "c"])
    assert alone["L0"]["a"] == sets["L0"]["a"]


def test_other_held_out_tasks() -> None:
    catalogue = get_family("rooms").catalogue
    splits = load_splits("rooms", "default", {}, ["unlock", "fetch", "unlock"])
    assert splits.held_out_tasks == ("fetch", "unlock")
    assert splits.sets["L2"] == {t: catalogue.variations(t, "test") for t in ("fetch", "unlock")}
    for name in ("train", "L0", "dev", "L1"):
        assert list(splits.sets[name]) == ["tidy"]
    assert splits.checksum == load_splits("rooms", "default", {}, ["fetch", "unlock"]).checksum
    assert splits.checksum != load_splits("rooms", "default", {}, ["fetch"]).checksum
    assert load_splits("rooms", "default", {}, []).sets["L2"] == {}
    with pytest.raises(EnvError, match="task 'tidy' is not in set 'L2'"):
        splits.refs("L2", ["tidy"])


@pytest.mark.parametrize("env", ["alfworld", "babyai", "rooms", "scienceworld", "textworld"])
def test_naming_the_same_held_out_tasks_changes_nothing(env: str) -> None:
    packaged = load_splits(env, "default")
    assert load_splits(env, "default", None, packaged.held_out_tasks[::-1]) == packaged


def test_wrong_held_out_tasks(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match=r"'rooms' has no task 'fetsh'\. Did you mean 'fetch'"):
        load_splits("rooms", "default", {}, ["fetsh"])
    path = own_file(tmp_path, {"a": {"boil": [0]}})
    for name in (str(path), "mine"):
        with pytest.raises(EnvError, match=r"env.held_out_tasks needs env.splits: default"):
            load_splits("scienceworld", name, {}, ["boil"])
