"""Random tries for property tests, and what they must mean, by brute force."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from untwine.policy.trie import PackedTrie


@st.composite
def sequences(
    draw: st.DrawFn, tokens: int = 3, rows: int = 9, longest: int = 24
) -> list[np.ndarray]:
    """Ragged rows that continue, repeat or are beginnings of each other, or stand alone."""
    found: list[list[int]] = []
    ids = st.integers(0, tokens - 1)
    for _ in range(draw(st.integers(1, rows))):
        head: list[int] = []
        if found and draw(st.booleans()):
            whole = draw(st.sampled_from(found))
            head = whole[: draw(st.integers(0, len(whole)))]
        tail = draw(st.lists(ids, min_size=0 if head else 1, max_size=longest))
        found.append(head + tail)
    return [np.array(row, dtype=np.int64) for row in found]


def reads(trie: PackedTrie) -> np.ndarray:
    """(N, N): whether a token reads another, from the paths alone."""
    table = np.zeros((trie.size, trie.size), dtype=bool)
    for path in trie.paths:
        for i, node in enumerate(path):
            table[node, path[: i + 1]] = True
    return table
