"""The packed trie against brute force over its paths."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.tries import reads, sequences
from untwine.policy.trie import Costs, Layout, build_trie, common_prefix

FREE = Costs(token=1.0, pair=0.0, call=0.0, merge=0.0)
layouts = st.sampled_from(["auto", "trie", "separate"])


@settings(deadline=None)
@given(sequences(), layouts)
def test_every_row_lies_along_its_path(rows: list[np.ndarray], layout: Layout) -> None:
    trie = build_trie(rows, layout)
    for row, path in zip(rows, trie.paths, strict=True):
        assert trie.tokens_N[path].tolist() == row.tolist()
        assert trie.depth_N[path].tolist() == list(range(len(row)))
    assert {n for path in trie.paths for n in path} == set(range(trie.size))


@settings(deadline=None)
@given(sequences())
def test_the_trie_holds_every_distinct_beginning_once(rows: list[np.ndarray]) -> None:
    beginnings = {tuple(row[: n + 1]) for row in rows for n in range(len(row))}
    assert build_trie(rows, "trie").size == len(beginnings)
    assert build_trie(rows, "separate").size == sum(map(len, rows))


@settings(deadline=None)
@given(sequences(), layouts)
def test_a_token_is_read_by_its_subtree_and_no_other(
    rows: list[np.ndarray], layout: Layout
) -> None:
    trie = build_trie(rows, layout)
    i = np.arange(trie.size)
    inside = (i[None] <= i[:, None]) & (i[:, None] < trie.subtree_end_N[None])
    assert (inside == reads(trie)).all()
    assert trie.pairs == reads(trie).sum()


@settings(deadline=None)
@given(sequences(), layouts)
def test_chains_and_joins_cover_every_pair_once(rows: list[np.ndarray], layout: Layout) -> None:
    trie = build_trie(rows, layout)
    covered = np.zeros((trie.size, trie.size), dtype=int)
    for a, b in trie.chains:
        covered[a:b, a:b] += np.tri(b - a, dtype=int)
    for a, b, c, d in trie.joins:
        covered[a:b, c:d] += 1
    assert (covered == reads(trie)).all()


@settings(deadline=None)
@given(sequences(tokens=2, rows=16))
def test_no_token_takes_part_in_many_joins(rows: list[np.ndarray]) -> None:
    trie = build_trie(rows, "trie")
    joined = np.zeros(trie.size)
    for a, b, _, _ in trie.joins:
        joined[a:b] += 1
    assert joined.max() <= math.log2(trie.size)
    assert len(trie.joins) < len(trie.chains)


def test_by_hand() -> None:
    """1 2 branches into 3 4 5, 6 and the end; 7 is a tree of its own; one row is there twice."""
    rows = [[1, 2, 6], [7], [1, 2, 3, 4, 5], [1, 2], [1, 2, 6]]
    trie = build_trie([np.array(row) for row in rows], "trie")
    assert trie.tokens_N.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert trie.depth_N.tolist() == [0, 1, 2, 3, 4, 2, 0]
    assert trie.subtree_end_N.tolist() == [6, 6, 5, 5, 5, 6, 7]
    assert trie.chains == ((0, 5), (5, 6), (6, 7))
    assert trie.joins == ((5, 6, 0, 2),)
    assert [p.tolist() for p in trie.paths] == [[0, 1, 5], [6], [0, 1, 2, 3, 4], [0, 1], [0, 1, 5]]


def test_a_beginning_is_shared_when_it_pays() -> None:
    def size(head: int, tail: int, costs: Costs) -> int:
        rows = [np.array([9] * head + [k] * tail) for k in range(3)]
        return build_trie(rows, "auto", costs).size

    costs = Costs(token=10.0, pair=0.0, call=100.0, merge=1.0)
    # Sharing saves 2 x head x 10 and costs 100 + 2 x tail.
    assert size(10, 40, costs) == 10 + 3 * 40
    assert size(10, 60, costs) == 3 * (10 + 60)
    assert size(5, 1, costs) == 3 * (5 + 1)
    # Pairs count too: 2 x 5^2 / 2 of them at 10 each.
    assert size(5, 1, Costs(token=10.0, pair=10.0, call=100.0, merge=1.0)) == 5 + 3


@settings(deadline=None)
@given(sequences())
def test_sharing_that_costs_nothing_is_always_taken(rows: list[np.ndarray]) -> None:
    assert build_trie(rows, "auto", FREE).size == build_trie(rows, "trie").size


@settings(deadline=None)
@given(sequences())
def test_repeated_rows_and_beginnings_of_rows_are_always_shared(rows: list[np.ndarray]) -> None:
    dear = Costs(token=1.0, pair=0.0, call=1e12, merge=1e12)
    twice = [*rows, *rows, *[row[: (len(row) + 1) // 2] for row in rows]]
    assert build_trie(twice, "auto", dear).size == build_trie(rows, "auto", dear).size


def test_costs_of_a_layer_follow_its_size_and_the_device() -> None:
    small, large = Costs.of_layer(1e4, 64), Costs.of_layer(1e6, 1024)
    assert small.call == large.call > 0
    assert large.token / small.token == 100
    assert large.merge / small.merge == large.pair / small.pair == 16
    assert (Costs.of_layer(1e6, 64, "cuda").call, Costs.of_layer(1e6, 64, "cuda").merge) == (0, 0)


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [([1, 2], [1, 2], 2), ([1, 2], [1, 2, 3], 2), ([1], [2], 0), ([], [2], 0), ([3, 1], [3, 2], 1)],
)
def test_common_prefix(a: list[int], b: list[int], shared: int) -> None:
    assert common_prefix(np.array(a), np.array(b)) == shared


def test_a_thousand_nested_rows() -> None:
    rows = [np.arange(n + 1) for n in range(1500)]
    trie = build_trie(rows, "trie")
    assert trie.size == 1500
    assert trie.chains == ((0, 1500),)
    assert trie.joins == ()
