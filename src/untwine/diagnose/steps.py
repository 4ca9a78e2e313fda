"""Real steps on the weights and on gradients: the honesty check, and the push of mean gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from untwine.diagnose.coupling import push
from untwine.diagnose.parameters import ParameterChoice, check_preconditioner, select_parameters
from untwine.diagnose.samples import SampleLike
from untwine.diagnose.scoring import (
    Context,
    Direction,
    Progress,
    log_probabilities,
    weighted_gradient,
    weighted_gradients,
)
from untwine.errors import UntwineError


@dataclass(frozen=True, slots=True)
class Honesty:
    """Predicted change of log pi against the measured one, in nats, (N,) each, float64.

    rate         size of the step that was taken
    correlation  Pearson; slope: of measured on predicted, through the origin (1 is perfect)
    """

    predicted: torch.Tensor
    measured: torch.Tensor
    rate: float
    correlation: float
    slope: float


def check_prediction(
    model: Any,
    samples: Sequence[SampleLike],
    weights_N: torch.Tensor,
    K_NN: torch.Tensor,
    *,
    preconditioner: Mapping[str, torch.Tensor] | None = None,
    parameters: ParameterChoice = None,
    largest: float = 0.01,
    temperature: float = 1.0,
    chunk: int = 16,
    context: Context = contextlib.nullcontext,
) -> Honesty:
    """Take one real optimizer step on the samples, measure log pi before and after, and put the
    weights back bit for bit.

    The step is theta + eta P sum_j w_j g_j, with the `parameters` and `preconditioner` the Gram was
    made with; eta is such that the largest predicted change is `largest`.
    """
    predicted_N = K_NN.cpu() @ weights_N.to(torch.float64).cpu()
    top = float(predicted_N.abs().max())
    if not top > 0:
        raise UntwineError(
            "the predicted change is 0 for every sample, so there is nothing to check; are all "
            "weights 0?"
        )
    rate = largest / top
    options: dict[str, Any] = {"chunk": chunk, "temperature": temperature, "context": context}
    direction = weighted_gradient(model, samples, weights_N, parameters=parameters, **options)
    direction = _preconditioned(model, direction, preconditioner)
    before_N = log_probabilities(model, samples, **options)
    with stepped(model, direction, rate):
        after_N = log_probabilities(model, samples, **options)
    predicted_N, measured_N = rate * predicted_N, after_N - before_N
    pair = torch.stack((predicted_N, measured_N))
    slope = float((predicted_N @ measured_N) / (predicted_N @ predicted_N))
    return Honesty(predicted_N, measured_N, rate, float(torch.corrcoef(pair)[0, 1]), slope)


@contextlib.contextmanager
def stepped(model: Any, direction: Mapping[str, torch.Tensor], rate: float) -> Iterator[None]:
    """The model after one step of `torch.optim.SGD` uphill along `direction`; weights and
    gradients are put back exactly on leaving."""
    chosen = select_parameters(model, lambda name, _: name in direction)
    kept = {n: (p.detach().clone(), p.grad) for n, p in chosen.items()}
    try:
        for name, parameter in chosen.items():
            parameter.grad = -direction[name].to(parameter)
        torch.optim.SGD(list(chosen.values()), lr=rate).step()
        yield
    finally:
        with torch.no_grad():
            for name, parameter in chosen.items():
                value, grad = kept[name]
                parameter.copy_(value)
                parameter.grad = grad


def _preconditioned(
    model: Any, direction: Direction, preconditioner: Mapping[str, torch.Tensor] | None
) -> Direction:
    if preconditioner is None:
        return direction
    chosen: dict[str, nn.Parameter] = select_parameters(model, lambda name, _: name in direction)
    check_preconditioner(chosen, preconditioner)
    return {n: d * preconditioner[n].to(d) for n, d in direction.items()}


@dataclass(frozen=True, slots=True)
class MeanPush:
    """What the mean gradient of several batches does to fixed probes.

    push          (N) change of each probe's log pi per unit rate
    null          (R, N) the same with the weights of each batch permuted, R times
    signal_share  |E d|^2 / E |d|^2 of the batches' gradients d, estimated without bias (it can come
                  out below 0); None for a single batch
    """

    push: torch.Tensor
    null: torch.Tensor
    batches: int
    signal_share: float | None


def mean_push(
    model: Any,
    probes: Sequence[SampleLike],
    batches: Sequence[tuple[Sequence[SampleLike], torch.Tensor]],
    *,
    preconditioner: Mapping[str, torch.Tensor] | None = None,
    parameters: ParameterChoice = None,
    nulls: int = 2,
    seed: int = 0,
    temperature: float = 1.0,
    chunk: int = 16,
    memory_mib: float | None = None,
    folder: Path | None = None,
    context: Context = contextlib.nullcontext,
    on_progress: Progress = lambda done, total: None,
) -> MeanPush:
    """Push of the mean over batches of sum_j w_j g_j on a fixed probe set: the primary measure,
    since the gradient of one batch is mostly noise. Take at least 16 batches.

    Costs a forward pass and `1 + nulls` backward passes per batch, and one pass over the probes;
    memory twice `1 + nulls` gradients, and `memory_mib` as in `coupling.gram`.
    """
    if not batches:
        raise UntwineError("a mean push needs at least one batch")
    options: dict[str, Any] = {"chunk": chunk, "temperature": temperature, "context": context}
    generator = torch.Generator().manual_seed(seed)
    means: list[Direction] = [{} for _ in range(1 + nulls)]
    squares = 0.0
    total = len(batches) + 1
    for b, (samples, weights_N) in enumerate(batches):
        orders = [torch.randperm(len(weights_N), generator=generator) for _ in range(nulls)]
        weights_RN = torch.stack([weights_N, *(weights_N[order] for order in orders)])
        found = weighted_gradients(model, samples, weights_RN, parameters=parameters, **options)
        for r, (mean, plain) in enumerate(zip(means, found, strict=True)):
            direction = _preconditioned(model, plain, preconditioner)
            if r == 0:
                squares += _square(direction)
            for name, value in direction.items():
                part = value / len(batches)
                mean[name] = mean[name] + part if name in mean else part
        on_progress(b + 1, total)
    pushes = push(model, probes, means, memory_mib=memory_mib, folder=folder, **options)
    on_progress(total, total)
    share = None
    if len(batches) > 1 and squares > 0:
        count, square = len(batches), squares / len(batches)
        share = (count * _square(means[0]) - square) / ((count - 1) * square)
    return MeanPush(pushes[:, 0], pushes[:, 1:].T, len(batches), share)


def _square(direction: Direction) -> float:
    return sum(float(d.double().square().sum()) for d in direction.values())
