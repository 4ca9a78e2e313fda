"""Log-probabilities of a micro-batch: every distinct token computed once.

The rows become one packed trie (policy/trie.py), the model runs over it once, and the vocabulary is
looked at only where a target is predicted: once for each distinct place, however many rows share
it. Where distinct places x vocabulary exceed `LOGIT_BUDGET`, logits are made in parts, and again in
the backward pass: they are never all there.

Shape suffixes: N targets, U distinct places that predict them, V vocabulary, C choices, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from untwine.batch import Row, stacked_choices
from untwine.losses.policy import entropy
from untwine.policy.loading import Policy
from untwine.policy.trie import Layout, PackedTrie, build_trie

LOGIT_BUDGET = 2**26  # logits that may be kept for the backward pass: 256 MiB in float32
_IN_CACHE = 2**18  # logits that a CPU core works on at once: 1 MiB in float32


@dataclass(frozen=True, slots=True)
class Targets:
    """Model outputs and data at the N trained positions of a micro-batch, in the order of its rows.

    ids_N         the target tokens
    logprobs_N    their log-probabilities, at the temperature, among the choices of each target
    entropies_N   entropy in nats of the distribution each was drawn from; NaN where not asked for
    likeliest_N   the token that was likeliest there
    weights_N, old_logprobs_N, advantages_N   see `Row`
    computed_tokens   tokens the model ran over
    """

    ids_N: torch.Tensor
    logprobs_N: torch.Tensor
    entropies_N: torch.Tensor
    likeliest_N: torch.Tensor
    weights_N: torch.Tensor
    old_logprobs_N: torch.Tensor
    advantages_N: torch.Tensor
    computed_tokens: int
    _logits: Callable[[Sequence[int]], torch.Tensor]

    def logits(self, targets: Sequence[int]) -> torch.Tensor:
        """Vocabulary logits that predict the given targets, (n, V), without gradient, before
        temperature and choices."""
        return self._logits(targets)

    def split(self, n: int) -> tuple[Targets, Targets]:
        """The first `n` targets, and the others. Both say what was computed for all."""
        parts = []
        for first, part in ((0, slice(n)), (n, slice(n, None))):

            def logits(targets: Sequence[int], first: int = first) -> torch.Tensor:
                return self._logits([first + t for t in targets])

            cut = {f.name: getattr(self, f.name)[part] for f in fields(self) if f.name[-2:] == "_N"}
            parts.append(replace(self, **cut, _logits=logits))
        return parts[0], parts[1]


def score(
    policy: Policy,
    rows: Sequence[Row],
    temperature: float = 1.0,
    *,
    layout: Layout = "auto",
    entropies: bool = True,
    entropy_gradient: bool = False,
) -> Targets:
    """Run the model over one micro-batch.

    layout             which beginnings the rows share (policy/trie.py); changes cost only
    entropies          whether `entropies_N` is computed, several passes over all logits
    entropy_gradient   whether it can be differentiated
    """
    device = policy.device
    trie = pack(policy, rows, layout)
    node_N = np.concatenate([p[r.targets - 1] for p, r in zip(trie.paths, rows, strict=True)])
    places_U, place_N = np.unique(node_N, return_inverse=True)
    ids_N = torch.from_numpy(np.concatenate([r.ids[r.targets] for r in rows])).to(device)
    choices = stacked_choices(rows)
    head = _Head(
        policy,
        temperature,
        torch.from_numpy(place_N).to(device),
        ids_N,
        None if choices is None else torch.from_numpy(choices).to(device),
        entropies,
        entropy_gradient,
    )
    with policy.autocast():
        hidden_UD = policy.hidden_states_along(trie, places_U)
        logprobs_N, entropies_N, likeliest_N = head.score(hidden_UD)

    def gather(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(r, name) for r in rows])).to(device)

    @torch.no_grad()
    def logits(targets: Sequence[int]) -> torch.Tensor:
        with policy.autocast():
            return policy.project(hidden_UD[head.place_N[list(targets)]])

    return Targets(
        ids_N,
        logprobs_N,
        entropies_N,
        likeliest_N,
        gather("weights"),
        gather("old_logprobs"),
        gather("advantages"),
        trie.size,
        logits,
    )


def pack(policy: Policy, rows: Sequence[Row], layout: Layout = "auto") -> PackedTrie:
    """The trie of the rows, each up to the token before its last target."""
    return build_trie([row.ids[: row.targets.max()] for row in rows], layout, policy.costs)


@dataclass(frozen=True, slots=True)
class _Head:
    """From hidden states at the distinct places to numbers at the targets."""

    policy: Policy
    temperature: float
    place_N: torch.Tensor
    ids_N: torch.Tensor
    choices_NC: torch.Tensor | None
    entropies: bool
    entropy_gradient: bool

    def score(self, hidden_UD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities, entropies and likeliest tokens, (N,) each."""
        vocabulary = self.policy.vocabulary
        step = max(1, LOGIT_BUDGET // vocabulary)
        if len(hidden_UD) <= step:
            every = torch.arange(len(self.ids_N), device=hidden_UD.device)
            return self._part(hidden_UD, every, 0)
        order_N = self.place_N.argsort(stable=True)
        edges = torch.arange(0, len(hidden_UD) + step, step, device=hidden_UD.device)
        cuts = torch.searchsorted(self.place_N[order_N].contiguous(), edges).tolist()
        parts = []
        for k, (a, b) in enumerate(pairwise(cuts)):
            first = k * step
            parts.append(
                checkpoint(
                    self._part,
                    hidden_UD[first : first + step],
                    order_N[a:b],
                    first,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        back_N = order_N.argsort()
        logprobs, entropies, likeliest = (torch.cat(x)[back_N] for x in zip(*parts, strict=True))
        return logprobs, entropies, likeliest

    def _part(
        self, hidden_UD: torch.Tensor, which_n: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The targets `which_n`, predicted at the places first, first + 1, ... of `hidden_UD`."""
        logits_UV = self.policy.project(hidden_UD)
        if self.temperature != 1.0:
            logits_UV = logits_UV / self.temperature
        place_n = self.place_N[which_n] - first
        ids_n = self.ids_N[which_n]
        logprobs_n = _LogProbs.apply(logits_UV, place_n, ids_n)  # type: ignore[no-untyped-call]
        entropies_n = torch.full_like(logprobs_n, torch.nan, requires_grad=False)
        if self.entropy_gradient:
            entropies_n = entropy(logits_UV)[place_n]
        with torch.no_grad():
            blocks = _blocks(logits_UV)
            likeliest_n = torch.cat([block.argmax(-1) for block in blocks])[place_n]
            if self.entropies and not self.entropy_gradient:
                entropies_n = torch.cat([entropy(block) for block in blocks])[place_n]
        if self.choices_NC is None:
            return logprobs_n, entropies_n, likeliest_n
        choices_nC = self.choices_NC[which_n]
        bound_m = (choices_nC >= 0).any(1).nonzero()[:, 0]
        choices_mC = choices_nC[bound_m]
        among_mC = logits_UV[place_n[bound_m][:, None], choices_mC.clamp_min(0)]
        among_mC = among_mC.masked_fill(choices_mC < 0, -torch.inf)
        own_m = logits_UV[place_n[bound_m], ids_n[bound_m]] - among_mC.logsumexp(-1)
        if self.entropies:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.entropy_gradient):
                entropies_n = entropies_n.index_copy(0, bound_m, entropy(among_mC))
        best_m = choices_mC.gather(1, among_mC.argmax(1, keepdim=True))[:, 0]
        return (
            logprobs_n.index_copy(0, bound_m, own_m),
            entropies_n,
            likeliest_n.index_copy(0, bound_m, best_m),
        )


class _LogProbs(torch.autograd.Function):
    """Log-probabilities (n,) of ids at rows of logits (U, V): logits[place, id] - logsumexp.

    The same as autograd makes, with fewer passes over U x V numbers: their gradient is written
    once, softmax times minus the summed gradients of the row, plus each gradient at its id.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_UV: torch.Tensor, place_n: torch.Tensor, ids_n: torch.Tensor
    ) -> torch.Tensor:
        lse_U = torch.cat([block.logsumexp(-1) for block in _blocks(logits_UV)])
        ctx.save_for_backward(logits_UV, lse_U, place_n, ids_n)
        return logits_UV[place_n, ids_n] - lse_U[place_n]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_n: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_UV, lse_U, place_n, ids_n = ctx.saved_tensors
        row_U1 = torch.zeros_like(lse_U).index_add_(0, place_n, grad_n)[:, None]
        grad_UV = torch.empty_like(logits_UV)
        for out, block, lse, row in zip(
            *map(_blocks, (grad_UV, logits_UV)),
            *(torch.split(x, _rows_at_once(logits_UV)) for x in (lse_U[:, None], row_U1)),
            strict=True,
        ):
            torch.sub(block, lse, out=out).exp_().mul_(row).neg_()
        grad_UV.index_put_((place_n, ids_n), grad_n, accumulate=True)
        return grad_UV, None, None


def _rows_at_once(logits_UV: torch.Tensor) -> int:
    if logits_UV.device.type != "cpu":
        return max(1, len(logits_UV))
    return max(1, _IN_CACHE // logits_UV.shape[1])


def _blocks(logits_UV: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows in pieces that stay in a core's cache while several operations run over them."""
    return torch.split(logits_UV, _rows_at_once(logits_UV))
