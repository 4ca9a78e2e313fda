"""What learning to judge does to acting, in first order (docs/study.md, ScienceWorld).

    S=runs/gcd-scienceworld-second
    python studies/gcd/verdict_push.py $S --arm wrong.held-0.3 --out $S/verdict-push

For the first batch of every run of an arm with GCD, before training: the gradient of the verdict
loss over the questions of the batch, and how much a step down it changes log pi of the recorded
commands; mean over the distinct steps that the rules call good, and flawed, and the difference.
The same for the policy loss, and for the verdict loss with permuted labels (mean over --draws).
All directions have the length of the policy's gradient, and changes are in units of what a step
along the policy's gradient changes on average (root mean square over the steps): a step of GCD held
at .3 adds .3 times the verdict's numbers to the policy's. Means over runs with Student's 95 %
interval. Writes verdict_push.json, with the values of each run.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from analysis import runs_of, summary, with_interval

from untwine.cli import run_guarded
from untwine.config import Recipe
from untwine.diagnose.coupling import push
from untwine.diagnose.recorded import load_recorded_policy, read_recorded
from untwine.diagnose.run_samples import distinct_samples
from untwine.diagnose.scoring import weighted_gradient
from untwine.errors import CheckpointError
from untwine.evaluate.statistics import mean
from untwine.gcd.labels import only_from
from untwine.gcd.objectives import Means, make_objective
from untwine.gcd.shuffling import shuffle_labels
from untwine.policy.loading import Policy
from untwine.progress import Display
from untwine.prompting.prompter import Prompter
from untwine.records import Group
from untwine.training.run_dir import episode_files, run_recipe

Direction = dict[str, torch.Tensor]
SETS = ("good", "flawed", "difference")


def verdict_direction(policy: Policy, recipe: Recipe, groups: Sequence[Group]) -> Direction:
    """Minus the gradient of the verdict loss over all questions that the groups allow.
    CheckpointError when they allow none."""
    prompter = Prompter(policy.chat, recipe.prompt)
    means = Means(policy, prompter, recipe.gcd, recipe.sampling.temperature)
    objective = make_objective(recipe.gcd.objective, means)
    episodes = [episode for group in groups for episode in group.episodes]
    generator = torch.Generator().manual_seed(recipe.seed)
    exercise = objective and objective.exercise(episodes, random.Random(recipe.seed), generator)
    if not exercise:
        raise CheckpointError("the first batch allows no questions; choose an arm with GCD")
    policy.model.zero_grad(set_to_none=True)
    exercise.loss(exercise.rows)[0].backward()  # type: ignore[no-untyped-call]
    return {n: -p.grad for n, p in policy.model.named_parameters() if p.grad is not None}


def scaled(direction: Direction, length: float) -> Direction:
    return {name: value * (length / _norm(direction)) for name, value in direction.items()}


def changes(run: Path, draws: int) -> dict[str, dict[str, float]]:
    """By direction (policy, verdict, permuted) the mean changes of good and of flawed steps."""
    recipe = run_recipe(run)
    groups = [only_from(g, recipe.gcd.taught) for g in read_recorded(episode_files(run)[0], recipe)]
    policy = load_recorded_policy(run, recipe, 0).policy
    chosen = distinct_samples(groups, recipe.loss.mean)
    samples = [s.sample for s in chosen]
    acting = weighted_gradient(policy.model, samples, [s.weight for s in chosen])
    directions = [acting, verdict_direction(policy, recipe, groups)]
    for draw in range(draws):
        wrong = shuffle_labels(groups, random.Random(f"{recipe.seed} {draw}"))
        directions.append(verdict_direction(policy, recipe, wrong))
    names = set.intersection(*(set(d) for d in directions))
    directions = [{name: d[name] for name in names} for d in directions]
    policy.model.zero_grad(set_to_none=True)
    length = _norm(directions[0])
    moved_NB = push(policy.model, samples, [scaled(d, length) for d in directions])
    moved_NB = moved_NB / moved_NB[:, 0].square().mean().sqrt()
    found = {}
    parts = {"policy": slice(0, 1), "verdict": slice(1, 2), "permuted": slice(2, None)}
    for name, columns in parts.items():
        own_N = moved_NB[:, columns].mean(1)
        good, flawed = (
            mean([float(own_N[i]) for i, s in enumerate(chosen) if s.verdict == verdict])
            for verdict in ("good", "flawed")
        )
        found[name] = {"good": good, "flawed": flawed, "difference": good - flawed}
    return found


def _norm(direction: Mapping[str, torch.Tensor]) -> float:
    return float(torch.stack([value.norm() for value in direction.values()]).norm())


def over_runs(values: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """By direction and set: values of the runs, their mean, and its interval."""
    return {
        name: {part: summary([run[name][part] for run in values]) for part in SETS}
        for name in values[0]
    }


def table(found: Mapping[str, Any]) -> str:
    lines = ["| Gradient of | " + " | ".join(SETS) + " |", "|---|" + "---|" * len(SETS)]
    for name, parts in found.items():
        cells = [with_interval(parts[part]["mean"], parts[part]["interval"]) for part in SETS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--draws", type=int, default=8, help="permutations of the labels")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    runs = runs_of(given.sweep, given.arm)
    values = []
    with Display() as display, display.bar("runs", len(runs), "run") as bar:
        for done, run in enumerate(runs):
            values.append(changes(run.path, given.draws))
            bar.update(done + 1)
    found = over_runs(values)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "verdict_push.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(f"{len(runs)} runs of {given.arm}, first batch\n\n{table(found)}")


if __name__ == "__main__":
    run_guarded(main)
