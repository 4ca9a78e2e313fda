"""An expert that knows no more than what it has read.

The oracle goes straight to a thing it cannot have seen. Who imitates that learns to take the first
thing that comes, because in its examples the right one always lies where the expert goes
(docs/log.md). This expert follows the oracle only where what is to be taken or used has been
mentioned; before that it looks into one new place after the other.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence

_HANDLES = re.compile(r"(?:take|use) (?P<thing>.+?)(?: from .+)?$")


def search(
    plan: Sequence[str],
    valid: Sequence[str],
    read: Collection[str],
    said: Collection[str],
    rng: random.Random,
) -> str:
    """The next command.

    plan   a shortest plan from here, not empty
    valid  the commands that are admissible now
    read   the observations of the episode so far
    said   the commands of the episode so far
    """
    thing = next((m["thing"] for command in plan if (m := _HANDLES.match(command))), None)
    if thing is None or any(re.search(rf"\b{re.escape(thing)}\b", text) for text in read):
        return plan[0]
    new = [command for command in valid if command not in said]
    opening = [command for command in new if command.startswith("open ")]
    if opening:
        return opening[0]
    going = [command for command in new if command.startswith("go to ")]
    return rng.choice(going) if going else plan[0]
