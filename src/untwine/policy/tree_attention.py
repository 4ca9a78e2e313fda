"""Exact attention over a packed trie.

On the CPU every chain is one causal flash call (short ones batched) and every join one unmasked
call. The results of a token over disjoint sets of keys A and B are merged by their log-sum-exp l:

    l = log(exp l_A + exp l_B),    o = exp(l_A - l) o_A + exp(l_B - l) o_B

(Dao et al., FlashAttention, arXiv 2205.14135, section 3.1). Fed with the merged o and l, the flash
backward of each call gives exactly its share of the gradient, since it needs only the probabilities
exp(s - l) and the row sums of dO * O (section B.4 there). Elsewhere FlexAttention is used with the
mask  j reads i  <=>  i <= j < subtree_end[i].

Shape suffixes: N tokens, U queries (N, or those of `TreePlan.wanted`), K key heads, G query heads
per key head, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from untwine.policy.attention import packed_hidden_states
from untwine.policy.tree_layout import Bucket, Layout, Part, wanted_layout, whole_layout
from untwine.policy.trie import PackedTrie

_BLOCK = 128  # queries and keys of a block of FlexAttention's mask
_KERNEL = {"FORCE_USE_FLEX_ATTENTION": True}
"""Short sequences would get a kernel of their own, made for decoding, which some numbers of query
heads for each key head do not fit into."""
_FEW = 0.8  # a larger share of wanted tokens is not worth a last layer of their own
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class TreePlan:
    """How attention runs over one packed trie; handed to the model with each forward pass.

    size, longest   tokens; length of the longest path
    wanted          see `Plan`
    """

    def __init__(
        self, trie: PackedTrie, device: torch.device, wanted_U: np.ndarray | None = None
    ) -> None:
        """wanted_U   the tokens whose output is read, sorted; None: all"""
        self.size = trie.size
        self.longest = int(trie.depth_N.max()) + 1
        self.subtree_end_N = torch.from_numpy(trie.subtree_end_N).to(device)
        self.wanted = None if wanted_U is None else torch.from_numpy(wanted_U).to(device)
        self.all_queries = device.type != "cpu"
        self.layout = whole_layout(trie)
        self.narrow: Layout | None = None
        if wanted_U is not None and not self.all_queries:
            self.narrow = wanted_layout(trie, wanted_U)

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


def hidden_states_along(
    base_model: Any,
    trie: PackedTrie,
    device: torch.device,
    wanted_U: np.ndarray | None = None,
) -> torch.Tensor:
    """Last hidden states of an adopted model without its head, for the nodes of a trie (N, D), or
    for some of them (U, D), sorted."""
    few = wanted_U is not None and len(wanted_U) <= _FEW * trie.size
    plan = TreePlan(trie, device, wanted_U if few else None)
    hidden = packed_hidden_states(base_model, trie.tokens_N, trie.depth_N, plan, device)
    return hidden if few or wanted_U is None else hidden[torch.from_numpy(wanted_U).to(device)]


def flash_tree(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TreePlan, scale: float
) -> torch.Tensor:
    """Attention over the trie on the CPU: (1, H, U, D) and twice (1, K, N, D) to (U, H, D)."""
    query_KGUD = query[0].view(key.shape[1], -1, *query.shape[2:])
    layout = plan.layout if query.shape[2] == plan.size else plan.narrow
    return _FlashTree.apply(query_KGUD, key[0], value[0], layout, scale)  # type: ignore[no-any-return, no-untyped-call]


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
        query,
        key,
        value,
        block_mask=plan.block_mask,
        scale=scale,
        enable_gqa=grouped,
        kernel_options=_KERNEL,
    )[0]
    return out_HND.transpose(0, 1)


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    plain: Callable[..., Any] = flex_attention
    return compile_twice_differentiable(plain) if compiled else plain


def compile_twice_differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for shapes that change, whose graph may be kept for a second backward pass,
    as where two losses share a forward pass: buffers of the first may then not be given away. The
    two settings hold for the process; the second is for a call in many modes (gradient or none,
    types, head shapes), which would be run uncompiled beyond eight of them."""
    torch._functorch.config.donated_buffer = False
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 64)
    return torch.compile(function, dynamic=True)


