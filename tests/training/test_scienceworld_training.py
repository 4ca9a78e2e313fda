"""Training on the real ScienceWorld: a JVM that dies in the middle, and a kill of everything."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.runs import rows
from tests.training.test_resume import RECIPE, finish, start, wait_for
from untwine.episodes import read_groups
from untwine.training.run_dir import episode_files

pytestmark = [pytest.mark.java, pytest.mark.skipif(os.name != "posix", reason="reads /proc")]

ITERATIONS, GROUPS, SIZE = 4, 2, 3


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tree = {
        **RECIPE,
        "env": {
            "name": "scienceworld",
            "tasks": ["lifespan-longest-lived"],
            "max_steps": 6,
            "workers": 1,
            "sessions": 6,
        },
        "cold_start": {"episodes": 4, "steps": 2, "batch_tokens": 256},
        "rl": {
            "iterations": ITERATIONS,
            "groups": GROUPS,
            "group_size": SIZE,
            "drop_constant_groups": False,
        },
        "gcd": {},
        "loss": {},
        "evaluate": {"episodes": 0},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        children = [p for p, of in parents.items() if of == parent]
        found += children
        waiting += children
    return found


def kill_java(process: subprocess.Popen[bytes]) -> None:
    java = [
        p
        for p in descendants(process.pid)
        if "java" in Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0")[0].decode()
    ]
    assert java
    for pid in java:
        os.kill(pid, signal.SIGKILL)


def assert_complete(run: Path) -> None:
    files = episode_files(run)
    assert len(files) == ITERATIONS
    for file in files:
        groups = read_groups(file)
        assert [len(group.episodes) for group in groups] == [SIZE] * GROUPS
        assert all(episode.length for group in groups for episode in group.episodes)
    assert [row["step"] for row in rows(run)] == list(range(ITERATIONS))
    assert rows(run)[-1]["optimizer_steps"] == ITERATIONS


def test_episodes_of_a_dead_jvm_are_played_again(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(str(recipe), "--run", str(run))
    wait_for(run, "rl", 1, process)
    kill_java(process)
    assert finish(process) == 0
    assert_complete(run)
    assert sum(int(str(row["episodes_lost"])) for row in rows(run)) >= 1


def test_killed_and_resumed_run_has_all_steps_and_episodes(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(str(recipe), "--run", str(run))
    wait_for(run, "rl", 2, process)
    left_behind = descendants(process.pid)
    process.kill()
    finish(process)
    assert finish(start("--resume", str(run))) == 0
    assert_complete(run)
    limit = time.monotonic() + 20
    while alive := [p for p in left_behind if Path(f"/proc/{p}").exists()]:
        assert time.monotonic() < limit, f"processes {alive} outlived the trainer"
        time.sleep(0.2)
