"""What is done with per-sample gradients once a parameter's are complete, before they are dropped.

A sink is given the gradients g_i of one parameter (or of some of its columns) for all N samples:
`dense` as a matrix, `sparse` as the few rows of an embedding that a sample touches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from untwine.errors import UntwineError

_COLUMNS = 1 << 12  # of a product in float32; sums of more lose digits
_ROWS = 64

DotBlock = tuple[int, torch.Tensor]  # first of the l, dots_LM


class Sink(Protocol):
    def dense(self, name: str, gradients_NP: torch.Tensor, first: int = 0) -> None:
        """Columns `first` and on of the flattened parameter `name`; they may be in a file."""

    def sparse(
        self, name: str, sample_U: torch.Tensor, row_U: torch.Tensor, vectors_UD: torch.Tensor
    ) -> None:
        """Rows `row_U` of the (V, D) parameter `name`, each (sample, row) at most once. The vectors
        may be those of a store, of which only some are to be in memory at a time."""

    def takes_dots(self, name: str) -> bool:
        """Whether `dots` will do instead of `dense`."""

    def dots(self, name: str, sample_M: torch.Tensor, blocks: Iterable[DotBlock]) -> None:
        """g_i is the sum of the outer products x_m y_m^T of the sample's tokens m; a block holds
        <x_l, x_m> <y_l, y_m> for some l, and for all m from the first of them on."""


def rows_of(vectors_UD: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """vectors_UD[at] on the device of `at`, which vectors in a file are not on."""
    return vectors_UD[at.to(vectors_UD.device)].to(at.device)


class GramSink:
    """K_ij = <g_i, P g_j>, summed over parameters in float64."""

    def __init__(
        self, count: int, device: torch.device, preconditioner: Mapping[str, torch.Tensor] | None
    ) -> None:
        self.K_NN = torch.zeros(count, count, dtype=torch.float64, device=device)
        self._roots = (
            None
            if preconditioner is None
            else {n: p.detach().to(device).sqrt() for n, p in preconditioner.items()}
        )

    def dense(self, name: str, gradients_NP: torch.Tensor, first: int = 0) -> None:
        root_P = None if self._roots is None else self._roots[name].flatten()[first:]
        part_NN = torch.zeros_like(self.K_NN)
        for column in range(0, gradients_NP.shape[1], _COLUMNS):
            block = gradients_NP[:, column : column + _COLUMNS].to(part_NN.device)
            if root_P is not None:
                block = block * root_P[column : column + block.shape[1]]
            for row in range(0, len(block), _ROWS):  # the upper triangle is enough
                part_NN[row : row + _ROWS, row:] += block[row : row + _ROWS] @ block[row:].T
        check_finite(name, part_NN.diagonal())
        self.K_NN += part_NN.triu() + part_NN.triu(1).T

    def sparse(
        self, name: str, sample_U: torch.Tensor, row_U: torch.Tensor, vectors_UD: torch.Tensor
    ) -> None:
        order = row_U.argsort(stable=True)
        sample_U = sample_U[order]
        row_R, counts = torch.unique_consecutive(row_U[order], return_counts=True)
        roots_RD = None if self._roots is None else self._roots[name][row_R]
        part_NN = torch.zeros_like(self.K_NN)
        begin = 0
        for r, count in enumerate(counts.tolist()):
            who = sample_U[begin : begin + count]
            rows = rows_of(vectors_UD, order[begin : begin + count])
            if roots_RD is not None:
                rows = rows * roots_RD[r]
            part_NN[who[:, None], who[None]] += (rows @ rows.T).double()
            begin += count
        check_finite(name, part_NN.diagonal())
        self.K_NN += part_NN.triu() + part_NN.triu(1).T

    def takes_dots(self, name: str) -> bool:
        return self._roots is None

    def dots(self, name: str, sample_M: torch.Tensor, blocks: Iterable[DotBlock]) -> None:
        upper_NN, both_NN = torch.zeros_like(self.K_NN), torch.zeros_like(self.K_NN)
        for first, dots_LM in blocks:
            height, wide = len(dots_LM), dots_LM.double()
            rows_NM = wide.new_zeros(len(self.K_NN), dots_LM.shape[1])
            rows_NM.index_add_(0, sample_M[first : first + height], wide)
            inside = sample_M[first : first + height]
            both_NN.index_add_(1, inside, rows_NM[:, :height])
            upper_NN.index_add_(1, sample_M[first + height :], rows_NM[:, height:])
        part_NN = both_NN + upper_NN + upper_NN.T
        check_finite(name, part_NN.diagonal())
        self.K_NN += part_NN.triu() + part_NN.triu(1).T


class PushSink:
    """<g_i, d_b> for given directions d_b, summed over parameters in float64."""

    def __init__(
        self, count: int, device: torch.device, directions: list[dict[str, torch.Tensor]]
    ) -> None:
        self.push_NB = torch.zeros(count, len(directions), dtype=torch.float64, device=device)
        self._directions = directions

    def dense(self, name: str, gradients_NP: torch.Tensor, first: int = 0) -> None:
        for b, direction in enumerate(self._directions):
            along = direction[name].flatten().to(self.push_NB.device, gradients_NP.dtype)
            for column in range(0, gradients_NP.shape[1], _COLUMNS):
                block = gradients_NP[:, column : column + _COLUMNS].to(along.device)
                start = first + column
                self.push_NB[:, b] += block @ along[start : start + block.shape[1]]
        check_finite(name, self.push_NB.sum(-1))

    def sparse(
        self, name: str, sample_U: torch.Tensor, row_U: torch.Tensor, vectors_UD: torch.Tensor
    ) -> None:
        for b, direction in enumerate(self._directions):
            along_VD = direction[name].to(row_U.device, vectors_UD.dtype)
            for at in torch.split(torch.arange(len(row_U), device=row_U.device), _COLUMNS):
                values = (rows_of(vectors_UD, at) * along_VD[row_U[at]]).sum(-1).double()
                self.push_NB[:, b].index_add_(0, sample_U[at], values)
        check_finite(name, self.push_NB.sum(-1))

    def takes_dots(self, name: str) -> bool:
        return False

    def dots(self, name: str, sample_M: torch.Tensor, blocks: Iterable[DotBlock]) -> None:
        raise AssertionError("a direction is needed here, not products: `takes_dots` says so")


class NotFinite(UntwineError):
    """A gradient (or log pi, where `name` is empty) is NaN or infinite.

    position  the sample's place in the working order
    """

    def __init__(self, name: str, position: int) -> None:
        what = (
            f"the gradient of sample {position} in {name}"
            if name
            else f"log pi of sample {position}"
        )
        super().__init__(f"{what} is not finite; leave the sample out, or compute in float32")
        self.name, self.position = name, position


def check_finite(name: str, values_N: torch.Tensor, first: int = 0) -> None:
    """NotFinite for the first sample whose value is NaN or infinite; `first` is that of place 0."""
    bad = (~values_N.isfinite()).nonzero()
    if len(bad):
        raise NotFinite(name, first + int(bad[0]))
