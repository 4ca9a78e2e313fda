"""What keeps punished flaws alive on ScienceWorld (scienceworld.md, "Cause"): whether credit that
is taken out has the effect that the Gram of the first batch says.

    S=runs/gcd-scienceworld-second
    python studies/gcd/cause.py $S --out $S/cause

Probes are the punished steps of the first batch of a run of `grpo` that the rules call invalid, no
other label on record contradicting them, and that begin with --word. For every arm with credit
taken out, and every seed that it has in common with `grpo`:

predicted  first-order change of log pi of the probes in one step with the arm's weights, minus that
           with the weights of `grpo`; mean over the probes, in units of what they do to themselves
measured   change of log pi of the same prompts and commands from before training to after it, minus
           that under `grpo`; mean over the probes, in nats

An arm is *confirmed* when the 95 % interval of `measured` lies on the predicted side of 0,
*refuted* when on the other, else *undecided*. Writes cause.json, with the values of each pair, and
cause.svg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analysis import check_sweep, with_interval
from without import begins_with, taken_out

from untwine.batch import LossMean
from untwine.cli import run_guarded
from untwine.compare.runs import Run, find_runs, paired
from untwine.config import Recipe
from untwine.credit.by_label import labels_alone, penalise, veto
from untwine.diagnose.calibration import rank_correlation
from untwine.diagnose.coupling import gram
from untwine.diagnose.recorded import load_recorded_policy, read_recorded
from untwine.diagnose.run_samples import RunSample, distinct_samples
from untwine.diagnose.scoring import log_probabilities
from untwine.drawing import COLOURS, drawing
from untwine.errors import CheckpointError
from untwine.evaluate.aggregate import PairedDifference, paired_difference
from untwine.progress import Display
from untwine.records import Group
from untwine.training.run_dir import episode_files, run_recipe

PLAIN = "grpo"
Credit = Callable[[Group], Group]


def credit_of(recipe: Recipe) -> Credit | None:
    """What an arm makes of the advantages of `grpo`; None where it leaves them, or makes its own by
    another method."""
    credit = recipe.credit
    if credit.name == "studies.gcd.without:without":
        return lambda group: group.with_advantages(taken_out(group, **credit.options))
    if credit.name == "studies.gcd.without:rules_only":
        return lambda group: labels_alone(group, ["rule"])
    taught = recipe.gcd.taught
    if credit.name == "labels":
        return lambda group: labels_alone(group, credit.options.get("sources") or taught)
    if credit.name == PLAIN and (credit.veto or credit.penalty):
        return lambda group: veto(penalise(group, credit.penalty, taught), credit.veto, taught)
    return None


@dataclass(frozen=True, slots=True)
class Batch:
    """The first batch of a run: its groups, its distinct samples, their Gram, and which of them are
    probes."""

    groups: Sequence[Group]
    mean: LossMean
    samples: Sequence[RunSample]
    K_NN: torch.Tensor
    probe_N: torch.Tensor

    def change(self, credit: Credit) -> float:
        """Mean first-order change of the probes with other weights, minus that with their own, in
        units of what they do to themselves."""
        own_N = self.weights(lambda group: group)
        other_N = self.weights(credit)
        change_N = self.K_NN @ (other_N - own_N)
        self_N = (self.K_NN.diagonal() * own_N).abs()
        return float(change_N[self.probe_N].mean() / self_N[self.probe_N].mean())

    def weights(self, credit: Credit) -> torch.Tensor:
        """A weight for each sample, with the advantages that `credit` makes."""
        samples = distinct_samples([credit(group) for group in self.groups], self.mean)
        return torch.tensor([s.weight for s in samples], dtype=torch.float64)


def is_probe(sample: RunSample, word: str) -> bool:
    return sample.kind == "invalid" and sample.weight < 0 and begins_with(sample.step) == word


def first_batch(run: Path, word: str) -> Batch:
    """CheckpointError when the run has no probes, or no longer the policy that it began with."""
    recipe = run_recipe(run)
    groups = read_recorded(episode_files(run)[0], recipe)
    samples = distinct_samples(groups, recipe.loss.mean)
    probe_N = torch.tensor([is_probe(sample, word) for sample in samples])
    if not probe_N.any():
        raise CheckpointError(f"the first batch of {run} has no punished invalid steps of {word!r}")
    policy = load_recorded_policy(run, recipe, 0).policy
    found = gram(policy.model, [s.sample for s in samples])
    return Batch(groups, recipe.loss.mean, samples, found.K_NN, probe_N)


def logprobs_after(run: Path, samples: Sequence[RunSample]) -> np.ndarray[Any, Any]:
    policy = load_recorded_policy(run, run_recipe(run), 0, str(run / "model")).policy
    return np.asarray(log_probabilities(policy.model, [s.sample for s in samples]))


@dataclass(frozen=True, slots=True)
class Arm:
    """values  (seed, predicted, measured) of each pair; predicted and measured as above"""

    name: str
    values: list[tuple[int, float, float]]
    difference: PairedDifference
    predicted: float

    @property
    def verdict(self) -> str:
        low, high = self.difference.interval or (-np.inf, np.inf)
        if low <= 0 <= high:
            return "undecided"
        return "confirmed" if (low > 0) == (self.predicted > 0) else "refuted"


def arms_of(runs: Mapping[str, Sequence[Run]], level: str) -> dict[str, list[tuple[Run, Run]]]:
    """By arm with credit taken out, its runs beside those of `grpo` from the same start."""
    plain = runs.get(f"{level}.{PLAIN}", [])
    pairs = {
        name: paired(own, plain)
        for name, own in runs.items()
        if name.startswith(f"{level}.") and credit_of(own[0].recipe) is not None
    }
    return {name: own for name, own in pairs.items() if len(own) > 1}


def measure(pairs: Mapping[str, Sequence[tuple[Run, Run]]], word: str) -> list[Arm]:
    """What was predicted and measured of each arm."""
    plain = {other.path: other.seed for own in pairs.values() for _, other in own}
    values: dict[str, list[tuple[int, float, float]]] = {name: [] for name in pairs}
    with Display() as display, display.bar("runs", len(plain), "run") as bar:
        for done, (path, seed) in enumerate(plain.items()):
            batch = first_batch(path, word)
            probes = [s for s, is_one in zip(batch.samples, batch.probe_N, strict=True) if is_one]
            base_P = logprobs_after(path, probes)
            for name, own in pairs.items():
                for run, _ in (pair for pair in own if pair[1].path == path):
                    credit = credit_of(run.recipe)
                    assert credit is not None  # arms_of leaves others out
                    gained = float((logprobs_after(run.path, probes) - base_P).mean())
                    values[name].append((seed, batch.change(credit), gained))
            bar.update(done + 1)
    return [_arm(name, sorted(own)) for name, own in values.items()]


def _arm(name: str, values: list[tuple[int, float, float]]) -> Arm:
    _, predicted, measured = np.array(values).T
    difference = paired_difference(measured, np.zeros(len(measured)))
    return Arm(name, values, difference, float(predicted.mean()))


def agreement(arms: Sequence[Arm]) -> float | None:
    """Spearman's rank correlation of predicted and measured over all pairs of all arms."""
    predicted, measured = np.array([(p, m) for arm in arms for _, p, m in arm.values]).T
    return rank_correlation(predicted, measured, np.ones(len(predicted)))


