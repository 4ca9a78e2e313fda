"""The answer of the study in one picture: what each use of the labels changes beside GRPO.

    python studies/gcd/headline.py --out docs/figures/study-headline.svg

Success and flawed steps on L1 minus those of the GRPO run from the same cold start, from the
results beside this file with 1500 episodes a run: a dot for each of 16 pairs, mean and Student's
95 % interval.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from untwine.cli import run_guarded
from untwine.drawing import drawing
from untwine.errors import CheckpointError
from untwine.evaluate.aggregate import paired_difference

RESULTS = Path(__file__).with_name("results")
ROWS = {
    "ALFWorld: GCD": ("held-1500.json", "wrong.held-0.3"),
    "ALFWorld: labels as veto": ("held-1500.json", "wrong.veto"),
    "ScienceWorld: GCD": ("scienceworld-1500.json", "wrong.held-0.3"),
    "ScienceWorld: labels as veto": ("scienceworld-1500.json", "wrong.veto"),
    "ScienceWorld: labels alone": ("scienceworld-1500.json", "wrong.rules"),
}
MEASURES = {"success L1": "success", "flawed L1": "flawed steps per step"}


def values_of(file: Path, arm: str, measure: str) -> tuple[list[float], list[float]]:
    """What secondary.py wrote for the pairs of an arm: its own values, and the plain arm's."""
    for line in json.loads(file.read_text("utf-8")):
        if line["arm"] == arm and line["values"].get(measure):
            _, ours, plain = zip(*line["values"][measure], strict=True)
            return list(ours), list(plain)
    raise CheckpointError(f"{file} has no {measure} of the arm {arm}; make it anew (secondary.py)")


def draw(folder: Path, path: Path) -> None:
    with drawing(path, (8.5, 2.8)) as figure:
        both = figure.subplots(1, 2, sharey=True)
        for axes, (measure, name) in zip(both, MEASURES.items(), strict=True):
            for place, (file, arm) in enumerate(ROWS.values()):
                ours, plain = map(np.array, values_of(folder / file, arm, measure))
                found = paired_difference(ours, plain)
                axes.plot(ours - plain, np.full(len(ours), place), "o", ms=3, alpha=0.3, color="C0")
                if found.interval:
                    axes.hlines(place, *found.interval, lw=3, color="black", alpha=0.6)
                axes.plot(found.mean, place, "|", ms=11, mew=2, color="black")
            axes.axvline(0, color="grey", lw=0.8)
            axes.set_yticks(range(len(ROWS)), list(ROWS))
            axes.set_ylim(len(ROWS) - 0.5, -0.5)
            axes.locator_params(axis="x", nbins=5)
            axes.set_xlabel(f"{name} on L1, minus GRPO")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    draw(RESULTS, given.out)


if __name__ == "__main__":
    run_guarded(main)
