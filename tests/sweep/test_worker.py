"""What one process of a crew does with a run: begin it, continue it, or leave it alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.runs import rows
from tests.training.test_resume import RECIPE
from untwine.config import Recipe, make_recipe
from untwine.progress import Display
from untwine.sweep.crew import Crew, Job
from untwine.sweep.lock import locked
from untwine.sweep.worker import carry_out, is_finished
from untwine.training.loop import train
from untwine.training.run_dir import finish_replacing, replace_folder

TREE = {
    **RECIPE,
    "rl": {"iterations": 2, "groups": 2, "group_size": 4},
    "loss": {},
    "evaluate": {"sets": ["L0"], "episodes": 4},
}


@pytest.fixture
def recipe() -> Recipe:
    return make_recipe(TREE)


def weights(run: Path) -> bytes:
    tensors = load_file(run / "model" / "model.safetensors")
    return b"".join(tensors[name].tobytes() for name in sorted(tensors))


def test_runs_are_begun_continued_and_left_alone(recipe: Recipe, tmp_path: Path) -> None:
    run, display = tmp_path / "run", Display(quiet=True)
    run.mkdir()
    (run / "recipe.yaml").write_text("half a rec")  # killed before the first checkpoint
    carry_out(recipe, run, display)
    assert is_finished(run)
    found, written = weights(run), (run / "metrics.jsonl").stat().st_mtime_ns
    carry_out(recipe, run, display)
    assert (run / "metrics.jsonl").stat().st_mtime_ns == written

    shorter = make_recipe(TREE | {"rl": {**TREE["rl"], "iterations": 1}})  # type: ignore[dict-item]
    other = tmp_path / "other"
    train(shorter, other, display)
    (other / "recipe.yaml").write_text(recipe.to_yaml())
    (other / "run.json").write_text('{"status": "running"}')  # killed after one iteration
    carry_out(recipe, other, display)
    assert len(rows(other)) == 2
    assert weights(other) == found


def test_a_kill_between_two_models_leaves_one(tmp_path: Path) -> None:
    new, target = tmp_path / ".model-partial", tmp_path / "model"
    for folder, text in ((new, "new"), (target, "old")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    finish_replacing(new, target)  # the new one may be half-written
    assert (target / "config.json").read_text() == "old"
    (target / "config.json").unlink()
    target.rmdir()  # where replace_folder was killed
    finish_replacing(new, target)
    assert (target / "config.json").read_text() == "new"
    finish_replacing(new, target)
    new.mkdir()
    replace_folder(new, target)
    assert not list(target.iterdir())


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "run.lock"
    hold = (
        "import sys, time; from pathlib import Path; from untwine.sweep.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(file)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    take = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    tried = subprocess.run([sys.executable, "-c", take, str(file)], capture_output=True)
    assert b"BlockingIOError" in tried.stderr
    holder.kill()
    holder.communicate()
    with locked(file):
        pass


def test_a_job_waits_for_another_and_fails_with_it(recipe: Recipe, tmp_path: Path) -> None:
    """A recipe that no environment can play fails at once; what begins with it is never started."""
    broken = make_recipe(TREE | {"env": {"name": "rooms", "tasks": ["fetsh"]}})
    first = Job("first", broken, tmp_path / "first")
    second = Job("second", recipe, tmp_path / "second", after=first.run)
    assert (first.units, second.units) == (32, 32)
    ended: list[Job] = []
    with Crew([first, second], limit=2) as crew:
        while crew.busy:
            ended += crew.tend()
            assert [job.title for job in crew.running] in (["first"], [])
    assert [job.title for job in ended] == ["first", "second"]
    assert "Did you mean 'fetch'" in crew.failed[first.run]
    assert "failed, which it begins with" in crew.failed[second.run]
    assert not second.run.exists()
