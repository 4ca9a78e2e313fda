"""One forward and backward pass over all samples, in chunks.

A chunk runs forward and backward like a micro-batch, and what the capture takes from it waits in
the store. With `recompute` the model is cut at its blocks (transformers marks them as
`GradientCheckpointingLayer`): all chunks run forward and leave only what their blocks read; then
the last block runs backward for every chunk, then the one before, so that the per-sample gradients
of one block are complete, used and dropped before those of the next are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer

from untwine.diagnose.capture import Capture, Gate
from untwine.diagnose.head import Head
from untwine.diagnose.samples import Chunk
from untwine.diagnose.scoring import Context, LanguageModel, Progress, log_softmax_at
from untwine.diagnose.sinks import check_finite
from untwine.diagnose.store import Store


class _Uncuttable(Exception):
    """A block is given, or gives, gradients beside its hidden states."""


class _Tap(torch.autograd.Function):
    """A number whose backward pass sends `box[0]` into x, without keeping x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, box: list[torch.Tensor]) -> torch.Tensor:
        ctx.box = box
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        return ctx.box[0], None


@dataclass(slots=True)
class _Cut:
    """One block's pass over one chunk.

    read    hidden states the block read
    before  what leads to the graph they came from, and the box for their gradient; None: no graph
    again   computes what the block gave from what it read
    toward  the gradient of what it gave, once there is one
    """

    store: Store
    read: torch.Tensor
    before: tuple[torch.Tensor, list[torch.Tensor]] | None
    again: Callable[[torch.Tensor], torch.Tensor]
    toward: torch.Tensor | None = field(default=None)

    def receive(self, grad: torch.Tensor) -> None:
        known = self.toward
        self.toward = self.store.keep(grad if known is None else self.store.back(known) + grad)


class _Blocks:
    """Cuts the model at its blocks while in force; `cuts` are those of the present chunk."""

    def __init__(self, body: nn.Module, store: Store, anchor: torch.Tensor) -> None:
        self.cuts: list[_Cut] = []
        self._store, self._anchor = store, anchor
        self._blocks = [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)]

    def __enter__(self) -> _Blocks:
        for block in self._blocks:
            block.forward = self._cutting(type(block).forward.__get__(block))
        return self

    def __exit__(self, *_: object) -> None:
        for block in self._blocks:
            del block.forward

    def __len__(self) -> int:
        return len(self._blocks)

    def _cutting(self, inside: Callable[..., Any]) -> Callable[..., Any]:
        store = self._store

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not args or not isinstance(args[0], torch.Tensor):
                raise _Uncuttable
            given, *rest = args
            _refuse_gradients((rest, kwargs))
            with torch.no_grad():
                found = inside(given.detach(), *rest, **kwargs)
            out, *others = found if isinstance(found, tuple) else (found,)
            _refuse_gradients(others)
            kept = tree_map_only(torch.Tensor, store.keep, (rest, kwargs))

            def again(read: torch.Tensor) -> torch.Tensor:
                rest, kwargs = tree_map_only(torch.Tensor, store.back, kept)
                made = inside(read, *rest, **kwargs)
                out: torch.Tensor = made[0] if isinstance(made, tuple) else made
                return out

            box: list[torch.Tensor] = []
            before = (_Tap.apply(given, box), box) if given.requires_grad else None  # type: ignore[no-untyped-call]
            cut = _Cut(store, store.keep(given), before, again)
            self.cuts.append(cut)
            handed = Gate.apply(out, self._anchor, cut.receive)  # type: ignore[no-untyped-call]
            return (handed, *others) if isinstance(found, tuple) else handed

        return forward


def _refuse_gradients(values: Any) -> None:
    if any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves(values)):
        raise _Uncuttable


Seed = tuple[torch.Tensor, torch.Tensor]


def sweep(
    parts: LanguageModel,
    chunks: Sequence[Chunk],
    capture: Capture,
    head: Head | None,
    store: Store,
    *,
    temperature: float,
    recompute: bool,
    context: Context,
    on_progress: Progress,
) -> torch.Tensor:
    """Run all chunks forward and backward under `capture`; log pi of each sample, shape (N,)."""
    for cut in (True, False) if recompute else (False,):
        blocks = _Blocks(parts.body if cut else nn.Module(), store, capture.anchor)
        try:
            with blocks:
                return _sweep(
                    parts, chunks, capture, head, blocks, temperature, context, on_progress
                )
        except _Uncuttable:
            continue  # raised in the first forward pass, before anything was captured
    raise AssertionError("a model that is not cut cannot be uncuttable")


def _sweep(
    parts: LanguageModel,
    chunks: Sequence[Chunk],
    capture: Capture,
    head: Head | None,
    blocks: _Blocks,
    temperature: float,
    context: Context,
    on_progress: Progress,
) -> torch.Tensor:
    passes, logprobs = [], []
    done = 0
    total = len(chunks) * (2 + len(blocks))
    for chunk in chunks:
        capture.rows, blocks.cuts = chunk.rows, []
        seed, logprobs_B = _forward(parts, chunk, head, temperature, context)
        check_finite("", logprobs_B, chunk.rows.start)
        logprobs.append(logprobs_B)
        on_progress(done := done + 1, total)
        torch.autograd.backward([seed[0]], [seed[1]])
        del seed
        passes.append((chunk.rows, blocks.cuts))
        on_progress(done := done + 1, total)
    while passes[0][1] and not capture.complete:
        for capture.rows, cuts in passes:
            _backward(cuts.pop(), context)
            on_progress(done := done + 1, total)
    on_progress(total, total)
    return torch.cat(logprobs)


def _forward(
    parts: LanguageModel, chunk: Chunk, head: Head | None, temperature: float, context: Context
) -> tuple[Seed, torch.Tensor]:
    with context():
        hidden_MD = parts.hidden(chunk)
        if head is not None:
            toward_MD, logprobs_B = head.forward(chunk, hidden_MD)
            return (hidden_MD, toward_MD), logprobs_B
        # The head is a layer like others, so it must see the sample axis.
        shape = (len(chunk.rows), int(chunk.place_M.max()) + 1, hidden_MD.shape[-1])
        places = (chunk.sample_M, chunk.place_M)
        padded_BLD = hidden_MD.new_zeros(shape).index_put(places, hidden_MD)
        logits_MV = parts.head(padded_BLD)[places]
    wide = logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()
    logprobs_M, _ = log_softmax_at(wide / temperature, chunk)
    zeros_B = torch.zeros(len(chunk.rows), dtype=logprobs_M.dtype, device=logprobs_M.device)
    logprobs_B = zeros_B.index_add(0, chunk.sample_M, logprobs_M)
    return (logprobs_B, torch.ones_like(logprobs_B)), logprobs_B.detach()


def _backward(cut: _Cut, context: Context) -> None:
    if cut.toward is None:
        return
    read = cut.store.back(cut.read).detach().requires_grad_()
    with torch.enable_grad(), context():
        out = cut.again(read)
    torch.autograd.backward([out], [cut.store.back(cut.toward)])
    if cut.before is not None and read.grad is not None:
        tap, box = cut.before
        box.append(read.grad)
        torch.autograd.backward([tap])
