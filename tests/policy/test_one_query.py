"""Attention of single queries, against the definition written out in float64."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from untwine.policy import one_query as module
from untwine.policy.one_query import available, one_query


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def by_definition(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: list[int],
    lengths: list[int],
    scale: float,
) -> torch.Tensor:
    """Numbers beyond a row's length may be anything, so they are cut off first."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for h in range(query.shape[1]):
            for g in range(query.shape[2]):
                q = query[b, h, g].double()
                scores = torch.stack([q @ keys[row, h, t].double() for t in range(length)]) * scale
                weights = (scores - scores.max()).exp()
                mixed = weights[:, None] * values[row, h, :length].double()
                out[b, h, g] = mixed.sum(0) / weights.sum()
    return out


def drawn(
    seed: int, sizes: tuple[int, int, int], rows: list[int], lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values; NaN wherever nothing is to be read."""
    generator = torch.Generator().manual_seed(seed)
    heads, queries, size = sizes
    query = 3 * torch.randn(len(rows), heads, queries, size, generator=generator)
    keys, values = (
        torch.randn(max(rows) + 2, heads, max(lengths) + 3, size, generator=generator)
        for _ in range(2)
    )
    kept = torch.zeros(keys.shape[0], keys.shape[2], dtype=torch.bool)
    for row, length in zip(rows, lengths, strict=True):
        kept[row, :length] = True
    for x in (keys, values):
        x.transpose(1, 2)[~kept] = torch.nan
    return query, keys, values


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([16, 32, 64, 96, 128])),
    asked=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 150)), min_size=1, max_size=5),
)
def test_like_the_definition(
    seed: int, sizes: tuple[int, int, int], asked: list[tuple[int, int]]
) -> None:
    rows, lengths = [row for row, _ in asked], [length for _, length in asked]
    query, keys, values = drawn(seed, sizes, rows, lengths)
    scale = sizes[2] ** -0.5
    found = one_query(query, keys, values, rows, lengths, scale)
    wanted = by_definition(query, keys, values, rows, lengths, scale)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-6)


def test_scores_far_apart() -> None:
    """A weight that cannot be told from 0 is 0, and the largest score decides."""
    query, keys, values = drawn(0, (1, 1, 32), [0], [40])
    for scale in (1.0, 30.0, 1000.0, -1000.0):
        found = one_query(query, keys, values, [0], [40], scale)
        wanted = by_definition(query, keys, values, [0], [40], scale)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, lengths = [2, 0, 1], [5, 70, 1]
    query, keys, values = drawn(1, (2, 3, 64), rows, lengths)
    compiled = one_query(query, keys, values, rows, lengths, 0.125)
    monkeypatch.setenv("CC", "no-such-compiler")
    module._kernel.cache_clear()
    try:
        assert not available()
        torch.testing.assert_close(one_query(query, keys, values, rows, lengths, 0.125), compiled)
    finally:
        module._kernel.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_numbers(dtype: torch.dtype) -> None:
    rows, lengths = [1, 0], [30, 7]
    query, keys, values = (x.to(dtype) for x in drawn(2, (2, 2, 32), rows, lengths))
    found = one_query(query, keys, values, rows, lengths, 0.2)
    assert found.dtype == dtype
    wanted = by_definition(query, keys, values, rows, lengths, 0.2)
    close = 1e-12 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(found.double(), wanted, rtol=close, atol=close)


@pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler"
)
def test_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available()
    monkeypatch.setattr(module, "_WORTH_THREADS", 0)
    rows, lengths = [4, 0, 3, 1, 2], [9, 33, 64, 1, 100]
    query, keys, values = drawn(3, (2, 2, 32), rows, lengths)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            found.append(one_query(query, keys, values, rows, lengths, 0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
