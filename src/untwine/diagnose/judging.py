"""`untwine diagnose judging`: does learning to judge move acting?

The verdict loss of GCD has a gradient, and a step down it changes the probabilities of commands
too: to first order log pi(a_i|s_i) by <grad log pi(a_i|s_i), d> for the step d. If judging and
acting share what tells good from flawed, good steps gain on flawed ones; the policy's own gradient
and the verdict loss with permuted labels say how much that is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from untwine.batch import microbatches
from untwine.config import Recipe
from untwine.diagnose.coupling import push
from untwine.diagnose.coupling_numbers import context_of
from untwine.diagnose.output import results_folder, to_json, write_text
from untwine.diagnose.recorded import (
    episode_file,
    is_foreign,
    load_recorded_policy,
    read_recorded,
)
from untwine.diagnose.run_samples import check_tokens, distinct_samples, draw_samples
from untwine.diagnose.scoring import weighted_gradient
from untwine.errors import CheckpointError, UntwineError
from untwine.gcd.entering import closed_parameters
from untwine.gcd.labels import only_from
from untwine.gcd.objectives import Means, Objective, make_objective
from untwine.gcd.shuffling import shuffle_labels
from untwine.policy.loading import Policy
from untwine.progress import Display
from untwine.prompting.prompter import Prompter
from untwine.records import Group

Direction = dict[str, torch.Tensor]
DEFAULT_OBJECTIVE = "generative/ce"
"""What a run without GCD is asked about."""


@dataclass(frozen=True, slots=True)
class JudgingOptions:
    """count: steps whose probability is followed, at most; draws: permutations of the labels."""

    count: int = 256
    draws: int = 8
    seed: int = 0
    chunk: int = 16


@dataclass(frozen=True, slots=True)
class Lesson:
    """direction  minus the gradient of the verdict loss, by name of a weight of the policy
    questions  how many
    right      share of right verdicts, None where the objective does not say
    """

    direction: Direction
    questions: int
    right: float | None


def find_judging(
    run: Path,
    recipe: Recipe,
    options: JudgingOptions,
    display: Display,
    *,
    iteration: int | None = None,
    checkpoint: str = "",
) -> dict[str, Any]:
    """Measure one iteration of a run, save what was found, and return the numbers.

    iteration   by default the last one
    checkpoint  the policy; by default the one that played the episodes, or else RUN/model
    """
    if is_foreign(run):
        raise CheckpointError(
            f"{run} was recorded by another program, so the prompts of its questions are not known"
        )
    iteration, file = episode_file(run, iteration)
    found = load_recorded_policy(run, recipe, iteration, checkpoint, or_last=True)
    measured = measure_judging(found.policy, recipe, read_recorded(file, recipe), options, display)
    head = {"format": "untwine-judging-1", "iteration": iteration, "source": found.source}
    numbers = {**head, **measured}
    write_text(results_folder(run) / "judging.json", to_json(numbers))
    return numbers


def measure_judging(
    policy: Policy,
    recipe: Recipe,
    groups: Sequence[Group],
    options: JudgingOptions,
    display: Display,
) -> dict[str, Any]:
    """Numbers for JSON. All directions have the length of the policy's gradient, and changes are in
    units of what that gradient changes (root mean square over the steps)."""
    objective = recipe.gcd.objective
    if objective == "none":
        gcd = recipe.gcd.model_copy(update={"objective": DEFAULT_OBJECTIVE})
        recipe, objective = recipe.model_copy(update={"gcd": gcd}), DEFAULT_OBJECTIVE
    judged = [only_from(group, recipe.gcd.taught) for group in groups]
    everyone = distinct_samples(judged, recipe.loss.mean)
    chosen = draw_samples(everyone, options.count, options.seed)
    for verdict in ("good", "flawed"):
        if not any(s.verdict == verdict for s in chosen):
            raise UntwineError(
                f"no trained step of this iteration is labelled {verdict}; take another iteration, "
                "or more samples"
            )
    check_tokens(chosen, policy.model.get_input_embeddings().weight.shape[0])
    temperature, context = recipe.sampling.temperature, context_of(policy)
    with display.bar("gradients", options.draws + 2, "gradient") as bar:
        acting = weighted_gradient(
            policy.model,
            [s.sample for s in everyone],
            [s.weight for s in everyone],
            temperature=temperature,
            chunk=options.chunk,
            context=context,
        )
        bar.update(1)
        lesson = verdict_lesson(policy, recipe, judged)
        bar.update(2)
        permuted = []
        for draw in range(options.draws):
            wrong = shuffle_labels(judged, random.Random(f"{recipe.seed} {draw}"))
            permuted.append(verdict_lesson(policy, recipe, wrong).direction)
            bar.update(3 + draw)
    length, own = _norm(acting), _norm(lesson.direction)
    if not length:
        raise UntwineError("the policy has no gradient here: no step has an advantage other than 0")
    with display.bar("changes", 1, "pass") as bar:
        moved_NB = push(
            policy.model,
            [s.sample for s in chosen],
            [_scaled(d, acting, length) for d in (acting, lesson.direction, *permuted)],
            temperature=temperature,
            chunk=options.chunk,
            context=context,
            on_progress=bar.update,
        )
    moved_NB = moved_NB / moved_NB[:, 0].square().mean().sqrt()
    rows = [_by_verdict(moved_N, [s.verdict for s in chosen]) for moved_N in moved_NB.T]
    return {
        "objective": objective,
        "distinct": len(everyone),
        "samples": len(chosen),
        "good": sum(s.verdict == "good" for s in chosen),
        "flawed": sum(s.verdict == "flawed" for s in chosen),
        "questions": lesson.questions,
        "right_verdicts": lesson.right,
        "norm_ratio": own / length,
        "cosine": _inner(acting, lesson.direction) / (own * length) if own else None,
        "policy": rows[0],
        "verdict": rows[1],
        "permuted": rows[2:],
    }


def recorded_objective(policy: Policy, recipe: Recipe) -> Objective | None:
    """The objective of a recipe, for episodes on record: without an environment."""
    prompter = Prompter(policy.chat, recipe.prompt)
    means = Means(policy, prompter, recipe.gcd, recipe.sampling.temperature)
    return make_objective(recipe.gcd.objective, means)


def verdict_lesson(policy: Policy, recipe: Recipe, groups: Sequence[Group]) -> Lesson:
    """What the objective of a recipe teaches with the labels of these groups. UntwineError when
    they allow no questions. Gradients of the policy are 0 afterwards."""
    objective = recorded_objective(policy, recipe)
    episodes = [episode for group in groups for episode in group.episodes]
    generator = torch.Generator().manual_seed(recipe.seed)
    exercise = objective and objective.exercise(episodes, random.Random(recipe.seed), generator)
    if not exercise:
        raise UntwineError(
            "the labels of this iteration allow no questions; good and flawed steps are both needed"
        )
    closed = set(map(id, closed_parameters(policy, recipe.gcd.gradient, recipe.gcd.from_layer)))
    policy.model.zero_grad(set_to_none=True)
    right = None
    for rows in microbatches(exercise.rows, recipe.rl.microbatch_tokens):
        loss, found = exercise.loss(rows)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        if "verdict_accuracy" in found:
            right = (right or 0.0) + float(found["verdict_accuracy"])
    direction = {
        name: -p.grad
        for name, p in policy.model.named_parameters()
        if p.grad is not None and id(p) not in closed
    }
    policy.model.zero_grad(set_to_none=True)
    return Lesson(direction, len(exercise.rows), right)


def _by_verdict(moved_N: torch.Tensor, verdicts: Sequence[str | None]) -> dict[str, float]:
    good, flawed = (
        float(moved_N[[i for i, v in enumerate(verdicts) if v == verdict]].mean())
        for verdict in ("good", "flawed")
    )
    return {"good": good, "flawed": flawed, "difference": good - flawed}


def _scaled(direction: Direction, like: Direction, length: float) -> Direction:
    """Of this length, with a value for every weight of `like`; 0 stays 0."""
    own = _norm(direction)
    factor = length / own if own else 0.0
    return {
        name: factor * direction[name] if name in direction else torch.zeros_like(value)
        for name, value in like.items()
    }


def _inner(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a.keys() & b.keys())


def _norm(direction: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(_inner(direction, direction))
