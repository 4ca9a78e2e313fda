"""What two prompts share and where they differ, in pieces that a page or a terminal can show.

Lines are compared first, then the words of lines that were replaced. Long equal stretches are cut,
as growing chats agree in most of what they say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Literal

Kind = Literal["same", "first", "second", "cut"]
Piece = tuple[Kind, str]

CONTEXT = 160
"""Characters of an equal stretch that are kept before and after a difference."""
LONGEST = 8000
"""Characters of one diff, at most."""
MOST_WORDS = 600
_WORD = re.compile(r"\s+|\w+|[^\w\s]")


def prompt_diff(first: str, second: str, longest: int = LONGEST) -> list[Piece]:
    """Pieces in order: `same` text, text of the `first` or of the `second` alone, and `cut`, whose
    text says how much was left out."""
    pieces = _joined(_calm(_by_line(first, second)))
    shortened = [
        piece
        for i, piece in enumerate(pieces)
        for piece in _shortened(piece, before=i > 0, after=i < len(pieces) - 1)
    ]
    return _bounded(shortened, longest)


def _by_line(first: str, second: str) -> Iterable[Piece]:
    a, b = first.splitlines(keepends=True), second.splitlines(keepends=True)
    for tag, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        old, new = "".join(a[i:j]), "".join(b[k:m])
        if tag == "replace":
            yield from _by_word(old, new)
        else:
            yield from _pieces(tag, old, new)


def _by_word(old: str, new: str) -> Iterable[Piece]:
    a, b = _WORD.findall(old), _WORD.findall(new)
    if max(len(a), len(b)) > MOST_WORDS:
        yield from _pieces("replace", old, new)
        return
    for tag, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        yield from _pieces(tag, "".join(a[i:j]), "".join(b[k:m]))


def _pieces(tag: str, old: str, new: str) -> Iterable[Piece]:
    if tag == "equal":
        yield "same", old
        return
    if old:
        yield "first", old
    if new:
        yield "second", new


def _calm(pieces: Iterable[Piece]) -> Iterable[Piece]:
    """Changes that only blanks keep apart become one: words are replaced, not every other one."""
    old = new = blank = ""
    for kind, text in pieces:
        if kind == "same" and (old or new) and not blank and text.isspace():
            blank = text
        elif kind == "same":
            yield from _pieces("replace", old, new)
            yield "same", blank + text
            old = new = blank = ""
        else:
            old, new, blank = old + blank, new + blank, ""
            old, new = (old + text, new) if kind == "first" else (old, new + text)
    yield from _pieces("replace", old, new)
    if blank:
        yield "same", blank


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for kind, text in pieces:
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


def _shortened(piece: Piece, *, before: bool, after: bool) -> Sequence[Piece]:
    kind, text = piece
    head, tail = CONTEXT if before else 0, CONTEXT if after else 0
    left = len(text) - head - tail
    if kind != "same" or left < CONTEXT or not (before or after):
        return [piece]
    cut: Piece = ("cut", f"{left} equal characters")
    parts: list[Piece] = [("same", text[:head]), cut, ("same", text[len(text) - tail :])]
    return [part for part in parts if part[1]]


def _bounded(pieces: Sequence[Piece], longest: int) -> list[Piece]:
    """The pieces up to `longest` characters, and how many were left out."""
    taken: list[Piece] = []
    room = longest
    for number, (kind, text) in enumerate(pieces):
        if len(text) > room:
            left = len(text) - room + sum(len(t) for k, t in pieces[number + 1 :] if k != "cut")
            taken += [(kind, text[:room])] if room else []
            return [*taken, ("cut", f"{left} more characters")]
        taken.append((kind, text))
        room -= len(text)
    return taken
