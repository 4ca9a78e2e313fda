"""Runs in parallel processes, one thread each, at most so many at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from untwine.config import Recipe
from untwine.training.run_dir import metric_rows


@dataclass(frozen=True, slots=True)
class Job:
    """One run to be carried out. Beside its folder `run` lie `RUN.yaml` and `RUN.log`.

    after  run of another job that must be finished first
    """

    title: str
    recipe: Recipe
    run: Path
    after: Path | None = None

    @property
    def log(self) -> Path:
        return self.run.with_name(f"{self.run.name}.log")

    @property
    def units(self) -> int:
        """Steps of the cold start and iterations."""
        cold = self.recipe.cold_start
        return (cold.steps if cold.episodes else 0) + self.recipe.rl.iterations

    def done_units(self) -> int:
        return sum(len(metric_rows(self.run, stage)) for stage in ("cold_start", "rl"))


class Crew:
    """Processes that carry out jobs; they end with this context, and save before they do."""

    def __init__(self, jobs: Sequence[Job], limit: int) -> None:
        self._waiting = list(jobs)
        self._limit = limit
        self._processes: dict[Path, tuple[Job, subprocess.Popen[bytes]]] = {}
        self.finished: list[Job] = []
        self.failed: dict[Path, str] = {}
        """Run folder -> one line that says why."""

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._processes)

    @property
    def running(self) -> list[Job]:
        return [job for job, _ in self._processes.values()]

    def tend(self) -> list[Job]:
        """Take note of what has ended, start what can be; the jobs that ended since last time."""
        ended = []
        for run, (job, process) in list(self._processes.items()):
            if process.poll() is None:
                continue
            del self._processes[run]
            ended.append(job)
            _close_pipe(process)
            if process.returncode:
                self.failed[run] = _reason(process.returncode, job.log)
            else:
                self.finished.append(job)
        return ended + self._start()

    def _start(self) -> list[Job]:
        lost = []
        for job in list(self._waiting):
            if job.after in self.failed:
                self._waiting.remove(job)
                self.failed[job.run] = f"{job.after} failed, which it begins with"
                lost.append(job)
            elif len(self._processes) < self._limit and not self._pending(job.after):
                self._waiting.remove(job)
                self._processes[job.run] = (job, _launch(job))
        return lost

    def _pending(self, run: Path | None) -> bool:
        return run is not None and run in {*self._processes, *(job.run for job in self._waiting)}

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._waiting.clear()
        for _, process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for _, process in self._processes.values():
            process.wait()
            _close_pipe(process)


def _launch(job: Job) -> subprocess.Popen[bytes]:
    recipe = job.run.with_name(f"{job.run.name}.yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(job.recipe.to_yaml(), encoding="utf-8")
    with job.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "untwine.sweep.worker", str(recipe), str(job.run)],
            stdin=subprocess.PIPE,  # closed when this process ends, however it does
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for this process, which passes it on once
        )


def _close_pipe(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        process.stdin.close()


def _reason(code: int, log: Path) -> str:
    """Why a process failed: the last thing it said, unless it could not speak."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
