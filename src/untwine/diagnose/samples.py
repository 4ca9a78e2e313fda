"""Step samples as plain token ids, and the padded chunks a model reads.

Letters used in names of this room: N samples, B samples of one chunk, T tokens, L action tokens,
D hidden size, V vocabulary, P numbers in one parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from untwine.errors import UntwineError
from untwine.policy.trie import cut_within, sort_key

Allowed = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class StepSample:
    """One (state, action) as token ids: log pi(a|s) is the sum over `action_ids`.

    allowed  per action token the ids it was drawn from, or None where the whole vocabulary was
             open; log pi is renormalised over them, so a forced token (one id) counts 0
    """

    prompt_ids: tuple[int, ...]
    action_ids: tuple[int, ...]
    allowed: Allowed | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.action_ids:
            raise UntwineError("a step sample needs at least one prompt id and one action id")
        if self.allowed is None:
            return
        if len(self.allowed) != len(self.action_ids):
            raise UntwineError(
                f"a step sample has {len(self.action_ids)} action ids but `allowed` has "
                f"{len(self.allowed)} entries; give one per action id"
            )
        for token, ids in zip(self.action_ids, self.allowed, strict=True):
            if ids is not None and token not in ids:
                raise UntwineError(f"action id {token} is not among the ids allowed at its place")

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.action_ids)


SampleLike = StepSample | tuple[Sequence[int], Sequence[int]]


def as_samples(samples: Sequence[SampleLike]) -> list[StepSample]:
    """Pairs (prompt_ids, action_ids) and `StepSample`s alike, as `StepSample`s."""
    return [
        sample
        if isinstance(sample, StepSample)
        else StepSample(tuple(map(int, sample[0])), tuple(map(int, sample[1])))
        for sample in samples
    ]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Samples `rows` (in the order of the list they were cut from), padded on the right.

    ids_BT       token ids; padding is 0, and no mask is needed because attention is causal
    sample_M     for each action token of the chunk its sample, counted within the chunk
    place_M      its place among the action tokens of the sample
    column_M     its column in `ids_BT`; the logits that predict it are at `column_M - 1`
    allowed      (M) the ids it was drawn from, or None
    """

    rows: range
    ids_BT: torch.Tensor
    sample_M: torch.Tensor
    place_M: torch.Tensor
    column_M: torch.Tensor
    allowed: tuple[tuple[int, ...] | None, ...]

    @property
    def targets_M(self) -> torch.Tensor:
        return self.ids_BT[self.sample_M, self.column_M]


def in_trie_order(samples: Sequence[StepSample]) -> list[int]:
    """Order in which those with long common beginnings are neighbours."""
    return sorted(range(len(samples)), key=lambda i: sort_key(_ids(samples[i])))


def by_length(samples: Sequence[StepSample]) -> list[int]:
    """Order in which neighbours have similar lengths, longest first."""
    return sorted(range(len(samples)), key=lambda i: -samples[i].length)


def cut_chunks(samples: Sequence[StepSample], size: int, device: torch.device) -> list[Chunk]:
    """Consecutive chunks of at most `size` samples."""
    _check_size(size)
    return [
        _chunk(samples[first : first + size], first, device)
        for first in range(0, len(samples), size)
    ]


def cut_shared(samples: Sequence[StepSample], size: int, device: torch.device) -> list[Chunk]:
    """Consecutive chunks of samples in trie order, each with at most as many distinct tokens as
    `size` samples of the greatest length have."""
    _check_size(size)
    budget = size * max(s.length for s in samples)
    parts = cut_within([_ids(s) for s in samples], budget)
    return [_chunk(samples[part], part.start, device) for part in parts]


def _check_size(size: int) -> None:
    if size < 1:
        raise UntwineError(f"chunk is {size}; it must be at least 1")


def _ids(sample: StepSample) -> np.ndarray:
    return np.array(sample.prompt_ids + sample.action_ids, dtype=np.int64)


def _chunk(samples: Sequence[StepSample], first: int, device: torch.device) -> Chunk:
    ids = torch.zeros(len(samples), max(s.length for s in samples), dtype=torch.long)
    sample: list[int] = []
    place: list[int] = []
    column: list[int] = []
    allowed: list[tuple[int, ...] | None] = []
    for b, s in enumerate(samples):
        ids[b, : s.length] = torch.tensor([*s.prompt_ids, *s.action_ids])
        count = len(s.action_ids)
        sample += [b] * count
        place += range(count)
        column += range(len(s.prompt_ids), s.length)
        allowed += s.allowed or (None,) * count
    return Chunk(
        rows=range(first, first + len(samples)),
        ids_BT=ids.to(device),
        sample_M=torch.tensor(sample, device=device),
        place_M=torch.tensor(place, device=device),
        column_M=torch.tensor(column, device=device),
        allowed=tuple(allowed),
    )
