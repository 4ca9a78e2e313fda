"""Exact attention over a packed trie.

On the CPU every chain is one causal flash call (short ones batched) and every join one unmasked
call. The results of a token over disjoint sets of keys A and B are merged by their log-sum-exp l:

    l = log(exp l_A + exp l_B),    o = exp(l_A - l) o_A + exp(l_B - l) o_B

(Dao et al., FlashAttention, arXiv 2205.14135, section 3.1). Fed with the merged o and l, the flash
backward of each call gives exactly its share of the gradient, since it needs only the probabilities
exp(s - l) and the row sums of dO * O (section B.4 there). Elsewhere FlexAttention is used with the
mask  j reads i  <=>  i <= j < subtree_end[i].

Shape suffixes: N tokens, K key heads, G query heads per key head, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from untwine.policy.attention import packed_hidden_states
from untwine.policy.trie import Chain, Join, PackedTrie

_BATCHED = 192  # longest chain that is batched with others
_BLOCK = 128  # queries and keys of a block of FlexAttention's mask
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class TreePlan:
    """How attention runs over one packed trie; handed to the model with each forward pass.

    size, longest   tokens; length of the longest path
    """

    def __init__(self, trie: PackedTrie, device: torch.device) -> None:
        self.size = trie.size
        self.longest = int(trie.depth_N.max()) + 1
        self.subtree_end_N = torch.from_numpy(trie.subtree_end_N).to(device)
        self.joins: tuple[Join, ...] = trie.joins
        self.chains, self.buckets = _bucketed(trie.chains)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `Plan`."""
        attention = flash_tree if query.device.type == "cpu" else flex_tree
        return attention(query, key, value, self, scale)[None]

    @functools.cached_property
    def block_mask(self) -> Any:
        """The mask for FlexAttention, made once for all layers, without a table of N x N: a block
        of keys is read by a later block of queries when its longest subtree gets there, and wholly
        when its shortest gets past it."""
        from torch.nn.attention.flex_attention import BlockMask

        ends = self.subtree_end_N

        def reads(_b: Any, _h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (key <= query) & (query < ends[key])

        count = -(-self.size // _BLOCK)
        first = torch.arange(count, device=ends.device) * _BLOCK
        padded = torch.cat([ends, ends[-1:].expand(count * _BLOCK - self.size)])
        blocks = padded.view(count, _BLOCK)
        earlier = torch.ones(count, count, dtype=torch.bool, device=ends.device).tril(-1)
        whole = earlier & (blocks.amin(1)[None] >= first[:, None] + _BLOCK)
        partly = earlier & (blocks.amax(1)[None] > first[:, None]) & ~whole
        partly |= torch.eye(count, dtype=torch.bool, device=ends.device)

        def listed(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            order = table.int().argsort(dim=1, descending=True, stable=True)
            return table.sum(1).int()[None, None], order.int()[None, None]

        return BlockMask.from_kv_blocks(
            *listed(partly),
            *listed(whole),
            BLOCK_SIZE=_BLOCK,
            mask_mod=reads,
            seq_lengths=(self.size, self.size),
        )


def hidden_states_along(base_model: Any, trie: PackedTrie, device: torch.device) -> torch.Tensor:
    """Last hidden states (N, D) of an adopted model without its head, for the nodes of a trie."""
    plan = TreePlan(trie, device)
    return packed_hidden_states(base_model, trie.tokens_N, trie.depth_N, plan, device)


def flash_tree(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TreePlan, scale: float
) -> torch.Tensor:
    """Attention over the trie on the CPU: (1, H, N, D) and twice (1, K, N, D) to (N, H, D)."""
    query_KGND = query[0].view(key.shape[1], -1, *query.shape[2:])
    return _FlashTree.apply(query_KGND, key[0], value[0], plan, scale)  # type: ignore[no-any-return, no-untyped-call]


def flex_tree(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: TreePlan,
    scale: float,
    compiled: bool = True,
) -> torch.Tensor:
    """The same with FlexAttention (Dong et al., arXiv 2412.05496), for CUDA."""
    attention = _flex_attention(compiled)
    grouped = query.shape[1] != key.shape[1]
    out_HND = attention(
        query, key, value, block_mask=plan.block_mask, scale=scale, enable_gqa=grouped
    )[0]
    return out_HND.transpose(0, 1)


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    plain: Callable[..., Any] = flex_attention
    return torch.compile(plain, dynamic=True) if compiled else plain


@dataclass(frozen=True, slots=True)
class _Operands:
    """What the flash calls of one layer read. Query heads of one key head share its keys by a
    stride of 0, so grouped heads are never copied.

    query, grad   (B, G, M, D), B being the key heads (times the chains of a bucket)
    key, value    (B, M, D)
    out, lse      merged results (B, G, M, D), (B, G, M)
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    grad: torch.Tensor | None = None

    def forward(self, part: Join, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, c, d = part
        return _flash(  # type: ignore[no-any-return]
            self.query[:, :, a:b],
            self._grouped(self.key[:, c:d]),
            self._grouped(self.value[:, c:d]),
            0.0,
            causal,
            scale=self.scale,
        )

    def backward(self, part: Join, causal: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the queries (B, G, M, D), keys and values (B, M, D) of this part."""
        assert self.grad is not None
        assert self.out is not None
        assert self.lse is not None
        a, b, c, d = part
        d_query, d_key, d_value = _flash_backward(
            self.grad[:, :, a:b],
            self.query[:, :, a:b],
            self._grouped(self.key[:, c:d]),
            self._grouped(self.value[:, c:d]),
            self.out[:, :, a:b],
            self.lse[:, :, a:b],
            0.0,
            causal,
            scale=self.scale,
        )
        return d_query, d_key.sum(1), d_value.sum(1)

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, None].expand(-1, self.query.shape[1], -1, -1)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Chains of similar length, right-padded to a matrix so that one call serves them all.

    place    tokens of each chain, the last one repeated as padding, flattened (B * L,)
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
    def of(cls, chains: Sequence[Chain]) -> Bucket:
        lengths = np.array([b - a for a, b in chains])[:, None]
        column = np.arange(lengths.max())[None]
        place = np.array([a for a, _ in chains])[:, None] + np.minimum(column, lengths - 1)
        real = (column < lengths).ravel()
        where = torch.from_numpy(place.ravel())
        return cls(
            where,
            torch.from_numpy(np.flatnonzero(real)),
            torch.from_numpy(np.flatnonzero(~real)),
            where[torch.from_numpy(real)],
            column.shape[1],
        )

    @property
    def call(self) -> Join:
        return 0, self.width, 0, self.width

    def take(self, x: _Operands) -> _Operands:
        """The operands of the chains alone, one batch entry per key head and chain."""
        grad = None
        if x.grad is not None:
            grad = self._rows(x.grad.transpose(1, 2)).index_fill_(1, self.padding, 0.0)
        return _Operands(
            self._heads(self._rows(x.query.transpose(1, 2))),
            self._folded(self._rows(x.key)),
            self._folded(self._rows(x.value)),
            x.scale,
            None if x.out is None else self._heads(self._rows(x.out.transpose(1, 2))),
            None if x.lse is None else self._heads(self._rows(x.lse.transpose(1, 2))).contiguous(),
            None if grad is None else self._heads(grad),
        )

    def put(self, part: torch.Tensor, into: torch.Tensor) -> None:
        """Write results (K * B, G, L, ...) to their tokens in `into` (K, G, N, ...)."""
        self.put_keys(part.transpose(1, 2), into.transpose(1, 2))

    def put_keys(self, part: torch.Tensor, into: torch.Tensor) -> None:
        """Write results (K * B, L, ...) to their tokens in `into` (K, N, ...)."""
        rows = part.reshape(into.shape[0], -1, *part.shape[2:])
        if len(self.padding):
            rows = rows.index_select(1, self.real)
        into.index_copy_(1, self.tokens, rows.to(into.dtype))

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(1, self.place)

    def _folded(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, self.width, *x.shape[2:])

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return self._folded(x).transpose(1, 2)


def _bucketed(chains: Sequence[Chain]) -> tuple[list[Chain], list[Bucket]]:
    """Long chains alone; short ones together with others at most a quarter shorter."""
    groups: list[list[Chain]] = []
    for chain in sorted(chains, key=lambda c: c[0] - c[1]):
        length = chain[1] - chain[0]
        fits = groups and length <= _BATCHED
        if fits and groups[-1][0][1] - groups[-1][0][0] <= min(_BATCHED, 1.25 * length + 4):
            groups[-1].append(chain)
        else:
            groups.append([chain])
    alone = [group[0] for group in groups if len(group) == 1]
    return alone, [Bucket.of(group) for group in groups if len(group) > 1]


class _FlashTree(torch.autograd.Function):
    """Tree attention from flash calls: query (K, G, N, D), key and value (K, N, D) to (N, H, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: TreePlan,
        scale: float,
    ) -> torch.Tensor:
        K, G, N, D = query.shape
        exact = torch.promote_types(query.dtype, torch.float32)  # half precision is merged in full
        out_NHD = query.new_empty(N, K * G, D, dtype=exact)
        out = out_NHD.view(N, K, G, D).permute(1, 2, 0, 3)
        lse = query.new_empty(K, G, N, dtype=exact)
        whole = _Operands(query, key, value, scale)
        for a, b in plan.chains:  # every token is in one chain, so these fill the buffers
            out[:, :, a:b], lse[:, :, a:b] = whole.forward((a, b, a, b), causal=True)
        for bucket in plan.buckets:
            part, part_lse = bucket.take(whole).forward(bucket.call, causal=True)
            bucket.put(part, out)
            bucket.put(part_lse, lse)
        for join in plan.joins:
            here = slice(join[0], join[1])
            part, part_lse = whole.forward(join, causal=False)
            share = torch.sigmoid(part_lse - lse[:, :, here])
            out[:, :, here].lerp_(part.to(exact), share[..., None])
            lse[:, :, here] = torch.logaddexp(lse[:, :, here], part_lse)
        out_NHD = out_NHD.to(query.dtype)
        ctx.save_for_backward(query, key, value, out_NHD, lse)
        ctx.plan, ctx.scale = plan, scale
        return out_NHD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out_NHD, lse = ctx.saved_tensors
        plan: TreePlan = ctx.plan
        K, G, N, D = query.shape
        exact = torch.promote_types(query.dtype, torch.float32)

        def by_head(x_NHD: torch.Tensor) -> torch.Tensor:
            return x_NHD.view(N, K, G, D).permute(1, 2, 0, 3)

        grad = by_head(grad_NHD.contiguous())
        whole = _Operands(query, key, value, ctx.scale, by_head(out_NHD), lse, grad)
        d_query = by_head(query.new_empty(N, K * G, D, dtype=exact))
        d_key = query.new_empty(N, K, D, dtype=exact).transpose(0, 1)
        d_value = torch.empty_like(d_key)
        for a, b in plan.chains:
            parts = whole.backward((a, b, a, b), causal=True)
            d_query[:, :, a:b], d_key[:, a:b], d_value[:, a:b] = parts
        for bucket in plan.buckets:
            of_query, of_key, of_value = bucket.take(whole).backward(bucket.call, causal=True)
            bucket.put(of_query, d_query)
            bucket.put_keys(of_key, d_key)
            bucket.put_keys(of_value, d_value)
        for join in plan.joins:
            of_query, of_key, of_value = whole.backward(join, causal=False)
            d_query[:, :, join[0] : join[1]] += of_query
            d_key[:, join[2] : join[3]] += of_key
            d_value[:, join[2] : join[3]] += of_value
        half = query.dtype
        return d_query.to(half), d_key.to(half), d_value.to(half), None, None
