"""Keys and values of many rows, each as long as it is, and attention over them.

A forward pass that carries a `RowPass` (attention.py) writes its keys and values to the rows and
lets each token read its own row. Tokens come
packed (packing.py), so linear layers see no padding.

On the CPU each row attends over exactly what it holds; no key is copied and none is masked but
those of the row's own new tokens. Rows with one new token each are done together (one_query.py).
Elsewhere, where calls are dear and arithmetic is not, rows with about the same number of new tokens
are padded to one call.

Shape suffixes: N packed tokens, H query heads, K key heads, G = H / K, D head size, R rows,
C capacity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from untwine.policy.one_query import one_query
from untwine.policy.packing import Copy, Packed, Span


class RowCache:
    """Keys and values of slots: per layer a buffer (R, K, C, D) each; what a head reads lies in one
    piece.

    A slot gets a row when it is first written to and gives it back in `free`. Buffers grow with the
    longest row and the number of rows, and shrink when a quarter of them would do.

    batched   attention pads rows to few calls, instead of one call for each row
    """

    def __init__(self, *, batched: bool) -> None:
        self.batched = batched
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._row_of: dict[int, int] = {}
        self._unused: list[int] = []
        self.rows = 0
        self.capacity = 0

    @property
    def bytes(self) -> int:
        """Memory that is taken."""
        return sum(x.nbytes for pair in self._buffers for x in pair)

    def reserve(self, slots: Iterable[int], longest: int) -> None:
        """Give these slots rows. `longest`: tokens that the longest row is about to hold."""
        for slot in slots:
            if slot not in self._row_of:
                row = self._unused.pop() if self._unused else len(self._row_of)
                self._row_of[slot] = row
        capacity = self.capacity
        if longest > capacity:
            capacity = max(longest + 64, capacity * 3 // 2)
        elif 4 * (longest + 64) <= capacity:
            capacity = longest + 64
        together = 4 * len(self._row_of) <= self.rows
        rows = len(self._row_of) + (0 if together else len(self._unused))
        if capacity != self.capacity or rows > self.rows or together:
            self._resize(rows, capacity, together)

    def free(self, slot: int) -> None:
        """The row of the slot may be given to another."""
        if slot in self._row_of:
            self._unused.append(self._row_of.pop(slot))

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy positions from row to row, all at once. The rows must be reserved."""
        if not copies or not self._buffers:
            return
        positions = np.concatenate([np.arange(c.start, c.end) for c in copies])
        lengths = [c.end - c.start for c in copies]
        like = self._buffers[0][0]
        source, target = (
            self.places(np.repeat(slots, lengths), positions, like.shape[1], like.device)
            for slots in ([c.source for c in copies], [c.target for c in copies])
        )
        for pair in self._buffers:
            for buffer in pair:
                flat = buffer.flatten(0, 2)
                flat.index_copy_(0, target, flat.index_select(0, source))

    def places(
        self, slots_W: np.ndarray, positions_W: np.ndarray, heads: int, device: torch.device
    ) -> torch.Tensor:
        """Where positions of slots lie, for each head: indices (K * W,) into the flattened first
        three dimensions of a buffer."""
        slots_U, which = np.unique(slots_W, return_inverse=True)
        rows_U = np.array([self._row_of[slot] for slot in slots_U.tolist()])
        head_K1 = np.arange(heads)[:, None]
        places_KW = (rows_U[which] * heads + head_K1) * self.capacity + positions_W
        return torch.from_numpy(places_KW.ravel()).to(device)

    def row(self, slot: int) -> int:
        return self._row_of[slot]

    def buffers(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, (R, K, C, D), of the type and with the heads of `like`
        (1, K, N, D)."""
        if layer == len(self._buffers):
            self._buffers.append((self._new(like), self._new(like)))
        return self._buffers[layer]

    def _new(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self.rows, like.shape[1], self.capacity, like.shape[3])
        # padded calls read beyond the end of a row, and what they mask away must still be a number
        return like.new_zeros(shape) if self.batched else like.new_empty(shape)

    def _resize(self, rows: int, capacity: int, together: bool) -> None:
        """`together`: rows in use move to the front."""
        old = [row for row in self._row_of.values() if row < self.rows]
        if together:
            self._row_of = {slot: row for row, slot in enumerate(self._row_of)}
            self._unused = []
        before, kept = self.rows, min(capacity, self.capacity)
        self.rows, self.capacity = rows, capacity

        def resized(buffer: torch.Tensor) -> torch.Tensor:
            made = self._new(buffer)
            if together:
                made[: len(old), :, :kept] = buffer[old, :, :kept]
            else:
                made[:before, :, :kept] = buffer[:, :, :kept]
            return made

        for layer, (keys, values) in enumerate(self._buffers):
            self._buffers[layer] = resized(keys), resized(values)


class RowPass:
    """One forward pass over packed tokens; made for all layers, handed to the model.

    longest   tokens that the longest of its rows holds afterwards
    wanted    see `Plan`; None when all are
    """

    def __init__(
        self,
        cache: RowCache,
        packed: Packed,
        device: torch.device,
        wanted_U: np.ndarray | None = None,
    ) -> None:
        """wanted_U   the packed tokens whose output is read, sorted; None: all"""
        self._cache = cache
        every = wanted_U is None or len(wanted_U) == len(packed.ids_N)
        self._wanted_U = np.arange(len(packed.ids_N)) if wanted_U is None else wanted_U
        self.wanted = None if every else torch.from_numpy(self._wanted_U).to(device)
        self.all_queries = cache.batched
        self._packed = packed
        self._token_W = torch.from_numpy(packed.token_W).to(device)
        self._places: torch.Tensor | None = None
        self.longest = int(packed.position_W.max()) + 1
        self._band: torch.Tensor | None = None
        self._past = 0
        self._buckets = _buckets(cache, packed.spans, device) if cache.batched else []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Write key and value (1, K, N, D) to their rows; attention of query (1, H, N, D) over the
        rows, (1, N, H, D)."""
        keys, values = self._cache.buffers(layer, key)
        if self._places is None:  # the same in all layers
            slots, positions = self._packed.slot_W, self._packed.position_W
            self._places = self._cache.places(slots, positions, key.shape[1], key.device)
        for buffer, new in ((keys, key), (values, value)):
            new_KWD = new[0].index_select(1, self._token_W)
            buffer.flatten(0, 2).index_copy_(0, self._places, new_KWD.flatten(0, 1))
        query_NHD = query[0].transpose(0, 1)
        heads = key.shape[1], query.shape[1] // key.shape[1]
        query_NKGD = query_NHD.reshape(len(query_NHD), *heads, query.shape[-1])
        if self._cache.batched:
            out = self._padded(query_NKGD, keys, values, scale)
        elif len(query_NHD) == key.shape[2]:
            out = self._row_by_row(query_NKGD, keys, values, scale)
        else:
            out = self._wanted_alone(query_NKGD, keys, values, scale)
        return out.flatten(1, 2)[None]

    def _row_by_row(
        self, query_NKGD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        groups = query_NKGD.shape[2]
        out, singles = torch.empty_like(query_NKGD), _Queries()
        for span in self._packed.spans:
            row, length = self._cache.row(span.slot), span.past + span.end - span.first
            if span.end - span.first == 1:
                singles.add(span.first, row, length)
                continue
            k, v = keys[row, :, None, :length], values[row, :, None, :length]
            o = scaled_dot_product_attention(
                query_NKGD[span.first : span.end].permute(1, 2, 0, 3),
                k.expand(-1, groups, -1, -1),
                v.expand(-1, groups, -1, -1),
                attn_mask=self._mask(span, query_NKGD) if span.past else None,
                is_causal=not span.past,
                scale=scale,
            )
            out[span.first : span.end] = o.permute(2, 0, 1, 3)
        singles.attend(query_NKGD, keys, values, scale, out)
        return out

    def _wanted_alone(
        self, query_UKGD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The wanted tokens only, each by itself: nearly always the last one of its row."""
        out, singles = torch.empty_like(query_UKGD), _Queries()
        u = 0
        for span in self._packed.spans:
            row = self._cache.row(span.slot)
            while u < len(self._wanted_U) and self._wanted_U[u] < span.end:
                singles.add(u, row, span.past + int(self._wanted_U[u]) - span.first + 1)
                u += 1
        singles.attend(query_UKGD, keys, values, scale, out)
        return out

    def _mask(self, span: Span, like: torch.Tensor) -> torch.Tensor:
        """What to add to the scores (M, past + M): a part of one band."""
        if self._band is None:
            masked = [s for s in self._packed.spans if s.past and s.end - s.first > 1]
            count = max(s.end - s.first for s in masked)
            self._past = max(s.past for s in masked)
            forbidden = like.new_full((count, self._past + count), -torch.inf)
            self._band = forbidden.triu(self._past + 1)
        shift, count = self._past - span.past, span.end - span.first
        return self._band[:count, shift : self._past + count]

    def _padded(
        self, query_NKGD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        out = torch.empty_like(query_NKGD)
        for bucket in self._buckets:
            q = query_NKGD[bucket.token_BM]  # (B, M, K, G, D)
            count, groups = q.shape[1], q.shape[3]
            k, v = (x[bucket.rows, :, : bucket.longest] for x in (keys, values))
            o = scaled_dot_product_attention(
                q.permute(0, 2, 3, 1, 4).flatten(2, 3),
                k,
                v,
                attn_mask=bucket.mask_BMT.repeat(1, groups, 1)[:, None],
                scale=scale,
            )
            o = o.reshape(*o.shape[:2], groups, count, -1).permute(0, 3, 1, 2, 4)
            out[bucket.token_BM[bucket.real_BM]] = o[bucket.real_BM]
        return out


@dataclass(frozen=True, slots=True)
class _Queries:
    """Queries that are alone in their rows: their places, rows, and how much they read of them."""

    places: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, place: int, row: int, length: int) -> None:
        self.places.append(place)
        self.rows.append(row)
        self.lengths.append(length)

    def attend(
        self,
        query_NKGD: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        out_NKGD: torch.Tensor,
    ) -> None:
        if len(self.places) == len(query_NKGD):
            out_NKGD.copy_(one_query(query_NKGD, keys, values, self.rows, self.lengths, scale))
        elif self.places:
            asked = query_NKGD[self.places]
            out_NKGD[self.places] = one_query(asked, keys, values, self.rows, self.lengths, scale)


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Rows with about as many new tokens M, for one padded call.

    rows       where they lie; a slice where they lie side by side, so that nothing is copied
    token_BM   packed tokens, the last one repeated; real_BM says which are no repetition
    mask_BMT   what each token reads of its row
    """

    rows: torch.Tensor | slice
    token_BM: torch.Tensor
    real_BM: torch.Tensor
    mask_BMT: torch.Tensor
    longest: int


def _buckets(cache: RowCache, spans: Sequence[Span], device: torch.device) -> list[_Bucket]:
    """Spans sorted by length and cut where the next is half as long."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: s.first - s.end):
        count = span.end - span.first
        if groups and 2 * count + 8 > groups[-1][0].end - groups[-1][0].first:
            groups[-1].append(span)
        else:
            groups.append([span])
    return [_bucket(cache, group, device) for group in groups]


def _bucket(cache: RowCache, some: Sequence[Span], device: torch.device) -> _Bucket:
    spans = sorted(some, key=lambda span: cache.row(span.slot))
    row_B = [cache.row(span.slot) for span in spans]
    together = row_B[-1] - row_B[0] < len(row_B)
    first_B, end_B, past_B = np.array([(s.first, s.end, s.past) for s in spans]).T
    column = np.arange((end_B - first_B).max())[None]
    within = np.minimum(column, (end_B - first_B - 1)[:, None])
    reach = past_B[:, None] + within
    longest = int(reach.max()) + 1
    return _Bucket(
        slice(row_B[0], row_B[-1] + 1) if together else torch.tensor(row_B, device=device),
        torch.from_numpy(first_B[:, None] + within).to(device),
        torch.from_numpy(column == within).to(device),
        torch.from_numpy(np.arange(longest) <= reach[:, :, None]).to(device),
        longest,
    )
