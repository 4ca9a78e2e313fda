"""Labels shuffled among the steps of a batch: a control that asks the same questions, as often, and
with wrong answers as often as chance has it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from untwine.gcd.labels import action_key
from untwine.gcd.questions import judged_steps
from untwine.records import Group, Label, Step, TaskRef


def shuffle_labels(groups: Sequence[Group], rng: random.Random) -> list[Group]:
    """Copies of the groups in which the labels have changed places at random.

    What changes places are the labels of distinct actions (same task instance, state and action)
    with a verdict, as they become questions: equal steps still agree, and there are as many good
    and as many flawed ones as before. Steps whose labels disagree keep them, so they stay out.
    """
    judged = judged_steps(episode for group in groups for episode in group.episodes)
    keys = [_key(j.episode.ref, j.episode.steps[j.t]) for j in judged]
    labels = [j.episode.steps[j.t].labels for j in judged]
    rng.shuffle(labels)
    new: dict[tuple[str, str, str], tuple[Label, ...]] = dict(zip(keys, labels, strict=True))
    return [
        group.with_labels(
            [
                [
                    new.get(_key(episode.ref, step), step.labels) if step.labels else ()
                    for step in episode.steps
                ]
                for episode in group.episodes
            ]
        )
        for group in groups
    ]


def _key(ref: TaskRef, step: Step) -> tuple[str, str, str]:
    return str(ref), step.state_key, action_key(step)
