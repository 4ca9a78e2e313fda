"""GRPO with some of its credit taken out, to find out what that credit does (scienceworld.md).

A credit method for the arms of scienceworld-cause.yaml, named there by its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from untwine.credit.grpo import grpo
from untwine.credit.labels import labels
from untwine.envs.wandering import first_word
from untwine.gcd.labels import agreed_verdict, only_from
from untwine.prompting.prompter import action_as_shown
from untwine.records import Group, Step, Verdict


def without(
    group: Group,
    credit: Literal["rewarded", "punished"],
    word: str,
    others: bool = False,
    verdict: Verdict | None = None,
) -> Sequence[Sequence[float | None]]:
    """GRPO advantages, but 0 for rewarded (A > 0) or punished (A < 0) steps whose command begins
    with `word`, or, with `others`, with any other word.

    verdict  only those of which the rules say this
    """
    return taken_out(group.with_advantages(grpo(group)), credit, word, others, verdict)


def taken_out(
    group: Group,
    credit: Literal["rewarded", "punished"],
    word: str,
    others: bool = False,
    verdict: Verdict | None = None,
) -> list[list[float | None]]:
    """The advantages that the steps of the group have, with 0 as in `without`."""
    judged = only_from(group, ["rule"])

    def kept(step: Step, known: Step) -> float | None:
        a = step.advantage
        if a is None or (a > 0) != (credit == "rewarded"):
            return a
        if (begins_with(step) == word) == others:
            return a
        return a if verdict is not None and agreed_verdict(known) != verdict else 0.0

    return [
        [kept(step, known) for step, known in zip(episode.steps, labelled.steps, strict=True)]
        for episode, labelled in zip(group.episodes, judged.episodes, strict=True)
    ]


def rules_only(group: Group) -> list[list[float | None]]:
    """Nothing but what the rules say: 1 for good steps, -1 for flawed ones, 0 for all others."""
    return labels(group, ["rule"])


def begins_with(step: Step) -> str:
    """First word of a step's command, or of what was said where it is none."""
    return first_word(action_as_shown(step.command, step.text))
