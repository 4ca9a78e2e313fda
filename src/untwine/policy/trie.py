"""The packed prefix trie: token sequences with common beginnings, every distinct token once.

Sequences are sorted, equal beginnings become one path, and the nodes are laid out depth first with
the heaviest child first. In that order a subtree is contiguous, and so is a *chain*: a node, its
heaviest child, its heaviest child, and so on down to a leaf (the heavy paths of Sleator and Tarjan,
1983). What each token reads, its ancestors and itself, is then the union of few rectangles:

    chain (a, b)             tokens a..b read each other causally
    join (qa, qb, ka, kb)    tokens qa..qb, whole subtrees, all read tokens ka..kb, the part of a
                             chain above the node where they branch off

A token takes part in one chain, and in one join for every light edge above it: at most log2 N.

A row per episode and a row per step are the same thing with fewer branches: a forest of chains
without joins. Which beginnings are worth sharing is decided branch by branch (`Costs`).

Shape suffixes: N distinct tokens (nodes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

Layout = Literal["auto", "trie", "separate"]
Chain = tuple[int, int]
Join = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Costs:
    """What a forward and backward pass costs, in floating-point operations of one layer.

    token   one token through the linear layers
    pair    one query reading one key
    call    starting one attention call
    merge   merging one query's partial result into another (by log-sum-exp)

    Sharing a beginning of n tokens among c branches saves (c - 1) n tokens and the pairs they read;
    it costs one call, and a merge for every token of all but the heaviest branch. Repeated rows,
    and rows that others begin with, cost nothing and are always shared.
    """

    token: float = 4e6
    pair: float = 4e3
    call: float = 6e6
    merge: float = 8e4

    @classmethod
    def of_layer(cls, weights: float, width: float, device: str = "cpu") -> Costs:
        """For a layer of `weights` linear weights and `width` = heads x head size.

        6 operations per weight and token, 14 width per pair (the backward computes scores again).
        Calls and merges are time, not operations: about 0.1 ms and 6 ns per element on a CPU core
        that does 5e10 operations a second. FlexAttention has neither.
        """
        cpu = float(device == "cpu")
        return cls(6 * weights, 14 * width, 6e6 * cpu, 300 * width * cpu)

    def worth(self, branches: int, base: int, depth: int, light: int) -> bool:
        """Whether `branches` sequences should share positions base..depth, when all but the
        heaviest branch hold `light` tokens."""
        saved = (depth - base) * self.token + (depth**2 - base**2) / 2 * self.pair
        return (branches - 1) * saved > self.call + light * self.merge


@dataclass(frozen=True, slots=True)
class PackedTrie:
    """A forest in depth-first order, with what attention needs to know.

    tokens_N        token ids
    depth_N         distance from the root, which is the position for rotary embeddings
    subtree_end_N   token i is read by i <= j < subtree_end_N[i], and by no other
    chains, joins   see the module
    paths           for each sequence, in the order given: the node of each of its tokens
    """

    tokens_N: np.ndarray
    depth_N: np.ndarray
    subtree_end_N: np.ndarray
    chains: tuple[Chain, ...]
    joins: tuple[Join, ...]
    paths: tuple[np.ndarray, ...]

    @property
    def size(self) -> int:
        return len(self.tokens_N)

    @property
    def pairs(self) -> int:
        """Query-key pairs that attention computes."""
        return int((self.depth_N + 1).sum())


@dataclass(slots=True)
class _Node:
    """A stretch of tokens without a branch: positions start..end of the sequence `row`."""

    row: int
    start: int
    end: int
    parent: int
    size: int = 0  # tokens of the subtree
    first: int = 0  # place of the first token in depth-first order
    chain: int = 0  # where the chain through this node begins
    children: list[int] | None = None


def build_trie(
    sequences: Sequence[np.ndarray], layout: Layout = "auto", costs: Costs | None = None
) -> PackedTrie:
    """Pack sequences of token ids, each of at least one token.

    layout   `trie` shares every common beginning, `separate` none, `auto` those that pay
    costs    what `auto` goes by
    """
    order = sorted(range(len(sequences)), key=lambda i: sort_key(sequences[i]))
    ordered = [sequences[i] for i in order]
    # A row that the next one begins with costs nothing: it lies along that one's path.
    ahead = [*shared_lengths(ordered)[1:].tolist(), -1]
    covered = [
        layout != "separate" and n == len(row) for n, row in zip(ahead, ordered, strict=True)
    ]
    rows = [row for row, c in zip(ordered, covered, strict=True) if not c]
    nodes, leaves = _branch(rows, layout, costs or Costs())
    roots = _place(nodes)
    chains, joins = _attention(nodes, roots)
    total = sum(nodes[r].size for r in roots)
    tokens, depth, subtree_end = (np.empty(total, np.int64) for _ in range(3))
    for node in nodes:  # nothing branches inside a node, so its tokens share the subtree's end
        here = slice(node.first, node.first + node.end - node.start)
        tokens[here] = rows[node.row][node.start : node.end]
        depth[here] = np.arange(node.start, node.end)
        subtree_end[here] = node.first + node.size
    paths: list[np.ndarray] = [np.empty(0, np.int64)] * len(order)
    for i in range(len(order) - 1, -1, -1):
        if covered[i]:
            paths[order[i]] = paths[order[i + 1]][: len(ordered[i])]
        else:
            paths[order[i]] = _path(nodes, leaves.pop())
    return PackedTrie(tokens, depth, subtree_end, tuple(chains), tuple(joins), tuple(paths))


def sort_key(ids: np.ndarray) -> bytes:
    """Sequences sorted by it have those with long common beginnings beside each other."""
    return ids.astype(">u4").tobytes()


def shared_lengths(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Length of the common beginning of each row with the one before it (0 for the first)."""
    shared = np.zeros(len(rows), np.int64)
    for i in range(1, len(rows)):
        shared[i] = common_prefix(rows[i - 1], rows[i])
    return shared


