"""Per-sample gradients of single modules, taken from one batched backward pass.

While a `Capture` is in force, the modules that own chosen parameters run a forward of their own
whose backward keeps the sample axis:

    Linear, Conv1D   dW_i = sum_t b_it a_it^T, db_i = sum_t b_it from inputs a and output
                     gradients b
    norms            the scale (and shift) is repeated per sample, so autograd gives g_i directly
    Embedding        the gradient of the output, summed per (sample, token)

The gradients of a chunk of samples are kept in a `Store`: as rows of one table per parameter, or,
where these are smaller, as a_it and b_it. Once all N samples have theirs, they go to the sink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from untwine.diagnose.sinks import Sink
from untwine.diagnose.store import Store, Table
from untwine.errors import ModelError

_SLICE_NUMBERS = 1 << 24  # numbers in a slice whose gradients are to be formed; fewer are slower

Deliver = Callable[[torch.Tensor, torch.Tensor], None]
SparseRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # sample_U, row_U, vectors_UD


@dataclass(frozen=True, slots=True)
class _Piece:
    """Gradients of `rows`: left^T right of (B, T, X), (B, T, Y), or rows of the table."""

    rows: range
    factors: tuple[torch.Tensor, torch.Tensor] | None = None

    def write(self, table_NP: torch.Tensor | None, first: int, into_BXY: torch.Tensor) -> None:
        """Rows `first` and on of each gradient, as many as there is room for."""
        _, height, width = into_BXY.shape
        if self.factors is not None:
            left, right = (f.to(into_BXY) for f in self.factors)
            torch.bmm(left[..., first : first + height].transpose(1, 2), right, out=into_BXY)
        elif table_NP is not None:
            here_BP = table_NP[self.rows.start : self.rows.stop]
            into_BXY.copy_(here_BP[:, first * width : (first + height) * width].view_as(into_BXY))


class Gate(torch.autograd.Function):
    """x as it is; `deliver(grad)` is called in the backward pass, which ends here."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, deliver: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        ctx.deliver = deliver
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.deliver(grads[0])
        return None, None, None


