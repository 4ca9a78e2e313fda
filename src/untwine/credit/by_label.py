"""Labels used directly, after the credit method and outside its statistics: the plainest use of
them, and a control for GCD, which learns from the same labels by another way. Steps that are not
trained on (None) stay so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from untwine.credit.labels import VALUES
from untwine.gcd.labels import agreed_verdict, only_from
from untwine.records import Group, Verdict


def penalise(group: Group, penalty: float, sources: Sequence[str] = ()) -> Group:
    """A copy of the group with A - penalty in the place of A wherever all labels of a step say
    flawed. No other step is touched.

    sources  whose labels count; by default all
    """
    return _changed(group, sources, lambda a, verdict: a - penalty if verdict == "flawed" else a)


def veto(group: Group, of: Sequence[Verdict], sources: Sequence[str] = ()) -> Group:
    """A copy of the group in which no advantage contradicts the labels of its step: at most 0 where
    all of them say flawed, at least 0 where all say good. So a success no longer rewards the flawed
    steps on its way, and a failure no longer punishes the good ones.

    of       the verdicts that count: flawed, good or both
    sources  whose labels count; by default all
    """

    def within(advantage: float, verdict: Verdict | None) -> float:
        if verdict not in of:
            return advantage
        return min(advantage, 0.0) if verdict == "flawed" else max(advantage, 0.0)

    return _changed(group, sources, within)


def labels_alone(group: Group, sources: Sequence[str] = ()) -> Group:
    """A copy of the group with advantages that are nothing but labels (credit method `labels`).

    sources  whose labels count; by default all
    """
    return _changed(group, sources, lambda _, verdict: VALUES[verdict])


def _changed(
    group: Group, sources: Sequence[str], change: Callable[[float, Verdict | None], float]
) -> Group:
    """The group with `change(A, what all labels of the step say together)` in the place of A."""
    judged = only_from(group, sources)
    return group.with_advantages(
        [
            [
                None if step.advantage is None else change(step.advantage, agreed_verdict(known))
                for step, known in zip(episode.steps, labelled.steps, strict=True)
            ]
            for episode, labelled in zip(group.episodes, judged.episodes, strict=True)
        ]
    )
