"""Which attention calls cover a packed trie on the CPU.

A *part* is one call: a range of queries against a range of keys. Chains are causal, joins are not
masked (trie.py). When only some tokens' outputs are wanted, queries are numbered by their place
among these: a chain keeps its wanted queries with an explicit mask, a join needs none.

Shape suffixes: N tokens, U queries (N, or the wanted ones), B chains of a bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from untwine.policy.trie import Chain, Join, PackedTrie

_BATCHED = 192  # longest chain that is batched with others


@dataclass(frozen=True, slots=True)
class Part:
    """Queries a..b read keys c..d: all of them, causally, or where `mask` (b - a, d - c) is 0."""

    range: Join
    causal: bool = False
    mask: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Padded:
    """Ranges of similar length, right-padded to a matrix so that one call serves them all.

    place    numbers of each range, the last one repeated as padding, flattened (B * L,)
    real     where in `place` no padding is; padding: where there is
    tokens   place[real]
    width    L
    """

    place: torch.Tensor
    real: torch.Tensor
    padding: torch.Tensor
    tokens: torch.Tensor
    width: int

    @classmethod
    def of(cls, ranges: Sequence[tuple[int, int]]) -> Padded:
        lengths = np.array([b - a for a, b in ranges])[:, None]
        column = np.arange(lengths.max())[None]
        place = np.array([a for a, _ in ranges])[:, None] + np.minimum(column, lengths - 1)
        real = (column < lengths).ravel()
        where = torch.from_numpy(place.ravel())
        return cls(
            where,
            torch.from_numpy(np.flatnonzero(real)),
            torch.from_numpy(np.flatnonzero(~real)),
            where[torch.from_numpy(real)],
            column.shape[1],
        )

    def take(self, x: torch.Tensor, *, clear: bool = False) -> torch.Tensor:
        """(K, M, ...) to (K * B, L, ...); padding is 0 if it is to be `clear`."""
        rows = x.index_select(1, self.place)
        if clear:
            rows.index_fill_(1, self.padding, 0.0)
        return rows.reshape(-1, self.width, *x.shape[2:])

    def put(self, part: torch.Tensor, into: torch.Tensor) -> None:
        """Write (K * B, L, ...) to its places in `into` (K, M, ...)."""
        rows = part.reshape(into.shape[0], -1, *part.shape[2:])
        if len(self.padding):
            rows = rows.index_select(1, self.real)
        into.index_copy_(1, self.tokens, rows.to(into.dtype))


@dataclass(frozen=True, slots=True)
class Bucket:
    """Short chains that one call serves; `part` is that call, on the matrices."""

    queries: Padded
    keys: Padded
    part: Part


@dataclass(frozen=True, slots=True)
class Layout:
    """All calls of one attention over the trie.

    chains, buckets   every query is in exactly one of them
    joins             what is merged into their results
    every_key         whether chains and buckets hold every key as well
    """

    chains: tuple[Part, ...]
    buckets: tuple[Bucket, ...]
    joins: tuple[Part, ...]
    every_key: bool


def whole_layout(trie: PackedTrie) -> Layout:
    """Every token is a query."""
    chains, buckets = [], []
    for group in _alike(trie.chains):
        if len(group) == 1:
            a, b = group[0]
            chains.append(Part((a, b, a, b), causal=True))
        else:
            padded = Padded.of(group)
            call = Part((0, padded.width, 0, padded.width), causal=True)
            buckets.append(Bucket(padded, padded, call))
    return Layout(tuple(chains), tuple(buckets), tuple(map(Part, trie.joins)), every_key=True)


def wanted_layout(trie: PackedTrie, wanted_U: np.ndarray) -> Layout:
    """Only the tokens `wanted_U`, sorted, are queries."""

    def among(a: int, b: int) -> tuple[int, int]:
        low, high = np.searchsorted(wanted_U, (a, b))
        return int(low), int(high)

    chains, buckets = [], []
    read = [(a, int(wanted_U[among(a, b)[1] - 1]) + 1) for a, b in trie.chains if _any(among(a, b))]
    for group in _alike(read):
        queries = [among(a, b) for a, b in group]
        if len(group) == 1:
            (a, b), (c, d) = queries[0], group[0]
            mask = _mask(wanted_U[a:b] - c, d - c)
            chains.append(Part((a, b, c, d), mask=mask))
        else:
            padded, keys = Padded.of(queries), Padded.of(group)
            place_BL = wanted_U[padded.place.numpy()].reshape(len(group), -1)
            mask = _mask(place_BL - np.array(group)[:, :1], keys.width)
            call = Part((0, padded.width, 0, keys.width), mask=mask[:, None])
            buckets.append(Bucket(padded, keys, call))
    joins = [Part((*among(a, b), c, d)) for a, b, c, d in trie.joins if _any(among(a, b))]
    return Layout(tuple(chains), tuple(buckets), tuple(joins), every_key=False)


def _any(bounds: tuple[int, int]) -> bool:
    return bounds[0] < bounds[1]


def _mask(place: np.ndarray, keys: int) -> torch.Tensor:
    """What to add to the scores (..., L, keys): 0 up to the place of a query in its chain."""
    forbidden = np.arange(keys) > place[..., None]
    return torch.from_numpy(np.where(forbidden, np.float32(-np.inf), np.float32(0)))


def _alike(chains: Sequence[Chain]) -> list[list[Chain]]:
    """Long chains alone; short ones together with others at most a quarter shorter."""
    groups: list[list[Chain]] = []
    for chain in sorted(chains, key=lambda c: c[0] - c[1]):
        length = chain[1] - chain[0]
        fits = groups and length <= _BATCHED
        if fits and groups[-1][0][1] - groups[-1][0][0] <= min(_BATCHED, 1.25 * length + 4):
            groups[-1].append(chain)
        else:
            groups.append([chain])
    return groups
