"""Looks through the microscope: `untwine diagnose` on every run of a sweep, each once.

What a look prints as JSON is kept in RUN/looks/NAME.json; the file is there when the look is done.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from untwine.diagnose.cli import app as diagnose
from untwine.errors import ConfigError, Interrupted, nearest
from untwine.progress import Display
from untwine.sweep.plan import Planned
from untwine.sweep.worker import is_finished
from untwine.training.signals import StopRequest

FOLDER = "looks"


@dataclass(frozen=True, slots=True)
class Look:
    """command  of `untwine diagnose`, with its options but without the run; --json is added
    arms     whose runs are looked at; empty: all that have iterations
    """

    name: str
    command: tuple[str, ...]
    arms: tuple[str, ...] = ()

    def file(self, run: Path) -> Path:
        return run / FOLDER / f"{self.name}.json"


def check_looks(looks: Sequence[Look]) -> None:
    """ConfigError when `untwine diagnose` has no such command, or the command no such options."""
    group: Any = typer.main.get_command(diagnose)
    for look in looks:
        name, *options = look.command
        if name not in group.commands:
            raise ConfigError(
                f"look {look.name!r}: `untwine diagnose` has no command {name!r}, but "
                f"{', '.join(group.commands)}.{nearest(name, group.commands)}"
            )
        try:
            group.commands[name].make_context(name, ["RUN", *options, "--json"])
        except Exception as error:
            if not hasattr(error, "format_message"):  # not a fault of the options
                raise
            raise ConfigError(f"look {look.name!r}: {error.format_message()}") from error


def missing_looks(planned: Sequence[Planned], looks: Sequence[Look]) -> dict[Path, list[Look]]:
    """The looks still to be taken of each finished run that was trained by iterations."""
    missing: dict[Path, list[Look]] = {}
    for one in planned:
        run = one.job.run
        if one.job.recipe.rl.iterations and is_finished(run):
            wanted = [look for look in looks if not look.arms or one.arm in look.arms]
            if todo := [look for look in wanted if not look.file(run).exists()]:
                missing[run] = todo
    return missing


def take_looks(
    planned: Sequence[Planned], looks: Sequence[Look], display: Display, limit: int
) -> dict[Path, str]:
    """Take what is missing, `limit` runs at a time and the looks of one run in their order; the
    runs where one failed, with the reason (its later looks are not taken). Raises Interrupted."""
    todo = missing_looks(planned, looks)
    total = sum(map(len, todo.values()))
    failed: dict[Path, str] = {}
    running: dict[Path, subprocess.Popen[bytes]] = {}
    if not total:
        return failed
    display.line(f"{total} looks through the microscope, at {len(todo)} runs")
    try:
        with StopRequest() as stop, display.bar("looks", total, "look") as bar:
            while todo or running:
                for run, process in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        _end(run, todo, process.returncode, failed)
                for run in [r for r in todo if r not in running][: limit - len(running)]:
                    running[run] = _begin(run, todo[run][0])
                bar.update(total - sum(map(len, todo.values())))
                if stop.signum is not None:
                    raise Interrupted(
                        "stopped; start the same command again to take the other looks",
                        stop.signum,
                    )
                time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return failed


def _begin(run: Path, look: Look) -> subprocess.Popen[bytes]:
    target = look.file(run)
    target.parent.mkdir(exist_ok=True)
    command, *options = look.command
    with _scratch(target).open("wb") as out, target.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "untwine", "diagnose", command, str(run), *options, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for this process, which passes it on once
        )


def _end(run: Path, todo: dict[Path, list[Look]], code: int, failed: dict[Path, str]) -> None:
    """Keep what a look found, and take it from the list; after a failure all of the run's."""
    look = todo[run].pop(0)
    target = look.file(run)
    if code == 0:
        _scratch(target).replace(target)
    else:
        log = target.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip()
        reason = log.splitlines()[-1].removeprefix("error: ") if log else f"exit code {code}"
        failed[run] = f"{look.name}: {reason}"
        _scratch(target).unlink()
        todo[run].clear()
    if not todo[run]:
        del todo[run]


def looks_failure(failed: Mapping[Path, str]) -> str:
    """One sentence about all failures."""
    some = "; ".join(f"{run}: {reason}" for run, reason in list(failed.items())[:3])
    return (
        f"looks at {len(failed)} runs failed ({some}), see RUN/{FOLDER}/*.log; the runs themselves "
        "are finished and compared, start the same command again to try the looks again"
    )


def _scratch(target: Path) -> Path:
    return target.with_name(f"{target.name}.{os.getpid()}.partial")
