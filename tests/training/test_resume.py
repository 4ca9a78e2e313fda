"""Runs that are killed or stopped continue exactly: same parameters, bit for bit."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs import assert_same_weights, rows, steady
from untwine.errors import CheckpointError

RECIPE = {
    "name": "resume",
    "env": {"name": "rooms", "tasks": ["fetch"], "max_steps": 8, "sessions": 8},
    "policy": {
        "model": "tiny",
        "threads": 1,
        "tiny": {
            "hidden_size": 32,
            "layers": 1,
            "heads": 2,
            "kv_heads": 1,
            "intermediate_size": 64,
            "vocab_size": 400,
        },
    },
    "sampling": {"max_new_tokens": 6},
    "cold_start": {"episodes": 12, "steps": 30, "batch_tokens": 512, "verdict_weight": 0.3,
                   "noise": 0.3},
    "rl": {"iterations": 6, "groups": 3, "group_size": 4, "minibatches": 2, "epochs": 2,
           "optimizer": {"lr": 1.0e-3}, "drop_constant_groups": False},
    "loss": {"kl": 0.01, "entropy": 0.01},
    "gcd": {"objective": "generative/ce", "token_budget": 2048},
    "diagnose": {"every": 2, "probes": 3, "samples": 6},
    "evaluate": {"every": 2, "sets": ["L0"], "episodes": 6},
    "checkpoint": {"cold_start_every": 10},
}  # fmt: skip


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "untwine", "train", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[bytes]) -> int:
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, -9, 130, 143), errors.decode()
    return process.returncode


def wait_for(run: Path, stage: str, count: int, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 90
    while len(rows(run, stage)) < count:
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe file, run directory of a run that was never interrupted)."""
    folder = tmp_path_factory.mktemp("unbroken")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    assert finish(start(str(recipe), "--run", str(folder / "run"))) == 0
    return recipe, folder / "run"


def board(run: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of every TensorBoard point, in the order they were written."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_same(run: Path, reference: Path) -> None:
    assert_same_weights(run, reference)
    for stage in ("cold_start", "rl", "evaluate"):
        assert steady(rows(run, stage)) == steady(rows(reference, stage))
    assert board(run, "rl/outcome_mean") == board(reference, "rl/outcome_mean")
    for folder in ("episodes", "diagnose"):
        assert contents(run / folder) == contents(reference / folder)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("stage", "count", "signum"),
    [
        ("cold_start", 14, signal.SIGKILL),
        ("rl", 4, signal.SIGKILL),
        ("rl", 1, signal.SIGTERM),
        pytest.param("rl", 1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("rl", 4, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("cold_start", 14, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_killed_run_continues_bit_for_bit(
    unbroken: tuple[Path, Path], tmp_path: Path, stage: str, count: int, signum: signal.Signals
) -> None:
    recipe, reference = unbroken
    run = tmp_path / "run"
    process = start(str(recipe), "--run", str(run))
    wait_for(run, stage, count, process)
    process.send_signal(signum)
    code = finish(process)
    assert code == (-9 if signum is signal.SIGKILL else 143)
    if signum is signal.SIGTERM:
        assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert finish(start("--resume", str(run))) == 0
    assert_same(run, reference)


def test_two_processes_do_not_work_on_one_run(unbroken: tuple[Path, Path], tmp_path: Path) -> None:
    _, reference = unbroken
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    before = (run / "recipe.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    with (run / "metrics.jsonl").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        process = start("--resume", str(run), "rl.iterations=9")
        _, said = process.communicate(timeout=120)
        assert process.returncode == CheckpointError.exit_code
        assert b"another process is at work" in said
    assert ((run / "recipe.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before


def test_a_finished_run_can_be_extended(unbroken: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, reference = unbroken
    run = tmp_path / "run"
    assert finish(start(str(recipe), "--run", str(run), "rl.iterations=4")) == 0
    assert finish(start("--resume", str(run), "rl.iterations=6")) == 0
    assert_same_weights(run, reference)


def test_adapters_continue_bit_for_bit(unbroken: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = unbroken
    small = ("policy.lora.rank=2", "cold_start.steps=10", "rl.iterations=4", "evaluate.every=0")
    run, reference = tmp_path / "run", tmp_path / "reference"
    assert finish(start(str(recipe), "--run", str(reference), *small)) == 0
    process = start(str(recipe), "--run", str(run), *small)
    wait_for(run, "rl", 2, process)
    process.kill()
    assert finish(process) == -9
    assert finish(start("--resume", str(run))) == 0
    assert_same(run, reference)
    kept = [load_file(file) for file in (run / "checkpoints").glob("*/model.safetensors")]
    assert kept
    assert all(any("lora" in name for name in weights) for weights in kept)
