"""A fixed penalty on flawed steps: the plainest use of labels, and a control for GCD, which learns
from the same labels by another way."""

from __future__ import annotations

from collections.abc import Sequence

from untwine.gcd.labels import agreed_verdict, only_from
from untwine.records import Group


def penalise(group: Group, penalty: float, sources: Sequence[str] = ()) -> Group:
    """A copy of the group with A - penalty in the place of A wherever all labels of a step say
    flawed. Steps that are not trained on (None) stay so, and no other step is touched: the penalty
    is added after the credit method and does not enter its statistics.

    sources  whose labels count; by default all
    """
    judged = only_from(group, sources)
    return group.with_advantages(
        [
            [
                step.advantage - penalty
                if step.advantage is not None and agreed_verdict(by) == "flawed"
                else step.advantage
                for step, by in zip(episode.steps, known.steps, strict=True)
            ]
            for episode, known in zip(group.episodes, judged.episodes, strict=True)
        ]
    )
