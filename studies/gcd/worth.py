"""What steps with a label are worth in the study of GCD (end of registration.md): the mean true
advantage of the steps that a label source calls flawed, and of those it calls good.

    for run in runs/gcd-held/arms/wrong.grpo/seed-?{,?}/; do
      untwine diagnose labels $run --sources rule,group,expert gcd.expert=search
    done
    python studies/gcd/worth.py runs/gcd-held --arm wrong.grpo --out runs/gcd-held/worth

Reads RUN/diagnose/labels.json; mean and Student's 95 % interval over runs, each run counting once.
Writes worth.json, with the values of each run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis import check_sweep, read_numbers, summary, with_interval

from untwine.cli import run_guarded
from untwine.compare.runs import find_runs
from untwine.errors import CheckpointError

MEANS = {"flawed_mean": "flawed", "good_mean": "good", "difference": "good minus flawed"}


def worth_of(files: Sequence[Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """By source and measure: `values` of the runs that have one, `mean` and `interval` over them
    (None for a single run)."""
    again = "run `untwine diagnose labels` again"
    sources = [read_numbers(file, again).get("sources", {}) for file in files]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for source in sorted({name for each in sources for name in each}):
        found[source] = {}
        for key in MEANS:
            known = [each.get(source, {}).get("worth", {}).get(key) for each in sources]
            values = [one["value"] for one in known if one]
            if values:
                found[source][key] = summary(values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    check_sweep(given.sweep)
    runs = find_runs([given.sweep]).arms.get(given.arm, [])
    files = [file for run in runs if (file := run.path / "diagnose" / "labels.json").exists()]
    if not files:
        raise CheckpointError(
            f"no run of arm {given.arm!r} in {given.sweep} has measured labels; "
            "`untwine diagnose labels RUN` does it"
        )
    found = worth_of(files)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "worth.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("| Source | Called | runs | mean true advantage |\n|---|---|---|---|")
    for source, means in found.items():
        for key, over in means.items():
            shown = with_interval(over["mean"], over["interval"])
            print(f"| {source} | {MEANS[key]} | {len(over['values'])} | {shown} |")


if __name__ == "__main__":
    run_guarded(main)