def cut_within(rows: Sequence[np.ndarray], budget: int) -> list[slice]:
    """Neighbours with at most `budget` distinct tokens together, of rows in trie order; a longer
    row stands alone. A beginning that rows of two parts share counts in both."""
    cuts, held = [0], 0
    for i, (row, shared) in enumerate(zip(rows, shared_lengths(rows).tolist(), strict=True)):
        held += len(row) - shared
        if i and held > budget:
            cuts.append(i)
            held = len(row)
    return [slice(a, b) for a, b in pairwise([*cuts, len(rows)]) if a < b]


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading ids two sequences share."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


def _branch(
    rows: Sequence[np.ndarray], layout: Layout, costs: Costs
) -> tuple[list[_Node], list[int]]:
    """Nodes, parents before children, of sorted rows; and for each row the node it ends in."""
    shared = shared_lengths(rows)
    lengths = np.array([len(row) for row in rows])
    nodes: list[_Node] = []
    leaves = [-1] * len(rows)
    todo = [(0, len(rows), 0, -1)]  # rows lo..hi, whose first `base` tokens end in node `parent`
    while todo:
        lo, hi, base, parent = todo.pop()
        if hi - lo == 1:
            leaves[lo] = len(nodes)
            nodes.append(_Node(lo, base, int(lengths[lo]), parent))
            continue
        inner = shared[lo + 1 : hi]
        depth = int(inner.min())
        cuts = [lo, *(lo + 1 + np.flatnonzero(inner == depth)).tolist(), hi]
        parts = list(pairwise(cuts))
        if depth > base and (
            layout == "trie"
            or (layout == "auto" and _pays(parts, lengths, shared, base, depth, costs))
        ):
            nodes.append(_Node(lo, base, depth, parent))
            base, parent = depth, len(nodes) - 1
        todo += [(a, b, base, parent) for a, b in reversed(parts)]
    return nodes, leaves


def _pays(
    parts: Sequence[tuple[int, int]],
    lengths: np.ndarray,
    shared: np.ndarray,
    base: int,
    depth: int,
    costs: Costs,
) -> bool:
    beyond = [
        int((lengths[a:b] - depth).sum() - (shared[a + 1 : b] - depth).sum()) for a, b in parts
    ]
    return costs.worth(len(parts), base, depth, sum(beyond) - max(beyond))


def _place(nodes: list[_Node]) -> list[int]:
    """Give every node its size and place; returns the roots."""
    roots: list[int] = []
    for i in range(len(nodes) - 1, -1, -1):
        node = nodes[i]
        node.size += node.end - node.start
        if node.parent >= 0:
            above = nodes[node.parent]
            above.size += node.size
            above.children = [*(above.children or ()), i]
        else:
            roots.append(i)
    todo = list(roots)
    free = 0
    while todo:
        i = todo.pop()
        node = nodes[i]
        node.first = free
        free += node.end - node.start
        node.children = sorted(node.children or (), key=lambda c: -nodes[c].size)
        todo += reversed(node.children)
    return roots


def _attention(nodes: list[_Node], roots: Sequence[int]) -> tuple[list[Chain], list[Join]]:
    chains: list[Chain] = []
    joins: list[Join] = []
    todo = list(roots)
    for i in roots:
        nodes[i].chain = nodes[i].first
    while todo:
        node = nodes[todo.pop()]
        end = node.first + node.end - node.start
        children = [nodes[c] for c in node.children or ()]
        for child in children:
            child.chain = node.chain if child is children[0] else child.first
        if not children:
            chains.append((node.chain, end))
        if len(children) > 1:
            joins.append((children[1].first, node.first + node.size, node.chain, end))
        todo += node.children or ()
    return sorted(chains), sorted(joins)


def _path(nodes: Sequence[_Node], end: int) -> np.ndarray:
    stretches = []
    while end >= 0:
        node = nodes[end]
        stretches.append(np.arange(node.first, node.first + node.end - node.start))
        end = node.parent
    return np.concatenate(stretches[::-1])
