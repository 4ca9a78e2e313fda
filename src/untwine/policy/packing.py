"""Which tokens a forward pass computes, and for which rows.

A row is the sequence of one slot; its keys and values are kept (row_cache.py). A pass appends a
*piece* to some rows. Pieces are laid end to end in one packed sequence without padding, and what
several rows need is computed once and written to all of them:

* the beginning of a prompt that any kept row holds is copied from there;
* where prompts of the same pass begin alike, one row computes the tokens that are common;
* rows that are alike to the last token ("twins") go on being computed once while they stay so.

Shape suffixes: N packed tokens, W writes (N or more: one for each row that needs a token).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens for the positions start, start + 1, ... of the row of `slot`.

    shared   so many of them, the first ones, the piece before computes (or shares in its turn)
    """

    slot: int
    start: int
    ids: Ids
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """Positions start to end of the row of `target` are those of the row of `source`."""

    source: int
    target: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Span:
    """Packed tokens first to end are computed in the row of `slot`, which holds `past` tokens
    before them."""

    slot: int
    first: int
    end: int
    past: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A forward pass over N tokens.

    ids_N, positions_N                   the tokens, and where in their rows they stand
    spans                                cover 0..N in order
    token_W, slot_W, position_W          each packed token is kept at these places
    last                                 for each slot the packed token its piece ends with
    """

    ids_N: np.ndarray
    positions_N: np.ndarray
    spans: tuple[Span, ...]
    token_W: np.ndarray
    slot_W: np.ndarray
    position_W: np.ndarray
    last: Mapping[int, int]

    def parts(self, limit: int) -> Iterator[tuple[int, Packed]]:
        """Passes of at most `limit` tokens, to be run in this order, and the place of the first
        token of each. Their `last` is that of the whole."""
        for a in range(0, len(self.ids_N), limit):
            b = min(a + limit, len(self.ids_N))
            here = (self.token_W >= a) & (self.token_W < b)
            spans = [
                Span(s.slot, max(s.first, a) - a, min(s.end, b) - a, s.past + max(0, a - s.first))
                for s in self.spans
                if s.first < b and s.end > a
            ]
            yield (
                a,
                Packed(
                    self.ids_N[a:b],
                    self.positions_N[a:b],
                    tuple(spans),
                    self.token_W[here] - a,
                    self.slot_W[here],
                    self.position_W[here],
                    self.last,
                ),
            )


def pack(pieces: Sequence[Piece]) -> Packed:
    """Lay pieces end to end; each has at least one token."""
    ids: list[int] = []
    positions: list[np.ndarray] = []
    spans: list[Span] = []
    paths: list[np.ndarray] = []
    last: dict[int, int] = {}
    for i, piece in enumerate(pieces):
        first = len(ids)
        ids += piece.ids[piece.shared :]
        path = np.arange(first, len(ids))
        if piece.shared:
            skipped = piece.start - pieces[i - 1].start
            path = np.concatenate([paths[-1][skipped : skipped + piece.shared], path])
        if len(ids) > first:
            past = piece.start + piece.shared
            spans.append(Span(piece.slot, first, len(ids), past))
            positions.append(np.arange(past, past + len(ids) - first))
        paths.append(path)
        last[piece.slot] = int(path[-1])
    lengths = [len(piece.ids) for piece in pieces]
    begins = np.repeat([piece.start for piece in pieces], lengths)
    within = np.arange(sum(lengths)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return Packed(
        np.array(ids),
        np.concatenate(positions),
        tuple(spans),
        np.concatenate(paths),
        np.repeat([piece.slot for piece in pieces], lengths),
        begins + within,
        last,
    )


def prompt_pieces(
    held: Mapping[int, Ids], prompts: Mapping[int, Ids]
) -> tuple[list[Copy], list[Piece]]:
    """What must be copied and computed so that each slot holds its prompt.

    held      what the rows of all slots hold now
    prompts   non-empty; their last token is always computed, since it gives the logits

    The copies read what the rows hold before any of them is made.
    """
    kept = {slot: common_prefix(held.get(slot, ()), prompt) for slot, prompt in prompts.items()}
    # A row that is merely longer now has nothing to gain from the others.
    seeking = [s for s in prompts if not kept[s] or kept[s] < len(held[s])]
    rows = sorted((ids, slot) for slot, ids in held.items()) if seeking else []
    copies = []
    for slot in seeking:
        source, common = _best_source(rows, prompts[slot])
        common = min(common, len(prompts[slot]) - 1)
        if common > kept[slot]:
            copies.append(Copy(source, slot, kept[slot], common))
            kept[slot] = common
    pieces: list[Piece] = []
    before: Ids = ()
    for prompt, slot in sorted((prompt, slot) for slot, prompt in prompts.items()):
        start = min(kept[slot], len(prompt) - 1)
        piece = Piece(slot, start, prompt[start:])
        if pieces and pieces[-1].start <= start:
            piece = replace(piece, shared=max(0, common_prefix(before, prompt) - start))
        pieces.append(piece)
        before = prompt
    return copies, pieces


def reply_pieces(
    held: Mapping[int, Ids], unread: Mapping[int, Ids], twin: Mapping[int, int]
) -> list[Piece]:
    """Pieces that append `unread` to rows. Slots with the same `twin` hold the same tokens."""
    pieces: list[Piece] = []
    before: tuple[int, Ids] | None = None
    for mark, ids, slot in sorted((twin.get(s, -1 - s), ids, s) for s, ids in unread.items()):
        shared = common_prefix(before[1], ids) if before and before[0] == mark else 0
        pieces.append(Piece(slot, len(held[slot]), ids, shared))
        before = mark, ids
    return pieces


def common_prefix(a: Ids, b: Ids) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] == b[:low], a[:high] != b[:high]
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _best_source(rows: Sequence[tuple[Ids, int]], prompt: Ids) -> tuple[int, int]:
    """(slot, length) of the longest beginning of `prompt` that a row holds. In sorted order it is
    one of the two neighbours."""
    place = bisect.bisect(rows, (prompt, -1))
    near = rows[max(0, place - 1) : place + 1]
    found = [(common_prefix(ids, prompt), -slot) for ids, slot in near]
    length, slot = max(found, default=(0, 0))
    return -slot, length
