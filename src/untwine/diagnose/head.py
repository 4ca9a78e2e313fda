"""The vocabulary projection: where the gradient of log pi begins, and its own weight's share.

For an action token y read off hidden state h, the gradient of log softmax(W h)_y in the logits is
the residual e_y - p, so dW_i = sum over the sample's tokens of (e_y - p) h^T, and a tied embedding
adds its own rows to the same matrix. These matrices are formed for a slice of the vocabulary at a
time, from the hidden states and the normalisers; residuals are never kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from untwine.diagnose.capture import SparseRows
from untwine.diagnose.samples import Chunk
from untwine.diagnose.scoring import log_softmax_at
from untwine.diagnose.sinks import Sink

_SLICE_NUMBERS = 1 << 24  # numbers in the gradients of one slice of the vocabulary
_LOGIT_NUMBERS = 1 << 25  # logits at a time


@dataclass(slots=True)
class _Kept:
    """What one chunk leaves for the head's own gradient; see `Head.finish`."""

    hidden_M: list[torch.Tensor] = field(default_factory=list)
    sample_M: list[torch.Tensor] = field(default_factory=list)
    place_M: list[torch.Tensor] = field(default_factory=list)
    target_M: list[torch.Tensor] = field(default_factory=list)
    others_M: list[torch.Tensor] = field(default_factory=list)
    lse_M: list[torch.Tensor] = field(default_factory=list)
    narrow: list[tuple[int, int, int, float]] = field(default_factory=list)


