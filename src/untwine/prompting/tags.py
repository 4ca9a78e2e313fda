"""Meta-reasoning tags: what a step is for, said before its command (RLVMR, arXiv 2507.22844).

    <planning>put a mug in the sink</planning><action>go to cabinet 1</action>

The four tags, when each is meant to be used, and the words an expert writes into them are data
here; what a tag earns is in credit/rlvmr.py.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from untwine.records import Step

# Each tag and when to use it, as the prompt says it.
TAG_USES = {
    "planning": "to plan the task",
    "explore": "to find out something new",
    "reflection": "to correct what failed",
    "monitor": "to go on with the plan",
}
TAGS = tuple(TAG_USES)
# What an expert writes into them. {goal}: the task; {last}: the command before. Each ends with the
# task, so that it stands at the same distance before every command: small models find it there.
TAG_WORDS = {
    "planning": "{goal}",
    "explore": "find out more: {goal}",
    "reflection": "{last} did not help: {goal}",
    "monitor": "go on: {goal}",
}
_LONGEST_GOAL = 120  # characters
_TAG = re.compile(r"<({})>(.*?)</\1>".format("|".join(TAGS)), re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+")


class Tagged(NamedTuple):
    """A tag and the words inside it."""

    tag: str
    words: str

    def __str__(self) -> str:
        return f"<{self.tag}>{self.words}</{self.tag}>"


def read_tags(text: str) -> tuple[list[Tagged], int]:
    """(closed tags in order, and where the first of them ends in `text`, or 0). Tags inside a tag
    are its words."""
    found = list(_TAG.finditer(text))
    tagged = [Tagged(m.group(1), m.group(2).strip()) for m in found]
    return tagged, found[0].end() if found else 0


def failures(steps: Sequence[Step]) -> list[bool]:
    """Whether each step of an episode came to nothing: it was not valid, or it said again, in the
    same state, what changed nothing then or now. Looking at something once is no failure."""
    said: set[tuple[str, str]] = set()
    failed = []
    for step in steps:
        action = (step.state_key, (step.command or "").lower())
        idle = step.next_state_key == step.state_key and action in said
        failed.append(step.invalid is not None or idle)
        said.add(action)
    return failed


def expert_tags(goal: str, steps: Sequence[Step], looks: Sequence[bool]) -> list[Tagged]:
    """Tags for the steps of an expert, by rule, for the cold start.

    planning    the first step
    reflection  the step before came to nothing (`failures`)
    explore     the command looks for something, or the answer holds a word that was not read before
    monitor     all others

    looks  whether each command looks for what the expert has not read of (`Command.looks`)
    """
    failed = failures(steps)
    read = {*_words(goal), *(_words(steps[0].observation) if steps else ())}
    tags = []
    for t, step in enumerate(steps):
        told = _words(step.feedback)
        if t == 0:
            tag = "planning"
        elif failed[t - 1]:
            tag = "reflection"
        else:
            tag = "explore" if looks[t] or not told <= read else "monitor"
        last = (steps[t - 1].command or "") if t else ""
        short = textwrap.shorten(goal, _LONGEST_GOAL, placeholder="")
        tags.append(Tagged(tag, TAG_WORDS[tag].format(goal=short, last=last)))
        read |= told
    return tags


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
