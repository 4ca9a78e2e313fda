"""An expert that knows no more than what it has read.

The oracle goes straight to a thing it cannot have seen. Who imitates that learns to take the first
thing that comes, because in its examples the right one always lies where the expert goes
(docs/log.md). This expert follows the oracle only where what is to be taken or used has been
mentioned; before that it looks into one place after the other: new ones at random, or, without
luck or memory, the next one in the order of their names.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence

from untwine.envs.protocol import Due

_GO = "go to "
_HANDLES = re.compile(r"(?:take|use) (?P<thing>.+?)(?: from .+)?$")


def search(
    plan: Sequence[str],
    valid: Sequence[str],
    read: Collection[str],
    said: Sequence[str],
    rng: random.Random | None,
) -> Due:
    """The next command.

    plan   a shortest plan from here, not empty
    valid  the commands that are admissible now
    read   the observations of the episode so far
    said   the commands of the episode so far
    rng    decides which new place is next; None: the one that follows, by kind and number, the one
           it went to last, and the first follows the last. So what to do follows from where it is,
           and needs no memory.
    """
    thing = next((m["thing"] for command in plan if (m := _HANDLES.match(command))), None)
    if thing is None or any(re.search(rf"\b{re.escape(thing)}\b", text) for text in read):
        return Due(plan[0], looks=False)
    known = () if rng is None else said
    new = [command for command in valid if command not in known]
    opening = [command for command in new if command.startswith("open ")]
    if opening:
        return Due(opening[0], looks=True)
    going = [command for command in new if command.startswith(_GO)]
    if not going:
        return Due(plan[0], looks=False)
    if rng is not None:
        return Due(rng.choice(going), looks=True)
    here = max(map(_place, [c for c in said if c.startswith(_GO)][-1:]), default=("", 0))
    following = min(going, key=lambda command: (_place(command) <= here, _place(command)))
    return Due(following, looks=True)


def _place(command: str) -> tuple[str, int]:
    """Kind and number of the place that a command goes to."""
    kind, _, number = command.removeprefix(_GO).rpartition(" ")
    return (kind, int(number)) if number.isdecimal() else (f"{kind} {number}".strip(), 0)
