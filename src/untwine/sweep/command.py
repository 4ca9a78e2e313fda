"""`untwine sweep`: many small runs side by side, taken up where they were left, then compared."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from untwine.compare.numbers import MEASURES, compare_runs
from untwine.compare.show import write_comparison
from untwine.errors import ConfigError, Interrupted, UntwineError
from untwine.progress import Display
from untwine.report.run_data import number
from untwine.sweep.crew import Crew, Job
from untwine.sweep.lock import locked
from untwine.sweep.looks import Look, check_looks, looks_failure, take_looks
from untwine.sweep.plan import LOCK, Planned, check_arms, check_examined, check_folder, write_plan
from untwine.sweep.worker import is_finished
from untwine.training.run_dir import metric_rows
from untwine.training.signals import StopRequest

_MOST_FAILURES_SHOWN = 3


def run_sweep(
    planned: Sequence[Planned],
    out: Path,
    display: Display,
    *,
    jobs: int = 0,
    measure: str = "success",
    looks: Sequence[Look] = (),
) -> tuple[dict[str, Any], Path]:
    """Carry out what is missing of the planned runs in `out`; the comparison and its page.

    jobs   processes at a time; 0: as many as there are cores
    looks  through the microscope, at every finished run

    Arms, looks and measure are checked before the first run is begun.
    Raises Interrupted after a signal, when every run has been saved, and UntwineError when runs
    failed: the others are finished first, and compared.
    """
    if measure not in MEASURES:
        raise ConfigError(f"unknown measure {measure!r}; it is {' or '.join(MEASURES)}")
    check_looks(looks)
    check_arms(planned)
    check_examined(planned)
    check_folder(out)
    with locked(out / LOCK):
        write_plan(out, planned)
        failed = _carry_out(planned, out, display, jobs or available_cores())
        unseen = take_looks(planned, looks, display, jobs or available_cores())
    if len(failed) == len(planned):
        raise UntwineError(_failure(failed, planned, "all runs of the sweep failed"))
    try:
        numbers = compare_runs([out], measure=measure)
        page = write_comparison(numbers, out)
    except UntwineError as error:
        if failed:
            raise UntwineError(_failure(failed, planned)) from error
        raise
    if failed:
        also = f"; {looks_failure(unseen)}" if unseen else ""
        raise UntwineError(f"{_failure(failed, planned)}; the others are compared in {page}{also}")
    if unseen:
        raise UntwineError(looks_failure(unseen))
    return numbers, page


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _carry_out(
    planned: Sequence[Planned], out: Path, display: Display, limit: int
) -> dict[Path, str]:
    """Runs that failed, with the reason."""
    missing = [one.job for one in planned if not is_finished(one.job.run)]
    kept = len(planned) - len(missing)
    display.line(
        f"{len(planned)} runs in {out}: {kept} finished before, {len(missing)} to do, "
        f"{min(limit, len(missing))} at a time"
    )
    todo = sum(job.units for job in missing)
    with (
        StopRequest() as stop,
        Crew(missing, limit) as crew,
        display.bar("sweep", todo, "step") as bar,
    ):
        done = 0
        while True:
            for job in crew.tend():
                done += job.units
                _report(job, crew, len(missing), display)
            if not crew.busy:
                return crew.failed
            under_way = [(job, job.done_units()) for job in crew.running]
            info = ", ".join(f"{job.title} {n}/{job.units}" for job, n in under_way)
            bar.update(done + sum(n for _, n in under_way), info=info)
            if stop.signum is not None:
                raise Interrupted(
                    "stopped; every run is saved, start the same command again to go on",
                    stop.signum,
                )
            time.sleep(0.5)


def _report(job: Job, crew: Crew, total: int, display: Display) -> None:
    """A line about a job that ended."""
    count = f"{len(crew.finished) + len(crew.failed)} of {total}"
    if job.run in crew.failed:
        display.line(f"[red]failed[/red]   {job.title} ({count}): {crew.failed[job.run]}")
        return
    last = {str(row.get("set")): row for row in metric_rows(job.run, "evaluate")}
    rates = {name: number(row.get("success_rate")) for name, row in last.items()}
    found = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items() if rate is not None)
    display.line(f"finished {job.title} ({count}): success {found or 'not evaluated'}")


def _failure(failed: dict[Path, str], planned: Sequence[Planned], what: str = "") -> str:
    what = what or f"{len(failed)} of {len(planned)} runs failed"
    some = list(failed.items())[:_MOST_FAILURES_SHOWN]
    reasons = "; ".join(f"{run}: {reason}" for run, reason in some)
    more = f"; and {len(failed) - len(some)} more" if len(failed) > len(some) else ""
    return (
        f"{what} ({reasons}{more}), see the .log beside each; what is finished is kept, start the "
        "same command again to go on"
    )
