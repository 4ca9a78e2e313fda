"""Attention over kept rows against attention written out, and the memory that rows take."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from untwine.errors import ModelError
from untwine.policy.attention import attend
from untwine.policy.packing import Copy, pack, prompt_pieces, reply_pieces
from untwine.policy.row_cache import RowCache, RowPass

HEADS, KEY_HEADS, SIZE = 4, 2, 8
CPU = torch.device("cpu")


def written_out(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One query (H, D) over all keys and values (T, K, D), in float64."""
    out = []
    for head in range(HEADS):
        k = keys[:, head * KEY_HEADS // HEADS].double()
        weights = (k @ query[head].double() * SIZE**-0.5).softmax(0)
        out.append(weights @ values[:, head * KEY_HEADS // HEADS].double())
    return torch.stack(out)


@pytest.mark.parametrize("batched", [False, True])
def test_attention_over_ragged_rows(batched: bool) -> None:
    """Three passes: prompts with a common head, replies, and a row that is rewritten."""
    generator = torch.Generator().manual_seed(0)
    state: dict[tuple[int, ...], torch.Tensor] = {}

    def of(path: tuple[int, ...]) -> torch.Tensor:
        """Query heads, key heads and value heads of a token, which depend on all it has read."""
        if path not in state:
            state[path] = torch.randn(HEADS + 2 * KEY_HEADS, SIZE, generator=generator)
        return state[path]

    held: dict[int, tuple[int, ...]] = {}
    twin: dict[int, int] = {}
    cache = RowCache(batched=batched)
    shared = tuple(range(11))
    for prompts, replies in (
        ({0: (*shared, 20, 21), 3: (*shared, 30), 5: (1, 2, 3)}, {}),
        ({4: (*shared, 20, 40)}, {0: (7,), 3: (7, 8, 9), 5: (4,)}),
        ({0: (*shared, 50), 5: tuple(range(40))}, {4: (6,)}),
    ):
        copies, pieces = prompt_pieces(held, prompts)
        pieces += reply_pieces(held, replies, twin)
        held |= prompts | {slot: held[slot] + ids for slot, ids in replies.items()}
        cache.reserve(prompts, max(map(len, held.values())))
        cache.copy(copies)
        packed = pack(pieces)
        assert len(packed.ids_N) < sum(map(len, prompts.values())) + 6
        paths = [()] * len(packed.ids_N)
        for token, slot, at in zip(packed.token_W, packed.slot_W, packed.position_W, strict=True):
            paths[token] = held[int(slot)][: at + 1]
        heads_NHD = torch.stack([of(path) for path in paths])
        query, key, value = heads_NHD.transpose(0, 1)[None].split(
            [HEADS, KEY_HEADS, KEY_HEADS], dim=1
        )
        out = RowPass(cache, packed, CPU).attend(0, query, key, value, SIZE**-0.5)[0]
        ends = np.array(sorted(set(packed.last.values())))
        few = RowPass(cache, packed, CPU, ends)
        asking = query if few.all_queries else query[:, :, ends]
        alone = few.attend(0, asking, key, value, SIZE**-0.5)[0]
        torch.testing.assert_close(alone[ends] if few.all_queries else alone, out[ends])
        for token, path in enumerate(paths):
            read = torch.stack([of(path[: n + 1]) for n in range(len(path))])
            expected = written_out(
                of(path)[:HEADS], read[:, HEADS:-KEY_HEADS], read[:, -KEY_HEADS:]
            )
            torch.testing.assert_close(out[token].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("extra", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}])
def test_attention_of_another_kind_is_refused(extra: dict[str, object]) -> None:
    cache = RowCache(batched=False)
    cache.reserve([0], 3)
    packed = pack(prompt_pieces({}, {0: (1, 2, 3)})[1])
    x = torch.zeros(1, 1, 3, 2)
    layer = SimpleNamespace(layer_idx=0)
    attend(layer, x, x, x, None, untwine_plan=RowPass(cache, packed, CPU), softcap=None)
    with pytest.raises(ModelError, match=next(iter(extra))):
        attend(layer, x, x, x, None, untwine_plan=RowPass(cache, packed, CPU), **extra)


def filled(cache: RowCache, slot: int, length: int, mark: float) -> None:
    """Write `length` tokens to the row of a slot, all `mark`."""
    packed = pack(prompt_pieces({}, {slot: tuple(range(length))})[1])
    x = torch.full((1, 1, length, 2), mark)
    RowPass(cache, packed, CPU).attend(0, x, x, x, 1.0)


def content(cache: RowCache, slot: int, length: int) -> torch.Tensor:
    return cache.buffers(0, torch.empty(1, 1, 1, 2))[0][cache.row(slot), 0, :length]


def test_rows_are_given_back_and_buffers_follow_what_is_live() -> None:
    cache = RowCache(batched=False)
    for slot in range(8):
        cache.reserve([slot], 900)
        filled(cache, slot, 900, float(slot))
    assert cache.rows == 8
    assert 900 <= cache.capacity <= 2 * 900
    full = cache.bytes
    for slot in range(7):
        cache.free(slot)
        cache.reserve([slot + 100], 900)  # takes the row that was given back
    assert (cache.rows, cache.bytes) == (8, full)
    assert torch.equal(content(cache, 7, 900), torch.full((900, 2), 7.0))
    for slot in range(7):
        cache.free(slot + 100)
    cache.reserve([0], 60)
    assert cache.rows == 2  # what is left moved together, and the capacity followed
    assert cache.bytes <= full / 16
    assert torch.equal(content(cache, 7, 60), torch.full((60, 2), 7.0))


def test_copies_read_what_was_there_before() -> None:
    """Rows 0 and 1 change places."""
    cache = RowCache(batched=False)
    cache.reserve([0, 1], 5)
    filled(cache, 0, 5, 1.0)
    filled(cache, 1, 5, 2.0)
    cache.copy([Copy(0, 1, 0, 3), Copy(1, 0, 0, 3)])
    assert content(cache, 0, 5)[:, 0].tolist() == [2, 2, 2, 1, 1]
    assert content(cache, 1, 5)[:, 0].tolist() == [1, 1, 1, 2, 2]
    places = cache.places(np.array([1, 0, 1]), np.array([0, 2, 4]), 2, CPU)
    assert len(set(places.tolist())) == 6
