"""Pictures of the study of GCD beside the registered table of claims (analysis.py).

    python studies/gcd/pictures.py runs/gcd-study --out docs/figures

study-pairs.svg   success of GCD minus GRPO, a dot for each pair of runs from one cold start
study-course.svg  success, flawed steps and right verdicts over the iterations, mean and range of
                  the middle half of the runs

Options choose another arm of GCD, its sets, and what the files are called.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from untwine.cli import run_guarded
from untwine.compare.runs import Found, Run, find_runs, paired, rows_on
from untwine.drawing import drawing
from untwine.evaluate.aggregate import paired_difference

GRPO = "grpo"
COURSES = {
    "success_rate": "success in training",
    "flawed_rate": "flawed steps per step",
    "verdict_accuracy": "right verdicts",
}


def differences(found: Found, level: str, gcd: str, set_name: str) -> list[float]:
    """Success of the arm `gcd` minus that of GRPO on a set, for each pair from one cold start with
    one seed, after training."""
    pairs = paired(*(found.arms.get(f"{level}.{arm}", []) for arm in (gcd, GRPO)))
    rows = rows_on([run for pair in pairs for run in pair], set_name) if pairs else {}
    success = {path: float(row["success_rate"]) for path, row in rows.items()}
    return [success[run.path] - success[other.path] for run, other in pairs]


def draw_pairs(found: Found, level: str, gcd: str, sets: Sequence[str], path: Path) -> None:
    with drawing(path, (7.0, 0.8 + 0.6 * len(sets))) as figure:
        axes = figure.subplots()
        for place, name in enumerate(sets):
            values = np.array(differences(found, level, gcd, name))
            axes.plot(values, np.full(len(values), place), "o", ms=4, alpha=0.5)
            pair = paired_difference(values, np.zeros(len(values)))
            if pair.interval:
                axes.hlines(place + 0.25, *pair.interval, lw=3, color="black", alpha=0.6)
            axes.plot(pair.mean, place + 0.25, "|", ms=10, mew=2, color="black")
        axes.axvline(0, color="grey", lw=0.8)
        axes.set_yticks(range(len(sets)), list(sets))
        axes.set_ylim(len(sets) - 0.4, -0.4)
        axes.set_xlabel("success, GRPO + GCD minus GRPO (line: mean and 95 % interval)")


def course(runs: Sequence[Run], key: str) -> list[list[float]]:
    """The values of a metric at each iteration that at least half of the runs have reached."""
    longest = max((len(run.data.rl) for run in runs), default=0)
    columns: list[list[float]] = []
    for iteration in range(longest):
        rows: list[Mapping[str, Any]] = [
            run.data.rl[iteration] for run in runs if iteration < len(run.data.rl)
        ]
        values = [float(row[key]) for row in rows if row.get(key) is not None]
        if 2 * len(values) < len(runs):
            break
        columns.append(values)
    return columns


def draw_course(found: Found, level: str, gcd: str, path: Path) -> None:
    with drawing(path, (9.0, 2.8)) as figure:
        for axes, (key, name) in zip(
            figure.subplots(1, len(COURSES)), COURSES.items(), strict=True
        ):
            for color, arm in enumerate((GRPO, gcd)):
                columns = course(found.arms.get(f"{level}.{arm}", []), key)
                if columns:
                    x = np.arange(1, len(columns) + 1)
                    axes.plot(x, [np.mean(c) for c in columns], f"C{color}", label=arm)
                    low, high = zip(*(np.quantile(c, (0.25, 0.75)) for c in columns), strict=True)
                    axes.fill_between(x, low, high, color=f"C{color}", alpha=0.2)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("iteration")
            if axes.lines:
                axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--level", default="wrong")
    parser.add_argument("--gcd", default="gcd-ce", help="the arm beside GRPO")
    parser.add_argument("--sets", default="L0,L1,L2", help="evaluation sets, separated by commas")
    parser.add_argument("--name", default="study", help="what file names begin with")
    given = parser.parse_args()
    found = find_runs([given.sweep])
    given.out.mkdir(parents=True, exist_ok=True)
    pairs, course = (given.out / f"{given.name}-{what}.svg" for what in ("pairs", "course"))
    draw_pairs(found, given.level, given.gcd, given.sets.split(","), pairs)
    draw_course(found, given.level, given.gcd, course)


if __name__ == "__main__":
    run_guarded(main)
