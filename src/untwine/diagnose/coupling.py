"""Gradient coupling: the exact N x N Gram K_ij = <g_i, P g_j> of step samples.

g_i = grad log pi(a_i|s_i), summed over the tokens of the action. One forward and backward pass over
all samples gives every g_i layer by layer; the Gram of a layer is added up and its gradients are
dropped (capture.py, sweep.py); what has to wait does so in memory or in a file (store.py). No N
separate backward passes, and no matrix of all gradients in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from untwine.diagnose.capture import Capture
from untwine.diagnose.head import Head
from untwine.diagnose.parameters import (
    ParameterChoice,
    check_preconditioner,
    only_these_need_gradients,
    select_parameters,
)
from untwine.diagnose.samples import SampleLike, StepSample, as_samples, by_length, cut_chunks
from untwine.diagnose.scoring import (
    Context,
    LanguageModel,
    Progress,
    chunk_logprobs,
    parts_of,
)
from untwine.diagnose.sinks import GramSink, NotFinite, PushSink, Sink
from untwine.diagnose.store import Store
from untwine.diagnose.sweep import sweep
from untwine.errors import ModelError, UntwineError

_LOOPED_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Gram:
    """K_NN float64 on the CPU, in the order of the samples.

    logprobs_N  log pi(a_i|s_i) in nats, float64
    parameters  names of the parameters it is over
    looped      those of them whose layer type is not known: their gradients came from one
                backward pass per sample, exact but slow
    """

    K_NN: torch.Tensor
    logprobs_N: torch.Tensor
    parameters: tuple[str, ...]
    looped: tuple[str, ...] = ()

    @property
    def cosines_NN(self) -> torch.Tensor:
        return cosines(self.K_NN)


def cosines(K_NN: torch.Tensor) -> torch.Tensor:
    """K_ij / sqrt(K_ii K_jj); NaN where a gradient is 0, as at forced actions."""
    norms_N = K_NN.diagonal().clamp_min(0).sqrt()
    return K_NN / (norms_N[:, None] * norms_N[None])


def gram(
    model: Any,
    samples: Sequence[SampleLike],
    *,
    parameters: ParameterChoice = None,
    preconditioner: Mapping[str, torch.Tensor] | None = None,
    temperature: float = 1.0,
    chunk: int = 16,
    recompute: bool = False,
    memory_mib: float | None = None,
    folder: Path | None = None,
    check: bool = True,
    context: Context = contextlib.nullcontext,
    on_progress: Progress = lambda done, total: None,
) -> Gram:
    """The exact Gram of a transformers (or peft) causal language model over step samples.

    parameters      which of the trained parameters; see `select_parameters`
    preconditioner  diagonal P by parameter name, as from `adam_preconditioner`; None is P = 1
    temperature     logits are divided by it, as they were when sampled
    chunk           samples per forward pass; the result does not depend on it
    recompute       keep only what goes from block to block and compute each block again in the
                    backward pass: one forward pass more, gradients of one block instead of all
    memory_mib      of what is kept between the passes, how much may be in memory; the rest goes to
                    a temporary file. None is 1024 on a CPU, a quarter of the device's with CUDA
    folder          for that file; None is the system's folder for temporary files
    check           compare log pi and |g|^2 of a short sample with an ordinary backward pass
    context         the context forward passes run in, such as an autocast

    The model is put into eval mode meanwhile; its weights, modes and gradients stay as they were.
    UntwineError when a gradient is not finite, ModelError when a layer cannot be followed.
    """
    steps = as_samples(samples)
    if len(steps) < 2:
        raise UntwineError(f"coupling needs at least two samples, got {len(steps)}")
    chosen = select_parameters(model, parameters)
    if preconditioner is not None:
        check_preconditioner(chosen, preconditioner)
    parts = parts_of(model)
    sink = GramSink(len(steps), parts.device, preconditioner)
    keeping = partial(Store, parts.device, memory_mib, folder)
    run = _Run(parts, chosen, temperature, chunk, recompute, context, on_progress, keeping)
    order, logprobs, looped = run(steps, sink)
    back = torch.tensor(order).argsort()
    K_NN = sink.K_NN.cpu()[back][:, back]
    result = Gram(K_NN, logprobs.cpu()[back], tuple(chosen), looped)
    if check:
        _check(run, steps, result, preconditioner)
    return result


def push(
    model: Any,
    probes: Sequence[SampleLike],
    directions: Sequence[Mapping[str, torch.Tensor]],
    *,
    temperature: float = 1.0,
    chunk: int = 16,
    recompute: bool = False,
    memory_mib: float | None = None,
    folder: Path | None = None,
    context: Context = contextlib.nullcontext,
    on_progress: Progress = lambda done, total: None,
) -> torch.Tensor:
    """First-order change of each probe's log pi per unit step along each direction.

    directions  parameter name -> tensor, all with the same names; a missing name counts 0
    Returns <g_i, d_b>, shape (N, B), float64 on the CPU.
    """
    steps = as_samples(probes)
    if not steps or not directions:
        raise UntwineError("a push needs at least one probe and one direction")
    names = set(directions[0])
    if any(set(d) != names for d in directions):
        raise UntwineError("all directions of a push must be over the same parameters")
    chosen = select_parameters(model, lambda name, _: name in names)
    parts = parts_of(model)
    sink = PushSink(len(steps), parts.device, [dict(d) for d in directions])
    keeping = partial(Store, parts.device, memory_mib, folder)
    run = _Run(parts, chosen, temperature, chunk, recompute, context, on_progress, keeping)
    order, _, _ = run(steps, sink)
    return sink.push_NB.cpu()[torch.tensor(order).argsort()]


@torch.no_grad()
def head_gram(
    model: Any,
    samples: Sequence[SampleLike],
    *,
    temperature: float = 1.0,
    chunk: int = 16,
    memory_mib: float | None = None,
    folder: Path | None = None,
    context: Context = contextlib.nullcontext,
    on_progress: Progress = lambda done, total: None,
) -> Gram:
    """The Gram over the vocabulary projection's weight alone: a forward pass only.

    Of a tied weight this is the part that comes through the projection. It is a stand-in for the
    exact Gram; show its correlation with it (`off_diagonal_correlation`) wherever it is used.
    """
    steps = as_samples(samples)
    if len(steps) < 2:
        raise UntwineError(f"coupling needs at least two samples, got {len(steps)}")
    parts = parts_of(model)
    store = Store(parts.device, memory_mib, folder)
    head = _plain_head(parts, temperature, store)
    if head is None:
        raise ModelError(
            f"the vocabulary projection is a {type(parts.head).__name__}, not a plain Linear; "
            "use the exact Gram"
        )
    order = by_length(steps)
    chunks = cut_chunks([steps[i] for i in order], chunk, parts.device)
    sink, logprobs = GramSink(len(steps), parts.device, None), []
    with store, only_these_need_gradients(model), _original_numbers(order):
        for done, piece in enumerate(chunks):
            with context():
                hidden_MD = parts.hidden(piece)
                logprobs.append(head.forward(piece, hidden_MD, toward=False)[1])
            on_progress(done + 1, len(chunks))
        head.finish({"weight": "lm_head.weight"}, len(steps), sink)
    back = torch.tensor(order).argsort()
    logprobs_N = torch.cat(logprobs).double().cpu()[back]
    return Gram(sink.K_NN.cpu()[back][:, back], logprobs_N, ("lm_head.weight",))


def off_diagonal_correlation(a_NN: torch.Tensor, b_NN: torch.Tensor) -> float:
    """Pearson correlation of two Grams over pairs i < j; NaN when one of them is constant."""
    i, j = torch.triu_indices(len(a_NN), len(a_NN), 1)
    pair = torch.stack((a_NN[i, j].double(), b_NN[i, j].double()))
    return float(torch.corrcoef(pair)[0, 1]) if pair.shape[1] > 1 else float("nan")


@dataclass(slots=True)
class _Run:
    """One sweep over samples: everything but what is done with the gradients."""

    parts: LanguageModel
    chosen: dict[str, nn.Parameter]
    temperature: float
    chunk: int
    recompute: bool
    context: Context
    on_progress: Progress
    keeping: Callable[[], Store]

    def __call__(
        self, steps: Sequence[StepSample], sink: Sink
    ) -> tuple[list[int], torch.Tensor, tuple[str, ...]]:
        """The working order, log pi in that order (float64), and the parameters looped over."""
        order = by_length(steps)
        with self.keeping() as store, _original_numbers(order):
            logprobs_N, looped = self._ordered([steps[i] for i in order], sink, store)
        return order, logprobs_N.double(), looped

    def _ordered(
        self, steps: Sequence[StepSample], sink: Sink, store: Store
    ) -> tuple[torch.Tensor, tuple[str, ...]]:
        chunks = cut_chunks(steps, self.chunk, self.parts.device)
        head = _plain_head(self.parts, self.temperature, store)
        plain = None if head is None else head.linear
        capture = Capture(self.parts.whole, self.chosen, len(steps), sink, plain, store)
        with only_these_need_gradients(self.parts.whole):
            with capture:
                logprobs_N = sweep(
                    self.parts,
                    chunks,
                    capture,
                    head,
                    store,
                    temperature=self.temperature,
                    recompute=self.recompute,
                    context=self.context,
                    on_progress=self.on_progress,
                )
            if head is not None:
                names = self._head_names(head.linear)
                head.finish(names, len(steps), sink, capture.take_sparse(names.get("weight", "")))
            capture.finish()
        self._loop(steps, capture)
        return logprobs_N, capture.looped

    def _head_names(self, linear: nn.Linear) -> dict[str, str]:
        names = {id(p): n for n, p in self.chosen.items()}
        return {a: names[id(p)] for a, p in linear._parameters.items() if id(p) in names}

    def _loop(self, steps: Sequence[StepSample], capture: Capture) -> None:
        """One backward pass per sample, for parameters of layers that no handler knows."""
        names = capture.looped
        size = len(steps) * sum(self.chosen[n].numel() for n in names) * 4
        if size > _LOOPED_BYTES:
            raise ModelError(
                f"layers of unknown type hold {names[0]}{' and others' if len(names) > 1 else ''}; "
                f"their per-sample gradients would take {size / 2**30:.1f} GiB: leave them out of "
                "`parameters` or take fewer samples"
            )
        if not names:
            return
        for i, step in enumerate(steps):
            for name, grad in self.gradient(step, names)[1].items():
                capture.ready(name, range(i, i + 1), grad.flatten()[None])

    def gradient(
        self, step: StepSample, names: Sequence[str]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """log pi of one sample and its gradient by an ordinary pass through the whole model."""
        (piece,) = cut_chunks([step], 1, self.parts.device)
        inputs = [self.chosen[n] for n in names]
        with only_these_need_gradients(self.parts.whole, inputs):
            logprob = chunk_logprobs(self.parts, piece, self.temperature, self.context, whole=True)
            grads = torch.autograd.grad(logprob.sum(), inputs, allow_unused=True)
        pairs = zip(names, inputs, grads, strict=True)
        return float(logprob.detach()), {
            n: torch.zeros_like(p) if g is None else g for n, p, g in pairs
        }


def _plain_head(parts: LanguageModel, temperature: float, store: Store) -> Head | None:
    return Head(parts.head, temperature, store) if type(parts.head) is nn.Linear else None


def _check(
    run: _Run,
    steps: Sequence[StepSample],
    result: Gram,
    preconditioner: Mapping[str, torch.Tensor] | None,
) -> None:
    """ModelError when an ordinary backward pass says otherwise: of the shortest sample, where it is
    not one of a sure action, of whose gradient rounding leaves little."""
    squares_N = result.K_NN.diagonal()
    large = (squares_N >= squares_N.max() / 10).nonzero()[:, 0].tolist()
    shortest = min(large, key=lambda i: steps[i].length)
    logprob, grads = run.gradient(steps[shortest], result.parameters)
    square = 0.0
    for name, grad in grads.items():
        scale = 1.0 if preconditioner is None else preconditioner[name].to(grad)
        square += float((grad.double() ** 2 * scale).sum())
    ours = float(result.K_NN[shortest, shortest])
    dtype = next(iter(grads.values())).dtype
    exact = dtype in (torch.float32, torch.float64) and run.context is contextlib.nullcontext
    loose = 1e-3 if exact else 0.1
    unsure = max(abs(logprob), torch.finfo(dtype).tiny)  # about 1 - pi, which is what is rounded
    rounding = 16 * torch.finfo(dtype).eps / unsure
    if abs(logprob - float(result.logprobs_N[shortest])) > loose * max(1.0, abs(logprob)):
        raise ModelError(
            f"this model gives log pi {logprob:.4f} where its body and projection give "
            f"{float(result.logprobs_N[shortest]):.4f}; it treats its logits in a way that is not "
            "known here"
        )
    if abs(square - ours) > (loose + rounding) * max(square, 1e-8):
        raise ModelError(
            f"per-sample gradients of this model cannot be followed: |g|^2 of sample {shortest} "
            f"is {square:.4g}, found {ours:.4g}; choose fewer `parameters`"
        )


@contextlib.contextmanager
def _original_numbers(order: Sequence[int]) -> Iterator[None]:
    """Errors name samples by their place in the caller's list."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(error.name, order[error.position]) from error