class _Affine(torch.autograd.Function):
    """x W^T + b with W and b held fixed; `deliver(x, grad)` is called in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,  # needs a gradient, so that backward runs even where x needs none
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        deliver: Deliver,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.deliver = deliver
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0].to(weight.dtype)
        ctx.deliver(x, grad)
        return (grad @ weight).to(x.dtype), None, None, None, None


class Capture:
    """Wraps the modules that own `chosen` parameters; use it as a context.

    rows     the samples that now run forward (set by the sweep)
    looped   names of parameters no handler knows: their gradients must be had sample by sample
    """

    def __init__(
        self,
        model: nn.Module,
        chosen: Mapping[str, nn.Parameter],
        count: int,
        sink: Sink,
        head: nn.Module | None,
        store: Store,
    ) -> None:
        """head: the plain vocabulary projection, whose parameters are left to `head.py`."""
        self.rows = range(0)
        self._sparse: dict[str, list[SparseRows]] = {}
        self._sparse_rows: dict[str, range] = {}
        self._names = {id(p): n for n, p in chosen.items()}
        self._chosen, self._count, self._sink = chosen, count, sink
        self._store = store
        self._pieces: dict[str, list[_Piece]] = {}
        self._tables: dict[str, Table] = {}
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self._got: dict[str, set[int]] = {}
        self.anchor = torch.zeros((), requires_grad=True)
        self._wrapped: list[nn.Module] = []
        self._plan: list[tuple[nn.Module, Callable[..., Any]]] = []
        owners = _owners(model, self._names)
        known = self._make_plan(owners, head)
        self.looped = tuple(n for n in chosen if n not in known)
        planned = {n for m, _ in self._plan for n in self._own(m).values() if n in known}
        self._missing = dict.fromkeys((*planned, *self.looped), count)

    def _make_plan(self, owners: dict[str, list[nn.Module]], head: nn.Module | None) -> set[str]:
        known: set[str] = set()
        for name, modules in owners.items():
            others = [m for m in modules if m is not head]
            if len(others) > 1 or any(_handler(m) is None for m in others):
                continue
            known.add(name)
        for module in dict.fromkeys(m for ms in owners.values() for m in ms):
            handler = _handler(module)
            names = self._own(module)
            if module is head or handler is None or not known.intersection(names.values()):
                continue
            kept = {own: name for own, name in names.items() if name in known}
            self._plan.append((module, handler(self, module, kept)))
        return known

    def _own(self, module: nn.Module) -> dict[str, str]:
        """Attribute -> name of the chosen parameters a module owns itself."""
        return {
            attribute: self._names[id(p)]
            for attribute, p in module._parameters.items()
            if p is not None and id(p) in self._names
        }

    @property
    def complete(self) -> bool:
        """Whether every wrapped module has delivered for every sample."""
        return not any(left for n, left in self._missing.items() if n not in self.looped)

    def __enter__(self) -> Capture:
        for module, forward in self._plan:
            module.forward = forward
            self._wrapped.append(module)
        return self

    def __exit__(self, *_: object) -> None:
        for module in self._wrapped:
            del module.forward
        self._wrapped.clear()

    def _claim(self, name: str, rows: range) -> None:
        got = self._got.setdefault(name, set())
        if rows.start in got:
            raise ModelError(
                f"parameter {name} is used twice in one forward pass, which its per-sample "
                "gradients cannot follow; leave it out of `parameters`"
            )
        got.add(rows.start)

    def wide(self, name: str) -> torch.dtype:
        exact = self._chosen[name].dtype == torch.float64
        return torch.float64 if exact else torch.float32

    def product(self, name: str, rows: range, left: torch.Tensor, right: torch.Tensor) -> None:
        """The gradients (B, X, Y) of `rows` are left^T right, from (B, T, X) and (B, T, Y)."""
        wide = self.wide(name)
        if (
            left.shape[-1] * right.shape[-1] * wide.itemsize * len(left)
            > left.nbytes + right.nbytes
        ):
            self._claim(name, rows)
            keep = self._store.keep
            self._add(name, _Piece(rows, (keep(left), keep(right))))
            return
        left, right = left.to(wide).transpose(1, 2), right.to(wide)
        shape = (len(rows), left.shape[1], right.shape[2])
        self._write(name, rows, lambda into_BP: torch.bmm(left, right, out=into_BP.view(shape)))

    def ready(self, name: str, rows: range, gradients: torch.Tensor) -> None:
        """The gradients of `rows` are (B, P), of a parameter of P numbers."""
        self._write(name, rows, lambda into_BP: into_BP.copy_(gradients))

    def _write(self, name: str, rows: range, write: Callable[[torch.Tensor], object]) -> None:
        self._claim(name, rows)
        if name not in self._tables:
            shape = (self._count, self._chosen[name].numel())
            self._tables[name] = self._store.table(shape, self.wide(name))
        self._tables[name].write(rows, write)
        self._add(name, _Piece(rows))

    def _add(self, name: str, piece: _Piece) -> None:
        self._pieces.setdefault(name, []).append(piece)
        self._missing[name] -= len(piece.rows)
        if self._missing[name] == 0:
            table = self._tables.pop(name, None)
            self._hand_over(name, self._pieces.pop(name), None if table is None else table.rows_NP)

    def _hand_over(self, name: str, pieces: list[_Piece], table_NP: torch.Tensor | None) -> None:
        factors = [piece.factors for piece in pieces if piece.factors is not None]
        if not factors and table_NP is not None:
            self._sink.dense(name, table_NP)
            return
        height, width = factors[0][0].shape[-1], factors[0][1].shape[-1]
        step = min(height, max(1, _SLICE_NUMBERS // (self._count * width)))
        scratch = self._scratch_of(self.wide(name), self._count * step * width)
        for first in range(0, height, step):
            shape = (self._count, min(step, height - first), width)
            slice_NXY = scratch[: math.prod(shape)].view(shape)
            for piece in pieces:
                piece.write(table_NP, first, slice_NXY[piece.rows.start : piece.rows.stop])
            self._sink.dense(name, slice_NXY.flatten(1), first * width)

    def _scratch_of(self, dtype: torch.dtype, size: int) -> torch.Tensor:
        scratch = self._scratch.get(dtype)
        if scratch is None or len(scratch) < size:
            scratch = torch.empty(size, dtype=dtype, device=self._store.device)
            self._scratch[dtype] = scratch
        return scratch

    def finish(self) -> None:
        """Pass on the embeddings that `head.py` has not taken. ModelError when a parameter had
        gradients for some samples only."""
        for name in self._pieces:
            raise ModelError(
                f"parameter {name} was used for some samples only, which its "
                "per-sample gradients cannot follow; leave it out of `parameters`"
            )
        for name in list(self._sparse):
            rows = self.take_sparse(name)
            if rows is not None:
                self._sink.sparse(name, *rows)

    def _add_sparse(self, name: str, rows: range, found: SparseRows) -> None:
        parts = self._sparse.setdefault(name, [])
        if parts and self._sparse_rows.get(name) == rows:  # read twice in one forward pass
            found = _merged(parts.pop(), found, self._count)
        self._sparse_rows[name] = rows
        sample, row, vectors = found
        parts.append((sample, row, self._store.keep(vectors)))
        self._missing[name] -= len(rows)

    def take_sparse(self, name: str) -> SparseRows | None:
        """All rows of an embedding, which are forgotten here; None when there are none. The
        vectors are in the store."""
        if name not in self._sparse:
            return None
        sample, row, vectors = zip(*self._sparse.pop(name), strict=True)
        return torch.cat(sample), torch.cat(row), self._store.cat(vectors)


def _merged(one: SparseRows, other: SparseRows, count: int) -> SparseRows:
    """The sum, with each (sample, row) once."""
    sample, row = torch.cat((one[0], other[0])), torch.cat((one[1], other[1]))
    keys, inverse = torch.unique(row * count + sample, return_inverse=True)
    vectors = torch.cat((one[2].to(other[2]), other[2]))
    summed = vectors.new_zeros(len(keys), vectors.shape[1]).index_add_(0, inverse, vectors)
    return keys % count, keys // count, summed


def _owners(model: nn.Module, names: Mapping[int, str]) -> dict[str, list[nn.Module]]:
    owners: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) in names:
                owners.setdefault(names[id(parameter)], []).append(module)
    return owners


Handler = Callable[[Capture, nn.Module, dict[str, str]], Callable[..., Any]]


def _handler(module: nn.Module) -> Handler | None:
    """How to run a module so that per-sample gradients come out; None when not known."""
    kind = type(module)
    if isinstance(module, nn.Linear | Conv1D):
        plain = kind.forward in (nn.Linear.forward, Conv1D.forward)
        return _affine if plain else None
    if isinstance(module, nn.Embedding):
        plain = kind.forward is nn.Embedding.forward and not module.scale_grad_by_freq
        return _embedding if plain and module.max_norm is None else None
    one_axis = all(p is None or p.dim() == 1 for p in module._parameters.values())
    if one_axis and (kind in (nn.LayerNorm, nn.RMSNorm) or kind.__name__.endswith("RMSNorm")):
        return _norm
    return None


def _check_axis(name: str, shape: torch.Size, rows: range) -> None:
    if len(shape) < 3 or shape[0] != len(rows):
        raise ModelError(
            f"the layer of {name} reads {tuple(shape)} for {len(rows)} samples, so its gradients "
            "cannot be told apart by sample; leave it out of `parameters`"
        )


def _affine(capture: Capture, module: nn.Module, own: dict[str, str]) -> Callable[..., Any]:
    turned = isinstance(module, Conv1D)  # its weight is stored (in, out)
    weight_name, bias_name = own.get("weight"), own.get("bias")

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = capture.rows
        _check_axis(weight_name or bias_name or "", x.shape, rows)

        def deliver(x: torch.Tensor, grad: torch.Tensor) -> None:
            a_BTI, b_BTO = x.flatten(1, -2), grad.flatten(1, -2)
            if weight_name is not None:
                left, right = (a_BTI, b_BTO) if turned else (b_BTO, a_BTI)
                capture.product(weight_name, rows, left, right)
            if bias_name is not None:
                capture.ready(bias_name, rows, b_BTO.to(capture.wide(bias_name)).sum(1))

        weight = module.weight.T if turned else module.weight
        found: torch.Tensor = _Affine.apply(  # type: ignore[no-untyped-call]
            x, capture.anchor, weight, module.bias, deliver
        )
        return found

    return forward


def _norm(capture: Capture, module: nn.Module, own: dict[str, str]) -> Callable[..., Any]:
    inside = type(module).forward.__get__(module)

    def repeated(attribute: str, name: str, x: torch.Tensor, rows: range) -> torch.Tensor:
        shape = (len(rows), *[1] * (x.dim() - 2), x.shape[-1])
        wide = module._parameters[attribute].detach().expand(shape).clone()  # type: ignore[union-attr]

        def deliver(grad: torch.Tensor) -> None:
            capture.ready(name, rows, grad.flatten(1))

        wide.requires_grad_().register_hook(deliver)
        return wide

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = capture.rows
        _check_axis(next(iter(own.values())), x.shape, rows)
        fixed = dict(module._parameters)
        wide = {a: repeated(a, name, x, rows) for a, name in own.items()}
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            weight, bias = (wide.get(a, fixed.get(a)) for a in ("weight", "bias"))
            if isinstance(module, nn.LayerNorm):
                y = nn.functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
            else:
                y = nn.functional.rms_norm(x, module.normalized_shape, None, module.eps)
            y = y if weight is None else y * weight
            return y if bias is None else y + bias
        try:
            module._parameters.update(wide)  # type: ignore[arg-type]
            found: torch.Tensor = inside(x)
            return found
        finally:
            module._parameters.update(fixed)

    return forward


def _embedding(capture: Capture, module: nn.Module, own: dict[str, str]) -> Callable[..., Any]:
    name = own["weight"]
    assert isinstance(module, nn.Embedding)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        rows = capture.rows
        if ids.dim() != 2 or ids.shape[0] not in (1, len(rows)):
            raise ModelError(f"the layer of {name} reads ids of shape {tuple(ids.shape)}")
        ids_BT = ids.expand(len(rows), -1)  # positions are often given once for all samples
        with torch.no_grad():
            out = nn.Embedding.forward(module, ids_BT)

        def deliver(grad: torch.Tensor) -> None:
            capture._add_sparse(name, rows, _rows_of(ids_BT, grad, module.padding_idx, rows))

        found: torch.Tensor = Gate.apply(out, capture.anchor, deliver)  # type: ignore[no-untyped-call]
        return found

    return forward


def _rows_of(
    ids_BT: torch.Tensor, grad_BTD: torch.Tensor, padding: int | None, rows: range
) -> SparseRows:
    """Gradients summed per (sample, id); ids without any gradient, as at padding, are left out."""
    grad = grad_BTD.flatten(0, 1)
    grad = grad if grad.dtype == torch.float64 else grad.float()
    ids = ids_BT.flatten()
    sample = torch.arange(rows.start, rows.stop, device=ids.device).repeat_interleave(
        ids_BT.shape[1]
    )
    kept = (grad != 0).any(-1)
    if padding is not None:  # nn.Embedding gives the padding row no gradient
        kept &= ids != padding
    key = ids[kept] * rows.stop + sample[kept]
    keys, inverse = torch.unique(key, return_inverse=True)
    vectors = torch.zeros(len(keys), grad.shape[-1], dtype=grad.dtype, device=grad.device)
    vectors.index_add_(0, inverse, grad[kept])
    return keys % rows.stop, keys // rows.stop, vectors
