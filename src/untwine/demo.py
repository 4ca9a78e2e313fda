"""`untwine demo`: the main job end to end, on one small machine.

One cold start; then GRPO and GRPO+GCD from the same cold start, side by side in two processes;
meanwhile the random agent. In the end a table on held-out variations, and a report.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from untwine.config import Recipe, load_recipe, make_recipe
from untwine.cost import cost_text
from untwine.envs.registry import get_catalogue
from untwine.errors import CheckpointError, Interrupted, UntwineError
from untwine.evaluate.command import evaluate_random, with_interval
from untwine.evaluate.identity import decoding_name
from untwine.evaluate.protocol import success_gain
from untwine.progress import Display
from untwine.report import build_report
from untwine.sweep.crew import Crew, Job
from untwine.training.loop import train
from untwine.training.run_dir import metric_rows, run_info
from untwine.training.signals import StopRequest

_ARMS = {"GRPO": "grpo", "GRPO + GCD": "gcd"}
_OBJECTIVE = "generative/ce"


def run_demo(recipe_path: Path, out: Path, overrides: Sequence[str]) -> None:
    """Run the demonstration in `out` and print where the report is."""
    if out.exists():
        raise CheckpointError(f"{out} already exists; delete it or choose another --out")
    started = time.perf_counter()
    recipe = load_recipe(recipe_path, overrides)
    own = recipe.gcd.objective
    objectives = {"grpo": "none", "gcd": _OBJECTIVE if own == "none" else own}
    with Display() as display:
        tasks = ", ".join(recipe.env.tasks)
        display.line(f"tasks: {tasks}\n[bold]1/3[/bold] cold start on expert episodes")
        cold = recipe.model_copy(update={"rl": recipe.rl.model_copy(update={"iterations": 0})})
        train(cold, out / "cold", display)
        display.line("[bold]2/3[/bold] GRPO and GRPO + GCD from this cold start, side by side")
        jobs = [_job(recipe, out, name, objective) for name, objective in objectives.items()]
        with Crew(jobs, len(jobs)) as crew:
            crew.tend()
            random_rows = evaluate_random(recipe, recipe.evaluate.sets, 64, display)
            _wait(crew, jobs, out, display)
        display.line("[bold]3/3[/bold] report")
        page = build_report([out / name for name in _ARMS.values()], out / "report.html")
    _print_table(recipe, out, random_rows)
    minutes = (time.perf_counter() - started) / 60
    Console().print(f"report: {page}   ({minutes:.1f} minutes)", highlight=False, soft_wrap=True)


def _job(recipe: Recipe, out: Path, name: str, objective: str) -> Job:
    """One arm, from the common cold start."""
    changes: dict[str, dict[str, Any]] = {
        "policy": {"model": str(out / "cold" / "model"), "threads": 1},
        "env": {"workers": max(1, recipe.env.workers // 2)},
        "cold_start": {"episodes": 0},
        "gcd": {"objective": objective},
    }
    tree = recipe.model_dump()
    for section, values in changes.items():
        tree[section] |= values
    return Job(name, make_recipe(tree | {"name": f"demo-{name}"}), out / name)


def _wait(crew: Crew, jobs: Sequence[Job], out: Path, display: Display) -> None:
    """Show the progress of both arms until they end."""
    total = sum(job.units for job in jobs)
    with StopRequest() as stop, display.bar("iterations", total, "iteration") as bar:
        while crew.busy:
            crew.tend()
            rows = {job.title: metric_rows(job.run, "rl") for job in jobs}
            latest = [f"{name} {own[-1]['outcome_mean']:.2f}" for name, own in rows.items() if own]
            bar.update(sum(len(own) for own in rows.values()), info="outcome " + ", ".join(latest))
            try:
                stop.check()
            except Interrupted as error:
                raise Interrupted(
                    "stopped; the arms are saved, continue each with "
                    f"`untwine train --resume {out}/grpo` (or gcd)",
                    error.signum,
                ) from None
            time.sleep(1.0)
    for run, reason in crew.failed.items():
        raise UntwineError(f"the arm {run.name} failed: {reason}")


def _print_table(recipe: Recipe, out: Path, random_rows: Sequence[dict[str, Any]]) -> None:
    place = get_catalogue(recipe.env.name, recipe.env.options).info.title
    examined = recipe.evaluate
    said = decoding_name(examined.greedy, examined.temperature)
    table = Table(
        title=f"{place}, held-out variations, in percent",
        caption=f"actions {said}; 95 % intervals; gains in success are over the cold start, "
        "instance by instance",
    )
    table.add_column("policy")
    for name in recipe.evaluate.sets:
        table.add_column(f"{name} score", justify="right")
        table.add_column(f"{name} success", justify="right")
        table.add_column("gain", justify="right")
    phases = {
        "random commands": list(random_rows),
        "cold start": metric_rows(out / "cold", "evaluate"),
    }
    arms = {f"after {title}": out / name for title, name in _ARMS.items()}
    for title, run in arms.items():
        last = run_info(run).get("iterations", recipe.rl.iterations)
        phases[title] = [row for row in metric_rows(run, "evaluate") if row["step"] == last]
    start = {row["set"]: row for row in phases["cold start"]}
    for title, rows in phases.items():
        by_set = {row["set"]: row for row in rows}
        cells: list[str] = []
        for name in recipe.evaluate.sets:
            row = by_set[name]
            cells.append(with_interval(row["outcome_mean"], row["outcome_interval"]))
            cells.append(with_interval(row["success_rate"], row["success_interval"]))
            gain = with_interval(*success_gain(start[name], row)) if title in arms else ""
            cells.append(gain)
        table.add_row(title, *cells)
    Console().print(table)
    for title in ("cold start", *arms):
        if cost := cost_text(phases[title][-1]):
            Console().print(f"{title}: {cost}", highlight=False, soft_wrap=True)
