"""log pi(a|s) of step samples under any Hugging Face causal language model, and its residuals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from untwine.diagnose.parameters import (
    ParameterChoice,
    only_these_need_gradients,
    select_parameters,
)
from untwine.diagnose.samples import Chunk, SampleLike, as_samples, by_length, cut_chunks
from untwine.errors import ModelError, UntwineError

Context = Callable[[], contextlib.AbstractContextManager[Any]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """The parts of a causal language model: `body` gives hidden states, `head` the logits.

    whole  the model as it was given (a peft model keeps its wrapper, and with it its names)
    """

    whole: Any
    body: Any
    head: nn.Module

    @property
    def device(self) -> torch.device:
        first: torch.Tensor = next(iter(self.whole.parameters()))
        return first.device

    def hidden(self, chunk: Chunk) -> torch.Tensor:
        """Hidden states that predict the action tokens of a chunk, shape (M, D)."""
        hidden_BTD = self.body(input_ids=chunk.ids_BT, use_cache=False).last_hidden_state
        chosen: torch.Tensor = hidden_BTD[chunk.sample_M, chunk.column_M - 1]
        return chosen


def parts_of(model: Any) -> LanguageModel:
    """Take a transformers causal LM, or a peft model around one, apart. ModelError when it is
    neither."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    body = getattr(causal, "base_model", None)
    if head is None or body is None or body is causal:
        raise ModelError(
            f"{type(model).__name__} is no causal language model of transformers (or peft): "
            "it has no body with a vocabulary projection on top"
        )
    return LanguageModel(model, body, head)


def log_softmax_at(
    logits_MV: torch.Tensor, chunk: Chunk, at: slice = slice(None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the targets (M,) and the normaliser of each row (M,), differentiable.

    Where the ids are restricted, the normaliser is over the allowed ones only.
    """
    lse_M = logits_MV.logsumexp(-1)
    narrow = [(m, ids) for m, ids in enumerate(chunk.allowed[at]) if ids is not None]
    if narrow:
        rows = torch.tensor([m for m, _ in narrow], device=logits_MV.device)
        closed = torch.ones_like(logits_MV[rows], dtype=torch.bool)
        for r, (_, ids) in enumerate(narrow):
            closed[r, list(ids)] = False
        open_lse = logits_MV[rows].masked_fill(closed, -torch.inf).logsumexp(-1)
        lse_M = lse_M.index_put((rows,), open_lse)
    targets_M = chunk.targets_M[at]
    return logits_MV.gather(-1, targets_M[:, None])[:, 0] - lse_M, lse_M


def chunk_logprobs(
    parts: LanguageModel,
    chunk: Chunk,
    temperature: float,
    context: Context,
    *,
    whole: bool = False,
) -> torch.Tensor:
    """log pi(a|s) of each sample of a chunk, shape (B,), differentiable.

    whole  take the logits of the whole model, as its `forward` gives them, not those of body and
           projection; they are the same for models this room can serve
    """
    with context():
        if whole:
            logits_BTV = parts.whole(input_ids=chunk.ids_BT, use_cache=False).logits
            logits_MV = logits_BTV[chunk.sample_M, chunk.column_M - 1]
        else:
            logits_MV = parts.head(parts.hidden(chunk))
    wide = logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()
    logprobs_M, _ = log_softmax_at(wide / temperature, chunk)
    zeros_B = torch.zeros(len(chunk.rows), dtype=logprobs_M.dtype, device=logprobs_M.device)
    return zeros_B.index_add(0, chunk.sample_M, logprobs_M)


@torch.no_grad()
def log_probabilities(
    model: Any,
    samples: Sequence[SampleLike],
    *,
    chunk: int = 16,
    temperature: float = 1.0,
    context: Context = contextlib.nullcontext,
) -> torch.Tensor:
    """log pi(a|s) of each sample in nats, shape (N,), float64 on the CPU. A forward pass only."""
    parts, steps = parts_of(model), as_samples(samples)
    order = by_length(steps)
    found_N = torch.zeros(len(steps), dtype=torch.float64)
    with only_these_need_gradients(model):
        for piece in cut_chunks([steps[i] for i in order], chunk, parts.device):
            values = chunk_logprobs(parts, piece, temperature, context).double().cpu()
            found_N[[order[r] for r in piece.rows]] = values
    return found_N


def weighted_gradient(
    model: Any,
    samples: Sequence[SampleLike],
    weights_N: torch.Tensor | Sequence[float],
    *,
    parameters: ParameterChoice = None,
    chunk: int = 16,
    temperature: float = 1.0,
    context: Context = contextlib.nullcontext,
) -> dict[str, torch.Tensor]:
    """sum_j w_j grad log pi(a_j|s_j) by ordinary backward passes, by parameter name."""
    parts, steps = parts_of(model), as_samples(samples)
    weights = torch.as_tensor(weights_N, dtype=torch.float64)
    if len(weights) != len(steps):
        raise UntwineError(f"{len(steps)} samples but {len(weights)} weights")
    chosen = select_parameters(model, parameters)
    order = by_length(steps)
    with only_these_need_gradients(model, list(chosen.values())):
        for piece in cut_chunks([steps[i] for i in order], chunk, parts.device):
            logprobs_B = chunk_logprobs(parts, piece, temperature, context)
            weights_B = weights[[order[r] for r in piece.rows]].to(logprobs_B)
            (weights_B * logprobs_B).sum().backward()  # type: ignore[no-untyped-call]
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in chosen.items()
        }
