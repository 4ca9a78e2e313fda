"""Which tokens are computed, against counting by hand and by brute force."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from untwine.policy.packing import (
    Copy,
    Packed,
    Piece,
    common_prefix,
    pack,
    prompt_pieces,
    reply_pieces,
)

Rows = dict[int, tuple[int, ...]]
sequences = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
rows = st.dictionaries(st.integers(0, 5), sequences, max_size=6)


def after(held: Rows, copies: list[Copy], passes: list[Packed]) -> dict[int, list[object]]:
    """What every row holds in the end: each token is remembered with all that it has read."""
    kept: dict[int, list[object]] = {s: list(prefixes(ids)) for s, ids in held.items()}
    before = {slot: list(row) for slot, row in kept.items()}
    for c in copies:
        row = kept.setdefault(c.target, [])
        row += [None] * (c.end - len(row))
        row[c.start : c.end] = before[c.source][c.start : c.end]
    for packed in passes:
        computed: list[object] = [None] * len(packed.ids_N)
        for span in packed.spans:
            path: tuple[int, ...] = ()
            for i in range(span.first, span.end):
                at = int(packed.positions_N[i])
                assert at == span.past + i - span.first
                if i == span.first and at:
                    # written before: by this pass or an earlier one
                    found = computed_or_kept(kept, computed, packed, span.slot, at - 1)
                    assert isinstance(found, tuple)
                    path = found
                path = (*path, int(packed.ids_N[i]))
                computed[i] = path
        for token, slot, at in zip(packed.token_W, packed.slot_W, packed.position_W, strict=True):
            row = kept.setdefault(int(slot), [])
            row += [None] * (int(at) + 1 - len(row))
            row[at] = computed[token]
    return kept


def computed_or_kept(
    kept: dict[int, list[object]], computed: list[object], packed: Packed, slot: int, at: int
) -> object:
    here = (packed.slot_W == slot) & (packed.position_W == at)
    if here.any():
        return computed[int(packed.token_W[here][0])]
    return kept[slot][at]


def prefixes(ids: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [ids[: n + 1] for n in range(len(ids))]


@given(held=rows, prompts=rows.filter(bool), limit=st.integers(1, 9))
def test_every_row_ends_up_with_its_prompt(held: Rows, prompts: Rows, limit: int) -> None:
    copies, pieces = prompt_pieces(held, prompts)
    packed = pack(pieces)
    parts = [part for _, part in packed.parts(limit)]
    assert sum(len(part.ids_N) for part in parts) == len(packed.ids_N)
    assert max(len(part.ids_N) for part in parts) <= limit
    for passes in ([packed], parts):
        kept = after(held, copies, passes)
        for slot, prompt in prompts.items():
            assert kept[slot][: len(prompt)] == prefixes(prompt)
    for slot, prompt in prompts.items():
        assert packed.ids_N[packed.last[slot]] == prompt[-1]


@given(prompts=rows.filter(bool))
def test_with_nothing_held_every_distinct_beginning_is_computed_once(prompts: Rows) -> None:
    _, pieces = prompt_pieces({}, prompts)
    distinct = {beginning for ids in prompts.values() for beginning in prefixes(ids)}
    assert len(pack(pieces).ids_N) == len(distinct)


@given(held=rows, prompts=rows.filter(bool))
def test_a_new_row_computes_nothing_that_another_holds(held: Rows, prompts: Rows) -> None:
    """But for the last token of each prompt, which gives the logits."""
    new = {slot + 10: ids for slot, ids in prompts.items()}
    _, pieces = prompt_pieces(held, new)
    known = {beginning for ids in held.values() for beginning in prefixes(ids)}
    wanted = {b for ids in new.values() for b in prefixes(ids)} - known
    wanted |= set(new.values())
    assert len(pack(pieces).ids_N) == len(wanted)


@given(a=sequences, b=sequences)
def test_common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix(a, b) == expected


def test_a_group_of_three_and_a_stranger() -> None:
    """By hand: prompts 1234, 1234, 1256 and a row that holds 129."""
    prompts = {0: (1, 2, 3, 4), 1: (1, 2, 3, 4), 2: (1, 2, 5, 6)}
    copies, pieces = prompt_pieces({7: (1, 2, 9)}, prompts)
    assert copies == [Copy(7, slot, 0, 2) for slot in (0, 1, 2)]
    packed = pack(pieces)
    assert packed.ids_N.tolist() == [3, 4, 5, 6]
    assert packed.positions_N.tolist() == [2, 3, 2, 3]
    assert packed.last == {0: 1, 1: 1, 2: 3}
    written = sorted(
        zip(
            packed.slot_W.tolist(), packed.position_W.tolist(), packed.token_W.tolist(), strict=True
        )
    )
    assert written == [(0, 2, 0), (0, 3, 1), (1, 2, 0), (1, 3, 1), (2, 2, 2), (2, 3, 3)]


def test_twins_read_their_replies_once() -> None:
    """Slots 0, 1, 2 hold the same; 0 and 1 drew the same token, 2 begins alike, 3 is another."""
    held = {0: (1, 2), 1: (1, 2), 2: (1, 2), 3: (9,)}
    twin = {0: 5, 1: 5, 2: 5, 3: 6}
    pieces = reply_pieces(held, {0: (7,), 1: (7,), 2: (7, 8), 3: (7,)}, twin)
    assert pieces == [
        Piece(0, 2, (7,)),
        Piece(1, 2, (7,), 1),
        Piece(2, 2, (7, 8), 1),
        Piece(3, 1, (7,)),
    ]
    packed = pack(pieces)
    assert packed.ids_N.tolist() == [7, 8, 7]
    assert np.array_equal(packed.positions_N, [2, 3, 1])
