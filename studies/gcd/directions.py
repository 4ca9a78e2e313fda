"""Which use of labels would part right from wrong, in first order, before anything is trained
(docs/study-cause.md).

    S=runs/gcd-scienceworld-second
    python studies/gcd/directions.py $S --arm wrong.grpo --out $S/directions

From the Gram of the first batch of every run: the push, along each direction, on the steps that
begin with --word, those that the rules call good and those that they call invalid, where no other
label on record contradicts them (`group` labels do for about one invalid step in twelve). Only what
comes from samples with other prompts counts, since what was not sampled is to be learnt, too.
Directions have equal length, and pushes are in units of what a direction of that length can do to a
step, the mean over samples of the norm of their gradients.

    grpo       the policy's own gradient
    penalty    the same, less .3 for steps that the rules call flawed
    veto       no advantage contradicts the rules (`credit.veto: [flawed, good]`)
    both       penalty, then veto
    labels     +1 for good and -1 for flawed steps, 0 for all others
    same       the same command where it is good and where it is flawed: for each pair (g, f) of one
               command and two prompts s(f) / n more for g and less for f, with
               s(f) = pi(f) / (pi(f) + pi(g)), n the number of pairs
    level      the same pairs, with gradients of equal length and s = 1

Means over runs with Student's 95 % interval. Writes directions.json, with the values of each run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path

import torch
from analysis import each_run, over_runs, runs_of, summary_table
from cause import Batch, first_batch
from without import begins_with

from untwine.cli import run_guarded
from untwine.credit.by_label import labels_alone, penalise, veto
from untwine.diagnose.analysis import parted
from untwine.errors import CheckpointError
from untwine.gcd.labels import action_key
from untwine.records import Group

PENALTY = 0.3
RULES = ["rule"]
COLUMNS = ("right", "wrong", "right minus wrong")


def vetoed(group: Group) -> Group:
    return veto(group, ["flawed", "good"], RULES)


def penalised(group: Group) -> Group:
    return penalise(group, PENALTY, RULES)


def same_command(batch: Batch, level: bool = False) -> torch.Tensor:
    """Weights (N,) of the direction `same`, or `level`; 0 where no command is both good and
    flawed."""
    samples, length_N = batch.samples, batch.K_NN.diagonal().clamp_min(0).sqrt()
    weights_N = torch.zeros(len(samples), dtype=torch.float64)
    sides: dict[str, list[int]] = {
        verdict: [i for i, s in enumerate(samples) if s.verdict == verdict]
        for verdict in ("good", "flawed")
    }
    pairs = [
        (g, f)
        for g, f in product(sides["good"], sides["flawed"])
        if action_key(samples[g].step) == action_key(samples[f].step)
        and samples[g].sample.prompt_ids != samples[f].sample.prompt_ids
    ]
    for g, f in pairs:
        logits = torch.tensor([samples[f].recorded_logprob, samples[g].recorded_logprob])
        share = float(logits.softmax(0)[0])
        weights_N[g] += 1 / length_N[g] if level else share
        weights_N[f] -= 1 / length_N[f] if level else share
    return weights_N / max(1, len(pairs))


DIRECTIONS: Mapping[str, Callable[[Batch], torch.Tensor]] = {
    "grpo": lambda batch: batch.weights(lambda group: group),
    "penalty": lambda batch: batch.weights(penalised),
    "veto": lambda batch: batch.weights(vetoed),
    "both": lambda batch: batch.weights(lambda group: vetoed(penalised(group))),
    "labels": lambda batch: batch.weights(lambda group: labels_alone(group, RULES)),
    "same": same_command,
    "level": lambda batch: same_command(batch, level=True),
}


def measure(run: Path, word: str) -> dict[str, dict[str, float]]:
    """By direction, mean pushes on right and on wrong steps. CheckpointError where the first batch
    lacks either."""
    batch = first_batch(run, word)
    said_N = torch.tensor([begins_with(s.step) == word for s in batch.samples])
    right_N = said_N & torch.tensor([s.verdict == "good" for s in batch.samples])
    wrong_N = said_N & torch.tensor([s.kind == "invalid" for s in batch.samples])
    if not right_N.any() or not wrong_N.any():
        raise CheckpointError(f"the first batch of {run} has no right, or no wrong, step of {word}")
    prompts = [s.sample.prompt_ids for s in batch.samples]
    found = {}
    for name, direction in DIRECTIONS.items():
        apart = parted(batch.K_NN, direction(batch), right_N, wrong_N, prompts)
        values = (apart.good, apart.flawed, apart.difference)
        found[name] = dict(zip(COLUMNS, values, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--word", default="focus", help="first word of the steps that are followed")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    runs = runs_of(given.sweep, given.arm)
    found = over_runs(each_run(runs, partial(measure, word=given.word)), COLUMNS)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "directions.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(f"{len(runs)} runs of {given.arm}, first batch, {given.word!r}\n")
    print(summary_table("Direction", found))


if __name__ == "__main__":
    run_guarded(main)
