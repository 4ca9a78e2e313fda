"""The vocabulary projection: where the gradient of log pi begins, and its own weight's share.

For an action token y read off hidden state h, the gradient of log softmax(W h)_y in the logits is
the residual e_y - p, so dW_i = sum over the sample's tokens of (e_y - p) h^T, and a tied embedding
adds its own rows to the same matrix. These matrices are formed for a slice of the vocabulary at a
time, from the hidden states and the normalisers; residuals are never kept. Where actions are short
it takes fewer operations to multiply tokens with tokens: <dW_i, dW_j> is the sum of
<r_l, r_m> <h_l, h_m> over the tokens l of i and m of j, with residuals r.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from untwine.diagnose.capture import SparseRows
from untwine.diagnose.samples import Chunk
from untwine.diagnose.scoring import log_softmax_at
from untwine.diagnose.sinks import DotBlock, Sink, rows_of
from untwine.diagnose.store import Store

_SLICE_NUMBERS = 1 << 24  # numbers in the gradients of one slice of the vocabulary
_LOGIT_NUMBERS = 1 << 25  # logits at a time
_DOT_NUMBERS = 1 << 23  # products of pairs of tokens; where there are more, matrices are formed
_DOT_ROWS = 256
_DOT_COLUMNS = 1 << 12  # of a product in float32; sums of more lose digits

Narrow = tuple[int, int, int, float]  # sample of the chunk, place, id, entry of the residual


@dataclass(slots=True)
class _Kept:
    """What one chunk leaves for the head's own gradient.

    hidden_BLD  hidden states, 0 where there is no token
    lse_BL      normalisers; infinite where there is no token or the ids are restricted
    where       places (b, l, id; 3 x U) of what stands there instead of -p ...
    values_U    ... and what it is
    """

    rows: range
    hidden_BLD: torch.Tensor
    lse_BL: torch.Tensor
    where: torch.Tensor
    values_U: torch.Tensor

    @property
    def present_BL(self) -> torch.Tensor:
        """Where there is a token."""
        present_BL = torch.zeros_like(self.lse_BL, dtype=torch.bool)
        present_BL[self.where[0], self.where[1]] = True
        return present_BL

    def residual(self, logits_BLV: torch.Tensor, first: int) -> torch.Tensor:
        """e_y - p for the ids from `first` on."""
        residual_BLV = -(logits_BLV - self.lse_BL[..., None]).exp_()
        here = (self.where[2] >= first) & (self.where[2] < first + logits_BLV.shape[-1])
        sample, place, token = self.where[:, here]
        residual_BLV.index_put_((sample, place, token - first), self.values_U[here])
        return residual_BLV


class Head:
    """A plain `nn.Linear` vocabulary projection."""

    def __init__(self, linear: nn.Linear, temperature: float, store: Store) -> None:
        self.linear = linear
        self.temperature = temperature
        self._store = store
        self._kept: list[_Kept] = []

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
        narrow: list[Narrow] = []
        step = max(1, _LOGIT_NUMBERS // len(weight))
        for begin in range(0, len(hidden_MD), step):
            at = slice(begin, begin + step)
            logits = self.logits(hidden_MD[at])
            logprobs, lse = log_softmax_at(logits, chunk, at)
            residual, others = _residual(logits, lse, chunk, at, narrow)
            if toward:
                residual = residual / self.temperature
                toward_MD[at] = (residual.to(weight.dtype) @ weight).to(hidden_MD.dtype)
            logprobs_M.append(torch.where(others < 0.5, torch.log1p(-others), logprobs))
            lse_M.append(lse)
            others_M.append(others)
        self._keep(chunk, hidden_MD, torch.cat(lse_M), torch.cat(others_M), narrow)
        zeros_B = torch.zeros(len(chunk.rows), dtype=logprobs_M[0].dtype, device=hidden_MD.device)
        return toward_MD, zeros_B.index_add(0, chunk.sample_M, torch.cat(logprobs_M))

    def _keep(
        self,
        chunk: Chunk,
        hidden_MD: torch.Tensor,
        lse_M: torch.Tensor,
        others_M: torch.Tensor,
        narrow: list[Narrow],
    ) -> None:
        places = (chunk.sample_M, chunk.place_M)
        shape = (len(chunk.rows), int(chunk.place_M.max()) + 1)
        hidden_BLD = hidden_MD.new_zeros(*shape, hidden_MD.shape[-1]).index_put_(places, hidden_MD)
        closed = torch.tensor([a is not None for a in chunk.allowed], device=lse_M.device)
        lse_BL = torch.full(shape, torch.inf, dtype=lse_M.dtype, device=lse_M.device)
        lse_BL.index_put_(places, lse_M.masked_fill(closed, torch.inf))
        where, values = torch.stack((*places, chunk.targets_M)), others_M
        if narrow:
            *at, shares = zip(*narrow, strict=True)
            where = torch.cat((where, torch.tensor(at, device=where.device)), 1)
            values = torch.cat((values, values.new_tensor(shares)))
        keep = self._store.keep
        self._kept.append(_Kept(chunk.rows, keep(hidden_BLD), lse_BL, where, values))

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
        weight = self.linear.weight
        vocabulary, width = weight.shape
        alone = tied is None and list(names) == ["weight"]
        if alone and sink.takes_dots(names["weight"]) and self._dots_are_fewer(count):
            sink.dots(names["weight"], *self._dots())
            return
        wider = max(width, *(kept.hidden_BLD.shape[1] for kept in self._kept))
        step = min(vocabulary, max(1, _SLICE_NUMBERS // (count * wider)))
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        empty = partial(torch.empty, dtype=wide, device=weight.device)
        scratch, biases = empty(count * step * width), empty(count, step)
        for first in range(0, vocabulary, step):
            last = min(first + step, vocabulary)
            size = last - first
            grad_NVD = scratch[: count * size * width].view(count, size, width)
            for kept in self._kept:
                self._form(kept, first, last, grad_NVD, biases)
            if "weight" in names:
                if tied is not None:
                    _add_rows(grad_NVD, tied, first, last)
                sink.dense(names["weight"], grad_NVD.flatten(1), first * width)
            if "bias" in names:
                sink.dense(names["bias"], biases[:, :size].clone(), first)

    def _dots_are_fewer(self, count: int) -> bool:
        """Whether multiplying tokens takes fewer operations than multiplying matrices; half of each
        product is needed, and matrices have to be formed first."""
        vocabulary, width = self.linear.weight.shape
        tokens = sum(int(kept.present_BL.sum()) for kept in self._kept)
        matrices = count * (count + 2 * tokens / count) * vocabulary * width
        return tokens**2 <= min(_DOT_NUMBERS, matrices / (vocabulary + width))

    def _dots(self) -> tuple[torch.Tensor, Iterator[DotBlock]]:
        """The sample of each token, and <r_l, r_m> <h_l, h_m> in blocks; see `Sink.dots`."""
        weight = self.linear.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        samples, hidden = [], []
        for kept in self._kept:
            rows_B = torch.arange(kept.rows.start, kept.rows.stop, device=weight.device)
            samples.append(rows_B[:, None].expand(kept.lse_BL.shape)[kept.present_BL])
            hidden.append(self._store.back(kept.hidden_BLD)[kept.present_BL].to(wide))
        hidden_MD = torch.cat(hidden)
        size = len(hidden_MD)
        dots_MM = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
        for first in range(0, len(weight), _DOT_COLUMNS):
            last = min(first + _DOT_COLUMNS, len(weight))
            parts = [self._residual(k, first, last)[1][k.present_BL] for k in self._kept]
            residual_MV = torch.cat(parts)
            for row in range(0, size, _DOT_ROWS):
                block = residual_MV[row : row + _DOT_ROWS] @ residual_MV[row:].T
                dots_MM[row : row + _DOT_ROWS, row:] += block

        def blocks() -> Iterator[DotBlock]:
            for row in range(0, size, _DOT_ROWS):
                hidden_LM = hidden_MD[row : row + _DOT_ROWS] @ hidden_MD[row:].T
                yield row, dots_MM[row : row + _DOT_ROWS, row:] * hidden_LM

        return torch.cat(samples), blocks()

    def _residual(self, kept: _Kept, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of one chunk, and residuals in the ids `first` to `last`."""
        hidden_BLD = self._store.back(kept.hidden_BLD)
        bias = None if self.linear.bias is None else self.linear.bias[first:last]
        logits = nn.functional.linear(hidden_BLD, self.linear.weight[first:last], bias)
        return hidden_BLD, kept.residual(self._scaled(logits), first).div_(self.temperature)

    def _form(
        self,
        kept: _Kept,
        first: int,
        last: int,
        grad_NVD: torch.Tensor,
        biases_NV: torch.Tensor,
    ) -> None:
        """Gradients of one chunk's samples in the ids `first` to `last`."""
        hidden_BLD, residual_BLV = self._residual(kept, first, last)
        rows = slice(kept.rows.start, kept.rows.stop)
        torch.bmm(residual_BLV.transpose(1, 2), hidden_BLD.to(grad_NVD), out=grad_NVD[rows])
        if self.linear.bias is not None:
            torch.sum(residual_BLV, 1, out=biases_NV[rows, : last - first])


def _residual(
    logits: torch.Tensor, lse: torch.Tensor, chunk: Chunk, at: slice, narrow: list[Narrow]
) -> tuple[torch.Tensor, torch.Tensor]:
    """e_y - p, where p is 0 outside the allowed ids, and its entries 1 - p_y.

    1 - p_y is the sum over the other ids: the difference would lose digits where p_y is near 1,
    and with it the gradients of likely actions. What is restricted is added to `narrow`.
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
        row = int(chunk.sample_M[at][m])
        place = int(chunk.place_M[at][m])
        pairs = zip(ids, values.tolist(), strict=True)
        narrow += [(row, place, token, value) for token, value in pairs]
    ends = (torch.arange(len(targets), device=logits.device), chunk.targets_M[at])
    residual[ends] = 0
    others = -residual.sum(-1)
    residual[ends] = others
    return residual, others


def _add_rows(
    grad_NVD: torch.Tensor,
    rows: SparseRows,
    first: int,
    last: int,
) -> None:
    sample_U, row_U, vectors_UD = rows
    here = (row_U >= first) & (row_U < last)
    places = (sample_U[here], row_U[here] - first)
    grad_NVD.index_put_(places, rows_of(vectors_UD, here).to(grad_NVD), accumulate=True)