class Head:
    """A plain `nn.Linear` vocabulary projection."""

    def __init__(self, linear: nn.Linear, temperature: float) -> None:
        self.linear = linear
        self.temperature = temperature
        self._kept = _Kept()

    def logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        return self._scaled(nn.functional.linear(hidden_MD, self.linear.weight, self.linear.bias))

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide / self.temperature

    @torch.no_grad()
    def forward(
        self, chunk: Chunk, hidden_MD: torch.Tensor, *, toward: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of each sample's log pi in its hidden states (M, D), and log pi (B,).

        Without `toward`, the gradient is left at 0.
        """
        hidden_MD = hidden_MD.detach()
        weight = self.linear.weight
        toward_MD = torch.zeros_like(hidden_MD)
        logprobs_M, lse_M, others_M = [], [], []
        step = max(1, _LOGIT_NUMBERS // len(weight))
        for begin in range(0, len(hidden_MD), step):
            at = slice(begin, begin + step)
            logits = self.logits(hidden_MD[at])
            logprobs, lse = log_softmax_at(logits, chunk, at)
            residual, others = self._residual(logits, lse, chunk, at)
            if toward:
                residual = residual / self.temperature
                toward_MD[at] = (residual.to(weight.dtype) @ weight).to(hidden_MD.dtype)
            logprobs_M.append(torch.where(others < 0.5, torch.log1p(-others), logprobs))
            lse_M.append(lse)
            others_M.append(others)
        self._keep(chunk, hidden_MD, torch.cat(lse_M), torch.cat(others_M))
        zeros_B = torch.zeros(len(chunk.rows), dtype=logprobs_M[0].dtype, device=hidden_MD.device)
        return toward_MD, zeros_B.index_add(0, chunk.sample_M, torch.cat(logprobs_M))

    def _residual(
        self, logits: torch.Tensor, lse: torch.Tensor, chunk: Chunk, at: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """e_y - p, where p is 0 outside the allowed ids, and its entries 1 - p_y.

        1 - p_y is the sum over the other ids: the difference would lose digits where p_y is near 1,
        and with it the gradients of likely actions. What is restricted is noted.
        """
        residual = -(logits - lse[:, None]).exp()
        targets = chunk.targets_M[at].tolist()
        for m, allowed in enumerate(chunk.allowed[at]):
            if allowed is None:
                continue
            ids = sorted(set(allowed) - {targets[m]})
            where = torch.tensor(ids, dtype=torch.long, device=logits.device)
            values = residual[m, where]
            residual[m] = 0
            residual[m, where] = values
            row = chunk.rows.start + int(chunk.sample_M[at][m])
            place = int(chunk.place_M[at][m])
            pairs = zip(ids, values.tolist(), strict=True)
            self._kept.narrow += [(row, place, token, value) for token, value in pairs]
        ends = (torch.arange(len(targets), device=logits.device), chunk.targets_M[at])
        residual[ends] = 0
        others = -residual.sum(-1)
        residual[ends] = others
        return residual, others

    def _keep(
        self,
        chunk: Chunk,
        hidden_MD: torch.Tensor,
        lse_M: torch.Tensor,
        others_M: torch.Tensor,
    ) -> None:
        closed = torch.tensor([a is not None for a in chunk.allowed], device=lse_M.device)
        kept = self._kept
        kept.hidden_M.append(hidden_MD)
        kept.sample_M.append(chunk.sample_M + chunk.rows.start)
        kept.place_M.append(chunk.place_M)
        kept.target_M.append(chunk.targets_M)
        kept.others_M.append(others_M)
        kept.lse_M.append(lse_M.masked_fill(closed, torch.inf))

    @torch.no_grad()
    def finish(
        self, names: dict[str, str], count: int, sink: Sink, tied: SparseRows | None = None
    ) -> None:
        """Give the sink the gradients of the head's parameters.

        names  attribute (weight, bias) -> name, of those that are chosen
        tied   what the embedding adds to the gradients of the weight, where they are tied
        """
        if not names:
            return
        hidden_NLD, lse_NL, ends = self._padded(count)
        weight, bias = self.linear.weight, self.linear.bias
        vocabulary, width = weight.shape
        step = max(1, _SLICE_NUMBERS // (count * max(width, hidden_NLD.shape[1])))
        wide_NLD = hidden_NLD if hidden_NLD.dtype == torch.float64 else hidden_NLD.float()
        for first in range(0, vocabulary, step):
            last = min(first + step, vocabulary)
            part = None if bias is None else bias[first:last]
            logits = self._scaled(nn.functional.linear(hidden_NLD, weight[first:last], part))
            residual_NLV = -(logits - lse_NL[..., None]).exp_()
            _set_at(residual_NLV, ends, first, last)
            residual_NLV /= self.temperature
            if "weight" in names:
                grad_NVD = torch.bmm(residual_NLV.transpose(1, 2), wide_NLD)
                if tied is not None:
                    _add_rows(grad_NVD, tied, first, last)
                sink.dense(names["weight"], grad_NVD.flatten(1), first * width)
            if "bias" in names:
                sink.dense(names["bias"], residual_NLV.sum(1), first)

    def _padded(
        self, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Hidden states (N, L, D), normalisers (N, L; infinite where there is no token or the ids
        are restricted), and what stands in place of -p: places (n, l, id; 3 x U) and values (U)."""
        kept = self._kept
        sample, place = torch.cat(kept.sample_M), torch.cat(kept.place_M)
        hidden_M, target = torch.cat(kept.hidden_M), torch.cat(kept.target_M)
        length = int(place.max()) + 1
        hidden = hidden_M.new_zeros(count, length, hidden_M.shape[-1])
        hidden[sample, place] = hidden_M
        lse_M = torch.cat(kept.lse_M)
        lse = torch.full((count, length), torch.inf, dtype=lse_M.dtype, device=lse_M.device)
        lse[sample, place] = lse_M
        where = torch.stack((sample, place, target))
        values = torch.cat(kept.others_M)
        if kept.narrow:
            rows, places, tokens, shares = zip(*kept.narrow, strict=True)
            more = torch.tensor([rows, places, tokens], device=where.device)
            where = torch.cat((where, more), 1)
            values = torch.cat((values, torch.tensor(shares).to(values)))
        return hidden, lse, (where, values)


def _set_at(
    residual_NLV: torch.Tensor, ends: tuple[torch.Tensor, torch.Tensor], first: int, last: int
) -> None:
    where, values = ends
    here = (where[2] >= first) & (where[2] < last)
    sample, place, token = where[:, here]
    residual_NLV.index_put_((sample, place, token - first), values[here])


def _add_rows(
    grad_NVD: torch.Tensor,
    rows: SparseRows,
    first: int,
    last: int,
) -> None:
    sample_U, row_U, vectors_UD = rows
    here = (row_U >= first) & (row_U < last)
    places = (sample_U[here], row_U[here] - first)
    grad_NVD.index_put_(places, vectors_UD[here].to(grad_NVD), accumulate=True)
