"""Sweeps as a whole, in real processes: nothing is lost by kill -9, failures stop nobody else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from tests.runs import rows
from tests.training.test_resume import RECIPE

SMALL = {
    **RECIPE,
    "name": "small",
    "loss": {},
    "rl": {"iterations": 3, "groups": 2, "group_size": 4},
    "evaluate": {"sets": ["L0"], "episodes": 4},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    return file


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(recipe: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts `untwine sweep` with the recipe; what still runs in the end is killed."""
    begun: list[subprocess.Popen[bytes]] = []

    def launch(*arguments: str, out: Path = tmp_path / "out") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "untwine", "sweep", str(recipe), "--out", str(out)]
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )
        begun.append(process)
        return process

    yield launch
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(process: subprocess.Popen[bytes], code: int = 0) -> tuple[str, str]:
    out, errors = process.communicate(timeout=600)
    assert process.returncode == code, errors.decode()
    return out.decode(), errors.decode()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < limit
        time.sleep(0.01)


def runs(out: Path) -> list[Path]:
    return [out / entry["folder"] for entry in json.loads((out / "sweep.json").read_text())["runs"]]


def results(out: Path) -> Any:
    """What a sweep found, without folders and seconds."""
    numbers = json.loads((out / "compare.json").read_text())
    for arm in numbers["arms"]:
        del arm["runs"], arm["seconds"], arm["overhead_seconds"]
    return numbers


@pytest.mark.slow
def test_a_sweep_ends_in_a_comparison_and_is_not_done_twice(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--seeds", "1", "--vary", "gcd.objective=none,generative/ce", "--jobs", "2"]
    table, progress = finish(start(*arguments))
    assert "success rate" in table
    assert "cold start" in table
    assert "3 of 3" in progress
    numbers = json.loads((out / "compare.json").read_text())
    arms = {arm["label"]: arm["seeds"] for arm in numbers["arms"]}
    assert list(arms) == ["gcd.objective=none", "gcd.objective=generative/ce", "cold start"]
    assert list(arms.values()) == [[0]] * 3
    assert [r["paired"]["pairs"] for r in numbers["sets"][0]["against"]] == [1, 1]
    assert (out / "compare.html").stat().st_size > 10_000
    before = {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in runs(out)}
    _, progress = finish(start(*arguments))
    assert "3 finished before, 0 to do" in progress
    assert {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in runs(out)} == before


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find processes")
def test_kill_9_loses_nothing(start: Start, tmp_path: Path) -> None:
    """Killed once alone, so that its runs must stop by themselves, and once with its runs; in the
    end it is the same, bit for bit, as a sweep that nobody killed."""
    arguments = ["--seeds", "2", "--vary", "gcd.objective=none,generative/ce", "--jobs", "2"]
    unbroken, out = tmp_path / "unbroken", tmp_path / "out"
    finish(start(*arguments, out=unbroken))

    process = start(*arguments)
    cold = out / "cold" / "base" / "seed-0"
    wait_for(lambda: len(rows(cold, "cold_start")) > 12, process)
    process.kill()
    process.communicate()

    process = start(*arguments)
    arm = out / "arms" / "gcd.objective=none" / "seed-0"
    wait_for(lambda: len(rows(arm)) > 0, process)
    for pid in [process.pid, *children(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()

    finish(start(*arguments))
    assert results(out) == results(unbroken)
    for run in runs(unbroken):
        ours, theirs = (
            load_file(folder / "model" / "model.safetensors")
            for folder in (out / run.relative_to(unbroken), run)
        )
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


@pytest.mark.slow
def test_a_signal_saves_every_run(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["rl.iterations=200", "--seeds", "2", "--no-pair", "--jobs", "2"]
    process = start(*arguments)
    arm = out / "arms" / "small"
    wait_for(lambda: all(len(rows(arm / f"seed-{s}")) > 0 for s in (0, 1)), process)
    process.send_signal(signal.SIGINT)
    _, errors = finish(process, 130)
    assert "every run is saved, start the same command again" in " ".join(errors.split())
    for seed in (0, 1):
        info = json.loads((arm / f"seed-{seed}" / "run.json").read_text())
        assert info["status"] == "interrupted"


@pytest.mark.slow
def test_failed_runs_are_reported_and_the_others_go_on(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--seeds", "1", "--vary", "gcd.gradient=all,lora", "--jobs", "2"]
    _, errors = finish(start(*arguments), 1)
    said = " ".join(errors.split())
    assert "1 of 3 runs failed" in said
    assert "gcd.gradient: lora needs adapters" in said
    assert "the others are compared in" in said
    assert "Traceback" not in errors
    numbers = json.loads((out / "compare.json").read_text())
    assert [arm["label"] for arm in numbers["arms"]] == ["gcd.gradient=all", "cold start"]


@pytest.mark.slow
def test_what_a_failed_cold_start_takes_with_it(start: Start) -> None:
    _, errors = finish(start("policy.model=./nothing-here", "--seeds", "1"), 1)
    said = " ".join(errors.split())
    assert "all runs of the sweep failed" in said
    assert "no model folder ./nothing-here" in said
    assert "failed, which it begins with" in said
