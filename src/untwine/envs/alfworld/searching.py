"""Experts that know no more than what they have read.

The oracle goes straight to a thing it cannot have seen. Who imitates that learns to take the first
thing that comes, because in its examples the right one always lies where the expert goes
(docs/log.md). These experts follow the oracle only where what is to be taken or used has been
mentioned. Before that they look into one place after the other: `search` into new ones at random,
`in_order` into the one that comes next in the list with which a game begins.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence

from untwine.envs.protocol import Due

_HANDLES = re.compile(r"(?:take|use) (?P<thing>.+?)(?: from .+)?$")
_MOVES = re.compile(r"move (?P<thing>.+) to (?P<place>.+)$")
_VISITS = re.compile(r"(?P<verb>go to|open|examine) (?P<place>.+)$")
_VERBS = ("go to", "open", "examine")


def search(
    plan: Sequence[str],
    valid: Sequence[str],
    read: Collection[str],
    said: Collection[str],
    rng: random.Random,
) -> Due:
    """The next command; `rng` decides which new place is next.

    plan   a shortest plan from here, not empty
    valid  the commands that are admissible now
    read   the observations of the episode so far
    said   the commands of the episode so far
    """
    if _knows(plan, read):
        return Due(plan[0], looks=False)
    new = [command for command in valid if command not in said]
    opening = [command for command in new if command.startswith("open ")]
    if opening:
        return Due(opening[0], looks=True)
    going = [command for command in new if command.startswith("go to ")]
    return Due(rng.choice(going), looks=True) if going else Due(plan[0], looks=False)


def in_order(
    plan: Sequence[str], valid: Sequence[str], read: Sequence[str], said: Sequence[str]
) -> Due:
    """The next command, which follows from the last place it looked into and from what it knows,
    without luck: that place is opened, or else the next one in the list of places is looked into,
    and after the last one the first. Places of which it has read what is in them are left out. What
    it carries goes to the first place that is as good.

    read   the observations that it remembers, the present one last
    """
    commands = _visits(valid)
    places = sorted(commands)
    if _knows(plan, read):
        kind = _brings_to(plan)
        first = next((commands[place] for place in places if place[0] == kind), "")
        return Due(first if first.startswith("go to ") else plan[0], looks=False)
    last = [m["place"] for command in said if (m := _VISITS.match(command))][-1:]
    here = _place(last[0]) if last else ("", 0)
    if commands.get(here, "").startswith("open "):
        return Due(commands[here], looks=True)
    following = [place for place in places if place > here] + [p for p in places if p < here]
    seen = _seen(read, said)
    fresh = [place for place in following if place not in seen] or following
    return Due(commands[fresh[0]], looks=True) if fresh else Due(plan[0], looks=False)


def _seen(read: Sequence[str], said: Sequence[str]) -> set[tuple[str, int]]:
    """The places of which what is in them was read: answers to a visit that name no closed door."""
    answers = read[1:]
    given = said[len(said) - len(answers) :]
    return {
        _place(m["place"])
        for command, answer in zip(given, answers, strict=True)
        if (m := _VISITS.match(command)) and " is closed" not in answer
    }


def _knows(plan: Sequence[str], read: Collection[str]) -> bool:
    """Whether the next thing that the plan takes or uses was mentioned, if there is one."""
    thing = next((m["thing"] for command in plan if (m := _HANDLES.match(command))), None)
    return thing is None or any(re.search(rf"\b{re.escape(thing)}\b", text) for text in read)


def _brings_to(plan: Sequence[str]) -> str | None:
    """The kind of place that a plan goes to with nothing else to do than to put something there."""
    goes, *rest = plan
    goal = _MOVES.match(plan[-1])
    if goal is None or not goes.startswith("go to "):
        return None
    only = all(command.startswith(("open ", "move ")) for command in rest)
    return _place(goal["place"])[0] if only else None


def _visits(valid: Sequence[str]) -> dict[tuple[str, int], str]:
    """For every place the command that shows what is in it: goes there, or, where it is there
    already, opens or examines it."""
    matches = [match for command in valid if (match := _VISITS.match(command))]
    closing = [c.removeprefix("close ") for c in valid if c.startswith("close ")]
    sure = [*closing, *(m["place"] for m in matches if m["verb"] != "examine")]
    kinds = {_place(name)[0] for name in sure}  # what else is examined is a thing
    found: dict[tuple[str, int], str] = {}
    for match in sorted(matches, key=lambda m: _VERBS.index(m["verb"])):
        place = _place(match["place"])
        if place[0] in kinds:
            found.setdefault(place, match[0])
    return found


def _place(name: str) -> tuple[str, int]:
    """What places are sorted by: games list them by kind, the highest number first."""
    kind, _, number = name.rpartition(" ")
    return (kind, -int(number)) if number.isdecimal() else (name, 0)