def draw(arms: Sequence[Arm], path: Path) -> None:
    with drawing(path, (6.0, 4.0)) as figure:
        axes = figure.subplots()
        for k, arm in enumerate(arms):
            _, predicted, measured = np.array(arm.values).T
            colour = COLOURS[k % len(COLOURS)]
            axes.plot(predicted, measured, "o", ms=4, alpha=0.5, color=colour)
            name = arm.name.partition(".")[2]
            axes.plot(arm.predicted, arm.difference.mean, "D", ms=9, color=colour, label=name)
        axes.axhline(0, color="grey", lw=0.8)
        axes.axvline(0, color="grey", lw=0.8)
        axes.set_xlabel("predicted by the first batch, in units of the self term")
        axes.set_ylabel("measured after training, nats, minus GRPO")
        axes.legend(fontsize=8)


def table(arms: Sequence[Arm]) -> str:
    lines = ["| Arm | Pairs | Predicted | Measured, nats | |", "|---|---:|---:|---|---|"]
    for arm in arms:
        found = arm.difference
        shown = with_interval(found.mean, found.interval)
        lines.append(
            f"| {arm.name} | {found.pairs} | {arm.predicted:+.2f} | {shown} | {arm.verdict} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--level", default="wrong")
    parser.add_argument("--word", default="focus", help="first word of the probes")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    check_sweep(given.sweep)
    pairs = arms_of(find_runs([given.sweep]).arms, given.level)
    if not pairs:
        raise CheckpointError(
            f"{given.sweep} has no two finished pairs of {given.level}.{PLAIN} and an arm with "
            "credit taken out; finish the sweep first"
        )
    arms = measure(pairs, given.word)
    rank = agreement(arms)
    given.out.mkdir(parents=True, exist_ok=True)
    record = {
        "word": given.word,
        "rank_correlation": rank,
        "arms": [{**asdict(arm), "verdict": arm.verdict} for arm in arms],
    }
    (given.out / "cause.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(arms, given.out / "cause.svg")
    print(table(arms))
    print("" if rank is None else f"\nRank correlation over all pairs: {rank:+.2f}")


if __name__ == "__main__":
    run_guarded(main)
