"""One run of a crew, in a process of its own: `python -m untwine.sweep.worker RECIPE RUN`.

The process does whatever is missing of the run: all of it, the rest after the last checkpoint, or
nothing. It holds a lock beside the run meanwhile, so that two of them never write to one folder,
and it stops as after SIGTERM (it saves first) when the process that started it is gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from untwine.config import Recipe, load_recipe
from untwine.progress import Display
from untwine.sweep.lock import locked
from untwine.training.checkpoint import list_checkpoints
from untwine.training.loop import train
from untwine.training.run_dir import run_info, run_recipe


def carry_out(recipe: Recipe, run: Path, display: Display) -> None:
    """Begin a run, or continue it exactly, until it is finished."""
    if is_finished(run):
        return
    if list_checkpoints(run / "checkpoints"):
        train(run_recipe(run), run, display, resume=True)
        return
    shutil.rmtree(run, ignore_errors=True)  # stopped before its first checkpoint
    train(recipe, run, display)


def is_finished(run: Path) -> bool:
    return run_info(run).get("status") == "finished"


def _stop_with_parent() -> None:
    """Standard input is a pipe that the parent never writes to: its end is the parent's."""

    def wait() -> None:
        if not os.read(0, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _work() -> None:
    recipe, run = map(Path, sys.argv[1:])
    _stop_with_parent()
    with locked(run.with_name(f"{run.name}.lock")), Display() as display:
        carry_out(load_recipe(recipe), run, display)


if __name__ == "__main__":
    from untwine.cli import run_guarded

    run_guarded(_work)
