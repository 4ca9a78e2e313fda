"""A key for the situation of the agent, equal whenever the situations are the same.

ScienceWorld lists things in an order that varies from run to run (the paint cups of the art studio,
the bees of the greenhouse), and instruments show numbers that jitter or count the time. The
canonical form of a description therefore has every list sorted, white space folded, and the numbers
of thermometers and stopwatches replaced by `#`.

What the key ignores: the time, temperatures, and all that is out of sight (other rooms, closed
containers). Two states with equal keys look the same to the agent and have the same score; they may
still differ in how warm a pot is.
"""

from __future__ import annotations

import hashlib
import re

_READING = re.compile(r"-?\d+(?:\.\d+)?(?= (?:degrees|ticks))")
_ASIDE = re.compile(r", (?=which\b|currently\b|with\b)")
_LIST = re.compile(r"\b(is|see|with): ([^:.]*)")
_CONTAINING = "containing "
_INNERMOST = re.compile(r"\(([^()]*)\)")


def canonical(description: str) -> str:
    """The canonical form of a room description or an inventory."""
    sections: list[list[str]] = []
    for line in description.splitlines():
        text = " ".join(line.split())
        if not text:
            continue
        if not sections or not line[:1].isspace():
            sections.append([text])  # a heading: "In it, you see:"
        else:
            sections[-1].append(_canonical_thing(text))
    return "\n".join(line for head, *things in sections for line in (head, *sorted(things)))


def _canonical_thing(text: str) -> str:
    text = _ASIDE.sub(" ", _READING.sub("#", text))
    while found := _INNERMOST.search(text):  # brackets replace parentheses, from the inside out
        inner = found[1].removeprefix(_CONTAINING)
        verb = _CONTAINING if inner != found[1] else ""
        text = f"{text[: found.start()]}[{verb}{_sorted_list(inner)}]{text[found.end() :]}"
    return _sorted_list(text)


def _sorted_list(text: str) -> str:
    """Sort the things between commas; first those of lists within, which end at a full stop."""
    text = _LIST.sub(lambda found: f"{found[1]}= {_join(found[2])}", text)
    return _join(text)


def _join(text: str) -> str:
    return "; ".join(sorted(part.strip() for part in text.split(",")))


def state_key(*parts: object) -> str:
    """A short hash of the parts."""
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
