"""Numbers that a rollout and the optimizer steps of an iteration gather."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from untwine.envs.protocol import EnvInfo
from untwine.evaluate.protocol import step_measures
from untwine.gcd.labels import agreed_verdict
from untwine.records import Group
from untwine.rollout import RolloutStats

_COUNTED = ("_tokens", "out_of_memory")


@dataclass(slots=True)
class Measures:
    """Sums and maxima over micro-batches; weights already make the sums means over the batch."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        return {**self.sums, **self.maxima}

    def add(self, **new: float | torch.Tensor) -> None:
        for name, value in new.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def top(self, **new: float | torch.Tensor) -> None:
        for name, value in new.items():
            self.maxima[name] = max(self.maxima.get(name, float("-inf")), float(value))

    def join(self, other: Measures) -> None:
        self.add(**other.sums)
        self.top(**other.maxima)


def averaged(taken: Sequence[Measures]) -> dict[str, float]:
    """Means over optimizer steps; tokens, questions and seconds are summed and ratio_max is the
    largest."""
    names = {name for measures in taken for name in measures.values}
    result: dict[str, float] = {}
    for name in sorted(names):
        values = [m.values[name] for m in taken if name in m.values]
        if name == "ratio_max":
            result[name] = max(values)
        elif name.startswith(("seconds_", "verdicts")) or name.endswith(_COUNTED):
            result[name] = sum(values)
        else:
            result[name] = sum(values) / len(values)
    return result


def is_trained(group: Group) -> bool:
    """Whether any of its steps is."""
    return any(step.advantage is not None for e in group.episodes for step in e.steps)


def rollout_measures(groups: Sequence[Group], stats: RolloutStats, info: EnvInfo) -> dict[str, Any]:
    """What the episodes of an iteration were like, and what they cost."""
    episodes = [episode for group in groups for episode in group.episodes]
    by_task: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        by_task[episode.ref.task].append(episode.outcome)
    advantages: dict[str, list[float]] = {"good": [], "flawed": []}
    for episode in episodes:
        for step in episode.steps:
            verdict = agreed_verdict(step)
            if verdict and step.advantage is not None:
                advantages[verdict].append(step.advantage)
    return {
        "outcome_mean": sum(e.outcome for e in episodes) / len(episodes),
        "success_rate": sum(e.success for e in episodes) / len(episodes),
        **step_measures(groups, info),
        **{f"advantage_{k}": sum(v) / len(v) if v else None for k, v in advantages.items()},
        "groups_kept": sum(map(is_trained, groups)),
        "episodes_lost": stats.episodes_lost,
        "env_steps": stats.env_steps,
        "sampled_tokens": stats.sampled_tokens,
        "prompt_tokens": stats.prompt_tokens,
        "computed_tokens": stats.computed_tokens,
        "outcome_by_task": {t: sum(v) / len(v) for t, v in sorted(by_task.items())},
    }
