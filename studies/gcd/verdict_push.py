"""What learning to judge does to acting, in first order, over the runs of an arm
(docs/study-cause.md).

    S=runs/gcd-scienceworld-second
    python studies/gcd/verdict_push.py $S --arm wrong.held-0.3 --out $S/verdict-push

`untwine diagnose judging` on the first batch of every run, before training, over all its steps; of
permuted labels the mean over --draws. Means over runs with Student's 95 % interval. A step of GCD
held at .3 adds .3 times the verdict's numbers to the policy's. Writes verdict_push.json, with the
values of each run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from analysis import each_run, over_runs, runs_of, summary_table

from untwine.cli import run_guarded
from untwine.diagnose.judging import JudgingOptions, measure_judging
from untwine.diagnose.recorded import load_recorded_policy, read_recorded
from untwine.evaluate.statistics import mean
from untwine.progress import Display
from untwine.training.run_dir import episode_files, run_recipe

SETS = ("good", "flawed", "difference")
EVERY_STEP = 1_000_000


def changes(run: Path, draws: int) -> dict[str, dict[str, float]]:
    """By direction (policy, verdict, permuted) the mean changes of good and of flawed steps."""
    recipe = run_recipe(run)
    found = measure_judging(
        load_recorded_policy(run, recipe, 0).policy,
        recipe,
        read_recorded(episode_files(run)[0], recipe),
        JudgingOptions(EVERY_STEP, draws),
        Display(quiet=True),
    )
    permuted = {part: mean([row[part] for row in found["permuted"]]) for part in SETS}
    return {"policy": found["policy"], "verdict": found["verdict"], "permuted": permuted}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--arm", required=True)
    parser.add_argument(
        "--draws", type=int, default=8, help="permutations of the labels, 1 or more"
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    runs = runs_of(given.sweep, given.arm)
    found = over_runs(each_run(runs, lambda path: changes(path, given.draws)), SETS)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "verdict_push.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(f"{len(runs)} runs of {given.arm}, first batch\n")
    print(summary_table("Gradient of", found))


if __name__ == "__main__":
    run_guarded(main)
