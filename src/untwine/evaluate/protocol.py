"""Evaluation on fixed sets: which episodes are played depends on the split file and on the number
of episodes only, never on the seed of the run, so that runs can be compared."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from untwine.config import EnvConfig, Recipe
from untwine.envs.protocol import EnvInfo
from untwine.errors import EnvError
from untwine.evaluate.identity import decoding_name, set_identity
from untwine.evaluate.statistics import Interval, bootstrap_interval, mean, wilson_interval
from untwine.gcd.labels import action_key, label_group
from untwine.prompting.tags import TAGS
from untwine.records import Episode, Group, TaskRef
from untwine.rollout import Collector
from untwine.workshop import read_splits


def evaluation_refs(env: EnvConfig, set_name: str, episodes: int) -> list[TaskRef]:
    """The `episodes` instances of a set that are played, spread evenly over its tasks. A set with
    fewer instances is played several times.

    Of `env.tasks` those count that the set has; a set that has none of them (L2, the held-out
    task types) is played with all its tasks. EnvError when the set does not exist or is empty, and
    for a task that no set has.
    """
    splits = read_splits(env)
    known = {task for tasks in splits.sets.values() for task in tasks}
    if unknown := [task for task in env.tasks if task not in known]:
        splits.refs(set_name, tasks=unknown)  # says which, and the nearest name
    tasks = [task for task in env.tasks if task in splits.sets.get(set_name, {})]
    refs = splits.refs(set_name, tasks=tasks)
    if episodes and not refs:
        raise EnvError(
            f"set {set_name!r} of environment {env.name!r} is empty; leave it out of evaluate.sets"
        )
    by_task: dict[str, list[TaskRef]] = defaultdict(list)
    for ref in refs:
        by_task[ref.task].append(ref)
    for task, own in by_task.items():
        random.Random(f"{set_name}/{task}").shuffle(own)
    turns = [own[k % len(own)] for k in range(episodes) for own in by_task.values()]
    return turns[:episodes]


def evaluate(
    collector: Collector,
    refs: Sequence[TaskRef],
    seed: int,
    *,
    greedy: bool = False,
    temperature: float | None = None,
    on_turn: Callable[[int, int], None] | None = None,
) -> list[Group]:
    """Play every ref once; sampling is seeded by `seed`, at the `temperature` of the policy unless
    another is given."""
    generator = torch.Generator().manual_seed(seed)
    groups, _ = collector.collect(
        refs,
        1,
        generator,
        prefix="eval-",
        greedy=greedy,
        temperature=temperature,
        on_turn=on_turn,
    )
    return groups


def examine_set(
    collector: Collector,
    recipe: Recipe,
    name: str,
    refs: Sequence[TaskRef],
    seed: int,
    *,
    greedy: bool,
    on_turn: Callable[[int, int], None] | None = None,
) -> tuple[list[Group], dict[str, Any]]:
    """Play the instances of a set, sampled ones at the temperature of `recipe.evaluate`; the
    episodes, and the identity of the examination."""
    temperature = recipe.evaluate.temperature
    said = decoding_name(greedy, temperature)
    identity = set_identity(recipe.env, name, refs, decoding=said, seed=seed)
    groups = evaluate(
        collector, refs, seed, greedy=greedy, temperature=temperature, on_turn=on_turn
    )
    return groups, identity


def summarise(groups: Sequence[Group], info: EnvInfo) -> dict[str, Any]:
    """Means with 95 % intervals: percentile bootstrap for the outcome, Wilson for success. Both
    take the task instances as the sample, so playing one twice does not pass for two. Rates of
    flawed, invalid and repeated steps are per step."""
    episodes = [episode for group in groups for episode in group.episodes]
    by_ref: dict[TaskRef, list[Episode]] = defaultdict(list)
    for episode in episodes:
        by_ref[episode.ref].append(episode)
    by_task: dict[str, list[list[Episode]]] = defaultdict(list)
    for ref, own in by_ref.items():
        by_task[ref.task].append(own)
    outcomes = [mean([e.outcome for e in own]) for own in by_ref.values()]
    successes = sum(mean([e.success for e in own]) for own in by_ref.values())
    n = len(by_ref)
    return {
        "episodes": len(episodes),
        "instances": n,
        "outcome_mean": mean(outcomes),
        "outcome_interval": list(bootstrap_interval(outcomes)),
        "success_rate": successes / n,
        "success_interval": list(wilson_interval(successes, n)),
        **step_measures(groups, info),
        "by_task": {
            task: {
                "episodes": sum(map(len, instances)),
                "outcome_mean": mean([mean([e.outcome for e in own]) for own in instances]),
                "success_rate": mean([mean([e.success for e in own]) for own in instances]),
            }
            for task, instances in sorted(by_task.items())
        },
        "per_instance": {
            f"{ref.task}/{ref.variation}": [
                mean([e.outcome for e in own]),
                mean([e.success for e in own]),
            ]
            for ref, own in by_ref.items()
        },
    }


def success_gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, Interval]:
    """How much the success rate rose between two evaluations of the same instances, with a 95 %
    interval (percentile bootstrap over the differences, instance by instance).

    before, after  what `summarise` returned. ValueError when their instances differ.
    """
    first, then = before["per_instance"], after["per_instance"]
    if first.keys() != then.keys():
        raise ValueError("the two evaluations played different instances")
    differences = [then[key][1] - first[key][1] for key in first]
    return mean(differences), bootstrap_interval(differences)


def step_measures(groups: Sequence[Group], info: EnvInfo) -> dict[str, Any]:
    """Length, and shares of steps that are invalid, repeated (the same action as before in the same
    state, whatever came of it) or flawed by rule, with the kinds; whatever labels the training
    uses. With reasoning tags, also the share of steps with each."""
    labelled = [label_group(group, ["rule"], info) for group in groups]
    episodes = [episode for group in labelled for episode in group.episodes]
    steps = [step for episode in episodes for step in episode.steps]
    kinds: dict[str, int] = defaultdict(int)
    for step in steps:
        for label in step.labels:
            if label.verdict == "flawed":
                kinds[label.kind] += 1
    tags = Counter(step.tag for step in steps if step.tag is not None)
    n = max(len(steps), 1)
    return {
        "episode_length": len(steps) / max(len(episodes), 1),
        "invalid_rate": sum(s.invalid is not None for s in steps) / n,
        "repeated_rate": sum(repeats(episode) for episode in episodes) / n,
        "flawed_rate": sum(kinds.values()) / n,
        "flawed_kinds": {kind: count / n for kind, count in sorted(kinds.items())},
        **({"tags": {tag: tags[tag] / n for tag in TAGS}} if tags else {}),
    }


def repeats(episode: Episode) -> int:
    """Steps that do again what the episode has done before in the same state."""
    done = {(step.state_key, action_key(step)) for step in episode.steps}
    return episode.length - len(done)
