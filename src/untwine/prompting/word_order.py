"""Replies that say the first word of a command last.

A command is chosen token by token from left to right. With "take" in front, choosing it has to
foresee whether the thing that is wanted will be among those that can be taken; where the thing
comes first, a thing that is not there cannot be chosen, and its weight falls to the others. Small
models from scratch learn the second in hundreds of steps, and had not begun with the first after as
many (docs/log.md).
"""

from __future__ import annotations


def verb_last(command: str) -> str:
    """`take pen 1 from desk 1` becomes ` pen 1 from desk 1 take`. The space in front makes its
    words the tokens that they are within a sentence."""
    verb, *rest = command.split()
    return " ".join(["", *rest, verb])


def verb_first(written: str) -> str:
    """The command that was written with its first word last; no words stay none."""
    words = written.split()
    return " ".join([*words[-1:], *words[:-1]])
