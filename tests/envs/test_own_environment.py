"""An environment from outside the package, named "module:attribute"."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from untwine.cli import main
from untwine.envs import registry
from untwine.envs.protocol import EnvInfo, Planner
from untwine.envs.registry import get_family, make_env
from untwine.envs.splits import load_splits, write_splits
from untwine.episodes import read_groups
from untwine.errors import EnvError
from untwine.records import Observation, TaskRef

ROOT = Path(__file__).parents[2]
NAME = "examples.own_environment:FAMILY"
SMALL = [
    "env.max_steps=3", "env.sessions=4", "cold_start.episodes=4", "cold_start.steps=1",
    "rl.iterations=1", "rl.groups=2", "rl.group_size=2", "evaluate.sets=[L0]",
    "evaluate.episodes=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Families, path and modules are afterwards as they were."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(ROOT))])
    yield
    for name in [m for m in sys.modules if m.partition(".")[0] in ("examples", "mine")]:
        del sys.modules[name]


def copy_example(folder: Path) -> None:
    (folder / "examples").mkdir()
    for ending in ("py", "yaml"):
        shutil.copy(ROOT / "examples" / f"own_environment.{ending}", folder / "examples")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which holds the example."""
    copy_example(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the example itself


def test_the_example_is_what_an_environment_must_be(folder: Path) -> None:
    """Experts solve every instance, from every state; equal keys mean equal answers."""
    env, catalogue, rng = make_env(NAME), get_family(NAME).catalogue, random.Random(0)
    assert isinstance(env, Planner)
    for task in catalogue.tasks():
        for variation in catalogue.variations(task):
            plan = env.expert(task, variation)
            observation = env.reset(task, variation).observation
            for command in plan or ():
                assert not observation.done
                observation = env.step(command)
            assert observation.success
            known: dict[tuple[str, str], Observation] = {}
            for _ in range(3):
                observation = env.reset(task, variation).observation
                while not observation.done:
                    before, snapshot = observation.state_key, env.snapshot()
                    assert env.plan()
                    command = rng.choice([*env.admissible(), "dance"])
                    observation = env.step(command)
                    assert (observation.invalid is None) == (command != "dance")
                    assert known.setdefault((before, command), observation) == observation
                    env.restore(snapshot)
                    assert env.step(command) == observation
    with pytest.raises(EnvError, match="has no task 'dance'; known are open, find"):
        env.reset("dance", 0)
    with pytest.raises(EnvError, match="has no variation 90"):
        env.reset("open", 90)


def test_the_page_shows_the_example_and_every_field() -> None:
    page = (ROOT / "docs" / "environments.md").read_text()
    example = (ROOT / "examples" / "own_environment.py").read_text()
    section = page.partition("## An environment of your own")[2].partition("\n## ")[0]
    (shown,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert shown == example.partition('"""\n\n')[2]
    tables = page.partition("## An environment of your own")[0]
    for kind in (Observation, EnvInfo):
        for field in dataclasses.fields(kind):
            assert re.search(rf"^\|[^|]*`{field.name}`", tables, re.MULTILINE), field.name


# ---- names


def test_only_such_a_name_is_looked_for_in_the_current_folder(folder: Path) -> None:
    get_family("rooms")
    with pytest.raises(EnvError, match=r"unknown environment 'own'.*such as my_module:FAMILY"):
        get_family("own")
    registry.register_family("own", NAME)
    with pytest.raises(EnvError, match=r"there is no module 'examples.*' on Python's path"):
        get_family("own")
    assert str(folder) not in sys.path
    assert get_family(NAME).catalogue.info.title == "safe"
    assert get_family("own") is get_family(NAME)
    assert sys.path.count(str(folder)) == 1


WRONG: dict[str, tuple[str, str]] = {
    "nowhere:FAMILY": ("", "there is no module 'nowhere'.*PYTHONPATH"),
    "nowhere.mine:FAMILY": ("", "there is no module 'nowhere'"),
    "mine.sub:FAMILY": ("", "there is no module 'mine.sub'"),
    "mine.py:FAMILY": ("", "'mine.py:FAMILY' is not of the form module:attribute"),
    "a/mine:FAMILY": ("", "not of the form module:attribute; write .* dots and without .py"),
    "mine:": ("", "not of the form module:attribute"),
    ":FAMILY": ("", "not of the form module:attribute"),
    "mine:FAMLY": ("", r"'mine' \(.*mine.py\) has no attribute 'FAMLY'; add FAMILY = EnvFamily\("),
    "mine:OTHER": ("OTHER = 3", "'OTHER' of module 'mine' .* is of type int, not EnvFamily; add"),
    "mine:fam": (
        "from untwine.envs.rooms import FAMILY as ONE",
        "has no attribute 'fam'; name 'ONE' instead",
    ),
    "mine:A": (
        "x = 1\nimport no_such_thing",
        "importing module 'mine' failed with ModuleNotFoundError: No module named "
        r"'no_such_thing' \(mine.py, line 2\); mend the module",
    ),
    "mine:B": ("x = (", r"failed with SyntaxError: .* \(mine.py, line 1\); mend"),
    "mine:C": ("x = 1 / 0", r"ZeroDivisionError: division by zero \(mine.py, line 1\)"),
    "mine:D": ("raise SystemExit(7)", r"SystemExit: 7 \(mine.py, line 1\)"),
}


@pytest.mark.parametrize("target", WRONG)
def test_a_wrong_target_is_one_sentence(
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, message = WRONG[target]
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["untwine", "play", target])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == EnvError.exit_code
    said = capsys.readouterr().err
    assert re.search(f"^error: environment {target!r}: .*{message}", said)
    assert len(said.splitlines()) == 1
    registry.register_family("own", target)
    with pytest.raises(EnvError, match=f"environment 'own': .*{message}"):
        get_family("own")


SEEN = Observation("", "", 0.0, 0.0, done=False, success=False)
ANSWERS: dict[str, tuple[str, object, str]] = {
    "no observation": (
        "step",
        ("The safe is open.", 1.0, True, {}),
        r"step returned \('The safe .* \(tuple\); return an Observation",
    ),
    "no goal": ("reset", SEEN, r"reset returned .*; return Reset\(goal, observation\)"),
    "percent": (
        "step",
        dataclasses.replace(SEEN, outcome=70.0),
        "step gave outcome=70.0; an outcome must lie between 0 and 1",
    ),
    "nan": ("step", dataclasses.replace(SEEN, score=float("nan")), "step gave score=nan"),
    "numpy": (
        "step",
        dataclasses.replace(SEEN, done=np.bool_(True)),  # type: ignore[arg-type]
        r"step gave done=.*True.* \(bool\w*\); done must be bool",
    ),
    "true": ("restore", dataclasses.replace(SEEN, score=True), "score must be float or int"),
    "key": (
        "step",
        dataclasses.replace(SEEN, state_key=7),  # type: ignore[arg-type]
        r"gave state_key=7 \(int\); state_key must be str",
    ),
    "listed": (
        "step",
        dataclasses.replace(SEEN, admissible=(1, 2)),  # type: ignore[arg-type]
        r"step \(admissible\) returned \(1, 2\)",
    ),
    "one text": ("admissible", "open door", "admissible returned 'open door' .*; return a tuple"),
    "plan": ("plan", [1, 2], r"plan returned \[1, 2\]"),
    "expert": ("expert", {"a": 1}, "expert returned"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_wrong_answer_is_one_sentence(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, answer, message = ANSWERS[case]
    env = make_env(NAME)
    env.reset("open", 0)
    before = env.snapshot()
    kind = type(get_family(NAME).make({}))
    monkeypatch.setattr(kind, method, lambda *_: answer)
    env = make_env(NAME)
    calls = {"reset": ("open", 0), "step": ("pull",), "restore": (before,), "expert": ("open", 0)}
    with pytest.raises(EnvError, match=f"^environment {NAME!r}: .*{message}"):
        getattr(env, method)(*calls.get(method, ()))


def test_a_copy_goes_its_own_way(folder: Path) -> None:
    for env in (make_env(NAME), make_env(NAME, {"list_commands": True})):
        env.reset("open", 0)
        other = copy.deepcopy(env)
        assert isinstance(env, Planner)
        assert isinstance(other, Planner)
        before = env.plan()
        assert other.plan() == before
        other.step((before or ())[0])
        assert env.plan() == before
        assert other.plan() == (before or ())[1:]
        assert other.expert(task="open", variation=1) == env.expert("open", variation=1)


def test_a_wrong_answer_ends_a_run_with_one_sentence(tmp_path: Path) -> None:
    """Not with an environment that is begun again and again."""
    copy_example(tmp_path)
    file = tmp_path / "examples" / "own_environment.py"
    code = file.read_text()
    assert "outcome=float(solved)" in code
    file.write_text(code.replace("outcome=float(solved)", "outcome=100.0 * solved"))
    (tmp_path / "commands.py").write_text(COMMANDS)
    command = ["train", "examples/own_environment.yaml", *SMALL, "env.workers=1", "--run", "run"]
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run_in(tmp_path, "commands.py", json.dumps([command]))
    assert raised.value.returncode == EnvError.exit_code
    (line,) = [line for line in raised.value.stderr.splitlines() if line.startswith("error")]
    assert "gave outcome=100.0; an outcome must lie between 0 and 1" in line
    assert "Traceback" not in raised.value.stderr


def test_it_can_be_played(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_env(NAME).expert("open", 0)
    assert plan
    monkeypatch.setattr(sys, "argv", ["untwine", "play", NAME, "open", "0"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(plan)))
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    assert f"solved after {len(plan)} steps" in capsys.readouterr().out


# ---- sets


def test_a_family_without_a_split_file_is_told_what_to_do(folder: Path) -> None:
    with pytest.raises(EnvError) as raised:
        load_splits(NAME, "default")
    assert str(raised.value) == (
        f"environment {NAME!r} has no split file 'default'; set env.held_out_tasks=[] to have the "
        "sets made from its catalogue, or env.splits to the path of a split file of your own "
        "(FILE.json)"
    )
    with pytest.raises(EnvError, match=r"'easy'; set env.held_out_tasks=\[\] with env.splits=def"):
        load_splits(NAME, "easy")
    # both ways work
    catalogue = get_family(NAME).catalogue
    sets = load_splits(NAME, "default", None, []).sets
    for task in catalogue.tasks():
        train = catalogue.variations(task, "train")
        assert sorted(sets["train"][task] + sets["L0"][task]) == list(train)
        assert sets["L0"][task] == train[9::10]
        assert sets["L1"][task] == catalogue.variations(task, "test")
    assert sets["L2"] == {}
    assert list(load_splits(NAME, "default", None, ["find"]).sets["L2"]) == ["find"]
    file = write_splits(NAME, "few", "A few.", {"train": {"open": [0, 1]}}, folder=folder / "own")
    assert file.name == "examples.own_environment.FAMILY-few.json"
    assert [str(ref) for ref in load_splits(NAME, file).refs("train")] == [
        f"{NAME}/open/0",
        f"{NAME}/open/1",
    ]


def test_the_tasks_that_a_catalogue_holds_out_are_proposed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = get_family(NAME).catalogue
    monkeypatch.setattr(type(catalogue), "held_out_tasks", ("find",), raising=False)
    with pytest.raises(EnvError, match=r"set env.held_out_tasks=\[find\] to have"):
        load_splits(NAME, "default")


def test_a_catalogue_whose_splits_overlap_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = get_family(NAME).catalogue
    monkeypatch.setattr(type(catalogue), "variations", lambda *_: tuple(range(20)))
    with pytest.raises(EnvError, match=r"variations\(task, split\) of .* open/0 is in both train"):
        load_splits(NAME, "default", None, [])


# ---- runs

COMMANDS = """
import json, sys
from untwine.cli import main
if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        sys.argv = ["untwine", *arguments]
        try:
            main()
        except SystemExit as left:
            if left.code:
                raise
"""


def run_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without the current folder on its path (-P), like the console script."""
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )


def test_it_can_be_trained_and_evaluated(tmp_path: Path) -> None:
    """Without and with a worker, in one process, since starting one takes longest."""
    copy_example(tmp_path)
    (tmp_path / "commands.py").write_text(COMMANDS)
    runs = {run: tmp_path / run for run in ("here", "worker")}
    commands = [
        ["train", "examples/own_environment.yaml", *SMALL, f"env.workers={n}", "--run", run]
        for n, run in enumerate(runs)
    ]
    commands.append(["evaluate", "worker", "--sets", "L1", "--episodes", "2"])
    run_in(tmp_path, "commands.py", json.dumps(commands))
    played = [_played(run) for run in runs.values()]
    assert played[0] == played[1]
    assert {ref.env for ref, _ in played[0]} == {NAME}
    for run in runs.values():
        info = json.loads((run / "run.json").read_text())
        assert (info["status"], info["environment"]) == ("finished", "safe")
    row = json.loads((runs["worker"] / "evaluations.jsonl").read_text())
    assert (row["environment"], row["identity"]["environment"]) == ("safe", NAME)
    assert row["episodes"] == 2


def _played(run: Path) -> list[tuple[TaskRef, list[str]]]:
    """Every recorded episode: the instance, and what was written."""
    (file,) = (run / "episodes").glob("*.jsonl.gz")
    episodes = [episode for group in read_groups(file) for episode in group.episodes]
    return [(episode.ref, [step.text for step in episode.steps]) for episode in episodes]


@pytest.mark.slow
def test_it_can_be_swept(tmp_path: Path) -> None:
    copy_example(tmp_path)
    (tmp_path / "commands.py").write_text(COMMANDS)
    command = ["sweep", "examples/own_environment.yaml", *SMALL, "--seeds", "1", "--jobs", "1"]
    command += ["--no-pair", "--vary", "env.workers=1", "--out", "sweep"]
    run_in(tmp_path, "commands.py", json.dumps([command]))
    assert len(list((tmp_path / "sweep" / "arms").glob("*/seed-0/model/config.json"))) == 1