@dataclass(frozen=True, slots=True)
class _Operands:
    """What the flash calls of one layer read. Query heads of one key head share its keys by a
    stride of 0, so grouped heads are never copied.

    query, grad   (B, G, U, D), B being the key heads (times the chains of a bucket)
    key, value    (B, N, D)
    out, lse      merged results (B, G, U, D), (B, G, U)
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    grad: torch.Tensor | None = None

    def forward(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, c, d = part.range
        return _flash(  # type: ignore[no-any-return]
            self.query[:, :, a:b],
            self._grouped(self.key[:, c:d]),
            self._grouped(self.value[:, c:d]),
            0.0,
            part.causal,
            attn_mask=self._mask(part),
            scale=self.scale,
        )

    def backward(self, part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the queries (B, G, U, D), keys and values (B, N, D) of this part."""
        assert self.grad is not None
        assert self.out is not None
        assert self.lse is not None
        a, b, c, d = part.range
        d_query, d_key, d_value = _flash_backward(
            self.grad[:, :, a:b],
            self.query[:, :, a:b],
            self._grouped(self.key[:, c:d]),
            self._grouped(self.value[:, c:d]),
            self.out[:, :, a:b],
            self.lse[:, :, a:b],
            0.0,
            part.causal,
            attn_mask=self._mask(part),
            scale=self.scale,
        )
        return d_query, d_key.sum(1), d_value.sum(1)

    def of_bucket(self, bucket: Bucket) -> _Operands:
        """The operands of the chains of a bucket, one batch entry per key head and chain."""
        queries, keys = bucket.queries, bucket.keys

        def taken(x: torch.Tensor, clear: bool = False) -> torch.Tensor:
            return queries.take(x.transpose(1, 2), clear=clear).transpose(1, 2)

        return _Operands(
            taken(self.query),
            keys.take(self.key),
            keys.take(self.value),
            self.scale,
            None if self.out is None else taken(self.out),
            None if self.lse is None else taken(self.lse).contiguous(),
            None if self.grad is None else taken(self.grad, clear=True),
        )

    def _mask(self, part: Part) -> torch.Tensor | None:
        if part.mask is None:
            return None
        # For operands in float64 the kernel would silently misread a mask in float32.
        mask = part.mask.to(torch.promote_types(self.query.dtype, torch.float32))
        if mask.dim() == 2:
            return mask
        return mask.repeat(len(self.query) // len(mask), 1, 1, 1)

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, None].expand(-1, self.query.shape[1], -1, -1)


class _FlashTree(torch.autograd.Function):
    """Tree attention from flash calls: query (K, G, U, D), key and value (K, N, D) to (U, H, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        scale: float,
    ) -> torch.Tensor:
        K, G, U, D = query.shape
        exact = torch.promote_types(query.dtype, torch.float32)  # half precision is merged in full
        out_UHD = query.new_empty(U, K * G, D, dtype=exact)
        out = out_UHD.view(U, K, G, D).permute(1, 2, 0, 3)
        lse = query.new_empty(K, G, U, dtype=exact)
        whole = _Operands(query, key, value, scale)
        for chain in layout.chains:  # every query is in one chain, so these fill the buffers
            a, b = chain.range[:2]
            out[:, :, a:b], lse[:, :, a:b] = whole.forward(chain)
        for bucket in layout.buckets:
            part, part_lse = whole.of_bucket(bucket).forward(bucket.part)
            bucket.queries.put(part.transpose(1, 2), out.transpose(1, 2))
            bucket.queries.put(part_lse.transpose(1, 2), lse.transpose(1, 2))
        for join in layout.joins:
            here = slice(*join.range[:2])
            part, part_lse = whole.forward(join)
            share = torch.sigmoid(part_lse - lse[:, :, here])
            out[:, :, here].lerp_(part.to(exact), share[..., None])
            lse[:, :, here] = torch.logaddexp(lse[:, :, here], part_lse)
        out_UHD = out_UHD.to(query.dtype)
        ctx.save_for_backward(query, key, value, out_UHD, lse)
        ctx.layout, ctx.scale = layout, scale
        return out_UHD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_UHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out_UHD, lse = ctx.saved_tensors
        layout: Layout = ctx.layout
        K, G, U, D = query.shape
        exact = torch.promote_types(query.dtype, torch.float32)

        def by_head(x_UHD: torch.Tensor) -> torch.Tensor:
            return x_UHD.view(U, K, G, D).permute(1, 2, 0, 3)

        grad = by_head(grad_UHD.contiguous())
        whole = _Operands(query, key, value, ctx.scale, by_head(out_UHD), lse, grad)
        d_query = by_head(query.new_empty(U, K * G, D, dtype=exact))
        made = torch.empty if layout.every_key else torch.zeros
        d_key, d_value = (made(key.shape[1], K, D, dtype=exact).transpose(0, 1) for _ in "kv")
        for chain in layout.chains:
            a, b, c, d = chain.range
            d_query[:, :, a:b], d_key[:, c:d], d_value[:, c:d] = whole.backward(chain)
        for bucket in layout.buckets:
            of_query, of_key, of_value = whole.of_bucket(bucket).backward(bucket.part)
            bucket.queries.put(of_query.transpose(1, 2), d_query.transpose(1, 2))
            bucket.keys.put(of_key, d_key)
            bucket.keys.put(of_value, d_value)
        for join in layout.joins:
            a, b, c, d = join.range
            of_query, of_key, of_value = whole.backward(join)
            d_query[:, :, a:b] += of_query
            d_key[:, c:d] += of_key
            d_value[:, c:d] += of_value
        half = query.dtype
        return d_query.to(half), d_key.to(half), d_value.to(half), None, None
