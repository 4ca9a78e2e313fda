"""log pi(a|s) of step samples under any Hugging Face causal language model, and its gradients.

A model that attends through policy/attention.py reads what samples have in common once, like in
training; others read padded samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from untwine.diagnose.parameters import (
    ParameterChoice,
    only_these_need_gradients,
    select_parameters,
)
from untwine.diagnose.samples import (
    Chunk,
    SampleLike,
    StepSample,
    as_samples,
    by_length,
    cut_chunks,
    cut_shared,
    in_trie_order,
)
from untwine.errors import ModelError, UntwineError
from untwine.policy.attention import adopted
from untwine.policy.loading import layer_costs
from untwine.policy.tree_attention import hidden_states_along
from untwine.policy.trie import build_trie

Context = Callable[[], contextlib.AbstractContextManager[Any]]
Progress = Callable[[int, int], None]
Direction = dict[str, torch.Tensor]
_COMPARED = 1e-3  # log pi read in both ways differs by less, in nats per nat beyond 1


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """The parts of a causal language model: `body` gives hidden states, `head` the logits.

    whole   the model as it was given (a peft model keeps its wrapper, and with it its names)
    causal  the transformers model in it
    """

    whole: Any
    causal: Any
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

    def shared_hidden(self, chunk: Chunk) -> torch.Tensor:
        """The same, (M, D), of a model that was adopted: common beginnings are read once."""
        ids_BT = chunk.ids_BT.cpu().numpy()
        sample_M, before_M = chunk.sample_M.cpu().numpy(), chunk.column_M.cpu().numpy() - 1
        ends_B = np.zeros(len(ids_BT), np.int64)
        np.maximum.at(ends_B, sample_M, before_M + 1)
        read = [ids[:end] for ids, end in zip(ids_BT, ends_B, strict=True)]
        trie = build_trie(read, costs=layer_costs(self.causal))
        node_M = np.array([trie.paths[b][t] for b, t in zip(sample_M, before_M, strict=True)])
        places_U, place_M = np.unique(node_M, return_inverse=True)
        hidden_UD = hidden_states_along(self.body, trie, self.device, places_U)
        return hidden_UD[torch.from_numpy(place_M).to(self.device)]


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
    return LanguageModel(model, causal, body, head)


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
    shared: bool = False,
) -> torch.Tensor:
    """log pi(a|s) of each sample of a chunk, shape (B,), differentiable.

    whole   take the logits of the whole model, as its `forward` gives them, not those of body and
            projection; they are the same for models this room can serve
    shared  read what samples have in common once
    """
    with context():
        if whole:
            logits_BTV = parts.whole(input_ids=chunk.ids_BT, use_cache=False).logits
            logits_MV = logits_BTV[chunk.sample_M, chunk.column_M - 1]
        else:
            logits_MV = parts.head(parts.shared_hidden(chunk) if shared else parts.hidden(chunk))
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
    found_N = torch.zeros(len(steps), dtype=torch.float64)
    with only_these_need_gradients(model):
        for places, logprobs_B in _read(parts, steps, chunk, temperature, context):
            found_N[places] = logprobs_B.double().cpu()
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
) -> Direction:
    """sum_j w_j grad log pi(a_j|s_j) by ordinary backward passes, by parameter name."""
    weights_1N = torch.as_tensor(weights_N, dtype=torch.float64)[None]
    (found,) = weighted_gradients(
        model,
        samples,
        weights_1N,
        parameters=parameters,
        chunk=chunk,
        temperature=temperature,
        context=context,
    )
    return found


def weighted_gradients(
    model: Any,
    samples: Sequence[SampleLike],
    weights_RN: torch.Tensor,
    *,
    parameters: ParameterChoice = None,
    chunk: int = 16,
    temperature: float = 1.0,
    context: Context = contextlib.nullcontext,
) -> list[Direction]:
    """`weighted_gradient` for each of R lines of weights, from one forward pass."""
    parts, steps = parts_of(model), as_samples(samples)
    if weights_RN.shape[1] != len(steps):
        raise UntwineError(f"{len(steps)} samples but {weights_RN.shape[1]} weights")
    chosen = select_parameters(model, parameters)
    sums = [{name: torch.zeros_like(p) for name, p in chosen.items()} for _ in weights_RN]
    with only_these_need_gradients(model, list(chosen.values())):
        for places, logprobs_B in _read(parts, steps, chunk, temperature, context):
            weights_RB = weights_RN[:, places].to(logprobs_B)
            for r, (weights_B, found) in enumerate(zip(weights_RB, sums, strict=True)):
                grads = torch.autograd.grad(
                    (weights_B * logprobs_B).sum(),
                    list(chosen.values()),
                    retain_graph=r + 1 < len(sums),
                    allow_unused=True,
                )
                for total, grad in zip(found.values(), grads, strict=True):
                    if grad is not None:
                        total += grad
    return sums


def _read(
    parts: LanguageModel,
    steps: Sequence[StepSample],
    size: int,
    temperature: float,
    context: Context,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Samples a chunk at a time: their places in the list, and their log pi, (B,)."""
    shared = _can_share(parts, steps, temperature, context)
    order = in_trie_order(steps) if shared else by_length(steps)
    cut = cut_shared if shared else cut_chunks
    for piece in cut([steps[i] for i in order], size, parts.device):
        logprobs_B = chunk_logprobs(parts, piece, temperature, context, shared=shared)
        yield [order[r] for r in piece.rows], logprobs_B


@torch.no_grad()
def _can_share(
    parts: LanguageModel, steps: Sequence[StepSample], temperature: float, context: Context
) -> bool:
    """Whether the model was adopted, and reads two short samples together as it reads them one by
    one."""
    if not adopted(parts.causal) or len(steps) < 2:
        return False
    (piece,) = cut_chunks(sorted(steps, key=lambda s: s.length)[:2], 2, parts.device)
    plain_B = chunk_logprobs(parts, piece, temperature, context)
    try:
        shared_B = chunk_logprobs(parts, piece, temperature, context, shared=True)
    except ModelError:  # attention that cannot be computed along a trie
        return False
    exact = shared_B.dtype == torch.float64 or context is contextlib.nullcontext
    loose = _COMPARED if exact else 100 * _COMPARED
    return bool(((shared_B - plain_B).abs() <= loose * plain_B.abs().clamp_min(1)).all())
