"""Nothing but labels: each step earns what is said of it, whatever the episode comes to. A process
reward with the labels in the place of a learnt reward model; with the labels of the rules, progress
is rewarded and flaws are punished where they are made."""

from __future__ import annotations

from collections.abc import Mapping

from untwine.gcd.labels import agreed_verdict, only_from
from untwine.records import Group, Verdict

VALUES: Mapping[Verdict | None, float] = {"good": 1.0, "flawed": -1.0, None: 0.0}


def labels(group: Group, sources: list[str] | None = None) -> list[list[float | None]]:
    """1 for steps that all their labels call good, -1 where all say flawed, 0 for all others.

    sources  whose labels count; by default all

    Returns G rows, one value per step.
    """
    judged = only_from(group, sources or [])
    return [[VALUES[agreed_verdict(step)] for step in e.steps] for e in judged.episodes]
