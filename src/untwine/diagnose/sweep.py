"""One forward and backward pass over all samples, in chunks, block by block.

The model is cut at its blocks (transformers marks them as `GradientCheckpointingLayer`). All chunks
run forward; then the last block runs backward for every chunk, then the one before, so that the
per-sample gradients of one block are complete, used and dropped before those of the next are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from untwine.diagnose.capture import Capture
from untwine.diagnose.head import Head
from untwine.diagnose.samples import Chunk
from untwine.diagnose.scoring import Context, LanguageModel, Progress, log_softmax_at
from untwine.diagnose.sinks import check_finite


class _Uncuttable(Exception):
    """A block is given, or gives, gradients beside its hidden states."""


@dataclass(slots=True)
class _Cut:
    """One block's pass over one chunk.

    given   what the block was given, with the graph behind it
    leaf    the same, cut off; the block read this
    out     what the block gave, with its graph; None when it is to be computed again
    handed  the same, cut off; the rest of the model read this
    again   computes `out` anew
    """

    given: torch.Tensor
    leaf: torch.Tensor
    out: torch.Tensor | None
    handed: torch.Tensor
    again: Callable[[], torch.Tensor]


class _Blocks:
    """Cuts the model at its blocks while in force; `cuts` are those of the present chunk."""

    def __init__(self, body: nn.Module, recompute: bool) -> None:
        self.cuts: list[_Cut] = []
        self._recompute = recompute
        self._blocks = [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)]

    def __enter__(self) -> _Blocks:
        for block in self._blocks:
            block.forward = self._cutting(type(block).forward.__get__(block))
        return self

    def __exit__(self, *_: object) -> None:
        for block in self._blocks:
            del block.forward

    def _cutting(self, inside: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not args or not isinstance(args[0], torch.Tensor):
                raise _Uncuttable
            given, *rest = args
            if any(
                isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves((rest, kwargs))
            ):
                raise _Uncuttable
            leaf = given.detach().requires_grad_()
            with torch.set_grad_enabled(not self._recompute):
                found = inside(leaf, *rest, **kwargs)
            out, *others = found if isinstance(found, tuple) else (found,)
            if any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves(others)):
                raise _Uncuttable

            def again() -> torch.Tensor:
                made = inside(leaf, *rest, **kwargs)
                out: torch.Tensor = made[0] if isinstance(made, tuple) else made
                return out

            handed = out.detach().requires_grad_()
            kept = None if self._recompute else out
            self.cuts.append(_Cut(given, leaf, kept, handed, again))
            return (handed, *others) if isinstance(found, tuple) else handed

        return forward


Seed = tuple[torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class _Pass:
    chunk: Chunk
    seed: Seed
    cuts: list[_Cut]


def sweep(
    parts: LanguageModel,
    chunks: Sequence[Chunk],
    capture: Capture,
    head: Head | None,
    *,
    temperature: float,
    recompute: bool,
    context: Context,
    on_progress: Progress,
) -> torch.Tensor:
    """Run all chunks forward and backward under `capture`; log pi of each sample, shape (N,)."""
    for cut in (True, False):
        blocks = _Blocks(parts.body, recompute) if cut else _Blocks(nn.Module(), False)
        try:
            with blocks:
                return _sweep(
                    parts, chunks, capture, head, blocks, temperature, context, on_progress
                )
        except _Uncuttable:
            continue  # then the whole model is one block, and gradients of all of it are kept
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
    total = len(chunks) * (2 + len(blocks._blocks))
    for chunk in chunks:
        capture.rows, blocks.cuts = chunk.rows, []
        seed, logprobs_B = _forward(parts, chunk, head, temperature, context)
        passes.append(_Pass(chunk, seed, blocks.cuts))
        logprobs.append(logprobs_B)
        on_progress(done := done + 1, total)
    check_finite("", torch.cat(logprobs))
    for one in passes:
        torch.autograd.backward([one.seed[0]], [one.seed[1]])
        del one.seed
        on_progress(done := done + 1, total)
    while passes[0].cuts and not capture.complete:
        for one in passes:
            capture.rows = one.chunk.rows
            _backward(one.cuts.pop(), context)
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
    if cut.handed.grad is None:
        return
    out = cut.out
    if out is None:
        with torch.enable_grad(), context():
            out = cut.again()
    torch.autograd.backward([out], [cut.handed.grad])
    if cut.given.requires_grad and cut.leaf.grad is not None:
        torch.autograd.backward([cut.given], [cut.leaf.grad])
