"""GCD's mechanism by itself: a policy learns to judge, and nothing else; what of its acting?

    S=runs/gcd-scienceworld-second
    python studies/gcd/judge_only.py $S --arm wrong.held-0.3 --out $S/judge-only

Every run of an arm with GCD gives the policy that it began with, and recorded episodes. From these
weights the verdict loss alone is trained, with AdamW at the learning rate of the run, each step on
the questions of one of its iterations but the last three, in turn. Before it and after each of the
--steps: share of right verdicts on the questions of the last three iterations; over the distinct
steps of the first batch the mean cosine of the gradients of good and flawed steps in different
states (claim 4a of registration.md), of two good and of two flawed ones; mean log pi of good and of
flawed steps; and how the kinds differ in these. Means over runs with Student's 95 % interval;
writes judge_only.json, with the values of each run.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from analysis import each_run, runs_of, summary, with_interval

from untwine.cli import run_guarded
from untwine.config import Recipe
from untwine.diagnose.coupling import cosines, gram
from untwine.diagnose.judging import recorded_objective
from untwine.diagnose.recorded import load_recorded_policy, read_recorded
from untwine.diagnose.run_samples import RunSample, distinct_samples, draw_samples
from untwine.errors import CheckpointError
from untwine.evaluate.statistics import mean
from untwine.gcd.labels import only_from
from untwine.gcd.objectives import Exercise
from untwine.policy.loading import Policy
from untwine.records import Group
from untwine.training.run_dir import episode_files, run_recipe
from untwine.training.update import Updater

KEPT = 3
"""Iterations whose questions are asked and not taught."""
PAIRS = {
    "cosine good-flawed": ("good", "flawed"),
    "cosine good-good": ("good", "good"),
    "cosine flawed-flawed": ("flawed", "flawed"),
}


CONTRASTS = {
    "cosine good-flawed minus good-good": ("cosine good-flawed", "cosine good-good"),
    "cosine good-flawed minus flawed-flawed": ("cosine good-flawed", "cosine flawed-flawed"),
    "log pi good minus flawed": ("log pi good", "log pi flawed"),
}


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a run gives: its recipe, the labelled groups of its iterations, and the distinct steps
    of the first of them."""

    run: Path
    recipe: Recipe
    iterations: Sequence[Sequence[Group]]
    samples: Sequence[RunSample]

    @classmethod
    def of(cls, run: Path, count: int) -> Lesson:
        recipe = run_recipe(run)
        files = episode_files(run)
        if len(files) <= KEPT:
            raise CheckpointError(
                f"{run} has {len(files)} iterations, and more than {KEPT} are needed"
            )
        iterations = [
            [only_from(group, recipe.gcd.taught) for group in read_recorded(file, recipe)]
            for file in files
        ]
        known = distinct_samples(iterations[0], recipe.loss.mean)
        return cls(run, recipe, iterations, draw_samples(known, count, 0))

    def policy(self) -> Policy:
        return load_recorded_policy(self.run, self.recipe, 0).policy

    def exercises(self, policy: Policy, part: slice) -> Iterator[Exercise]:
        """The questions of some iterations; iterations that allow none are left out."""
        objective = recorded_objective(policy, self.recipe)
        if objective is None:
            raise CheckpointError(f"{self.run} has no GCD; choose another arm")
        rng, generator = random.Random(self.recipe.seed), torch.Generator()
        for groups in self.iterations[part]:
            episodes = [episode for group in groups for episode in group.episodes]
            found = objective.exercise(episodes, rng, generator)
            if found is not None:
                yield found


@torch.no_grad()
def right_verdicts(lesson: Lesson, policy: Policy) -> float:
    """Of the questions of the iterations that are not taught."""
    found = list(lesson.exercises(policy, slice(-KEPT, None)))
    right = [float(e.loss(e.rows)[1]["verdict_accuracy"]) * len(e.rows) for e in found]
    return sum(right) / sum(len(e.rows) for e in found)


def measure(lesson: Lesson, policy: Policy) -> dict[str, float]:
    """All that is compared before and after."""
    found = gram(policy.model, [s.sample for s in lesson.samples])
    states = [s.state for s in lesson.samples]
    verdicts = [s.verdict for s in lesson.samples]
    numbers = {"right verdicts": right_verdicts(lesson, policy)}
    cosines_NN = cosines(found.K_NN)
    for name, (one, other) in PAIRS.items():
        values = [
            float(cosines_NN[i, j])
            for i in range(len(states))
            for j in range(len(states))
            if i != j and states[i] != states[j] and (verdicts[i], verdicts[j]) == (one, other)
        ]
        numbers[name] = mean([v for v in values if v == v])  # NaN where a gradient is 0
    for verdict in ("good", "flawed"):
        own = [float(lp) for lp, v in zip(found.logprobs_N, verdicts, strict=True) if v == verdict]
        numbers[f"log pi {verdict}"] = mean(own)
    return with_contrasts(numbers)


def with_contrasts(numbers: Mapping[str, float]) -> dict[str, float]:
    return {**numbers, **{name: numbers[a] - numbers[b] for name, (a, b) in CONTRASTS.items()}}


def course(lesson: Lesson, stages: Sequence[int]) -> list[dict[str, float]]:
    """The measures before learning, and after each number of steps."""
    policy = lesson.policy()
    exercises = list(lesson.exercises(policy, slice(None, -KEPT)))
    recipe = lesson.recipe
    updater = Updater.of_recipe(policy, recipe)
    found = [measure(lesson, policy)]
    for step in range(max(stages)):
        updater.step([], exercises[step % len(exercises)], 1.0)
        if step + 1 in stages:
            found.append(measure(lesson, policy))
    return found


def over_runs(values: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """By measure: the values of each run at the stages, their means, and of each stage minus the
    beginning the mean and its interval."""
    found: dict[str, Any] = {}
    for name in values[0][0]:
        own = [[stage[name] for stage in run] for run in values]
        changes = [[run[k] - run[0] for run in own] for k in range(1, len(own[0]))]
        found[name] = {
            "values": own,
            "means": [mean(column) for column in zip(*own, strict=True)],
            "changes": [summary(change) for change in changes],
        }
    return found


def table(found: Mapping[str, Any], stages: Sequence[int]) -> str:
    head = ["", "before", *(f"after {stage} steps" for stage in stages)]
    lines = [f"| {' | '.join(head)} |", "|---|---:|" + "---|" * len(stages)]
    for name, own in found.items():
        cells = [with_interval(change["mean"], change["interval"]) for change in own["changes"]]
        lines.append(f"| {name} | {own['means'][0]:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", default="30,100,300", help="when to measure")
    parser.add_argument("--samples", type=int, default=128, help="steps of the Gram, at most")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    stages = sorted({int(step) for step in given.steps.split(",")})
    runs = runs_of(given.sweep, given.arm)[: given.runs]
    found = over_runs(each_run(runs, lambda path: course(Lesson.of(path, given.samples), stages)))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "judge_only.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(f"{len(runs)} runs of {given.arm}\n\n{table(found, stages)}")


if __name__ == "__main__":
    run_guarded(main)
