"""One optimizer step: L = L_policy + lambda * L_gcd, summed over micro-batches.

The loop, the cold start and the tests all go through `Updater`."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from untwine.batch import Row, distinct_tokens, microbatches
from untwine.config import LossConfig, OptimizerConfig
from untwine.errors import UntwineError
from untwine.gcd.verdicts import VerdictWords, verdict_loss
from untwine.losses.policy import policy_loss
from untwine.policy.loading import Policy
from untwine.policy.lora import without_lora
from untwine.scoring import score


@dataclass(slots=True)
class Measures:
    """Sums and maxima over micro-batches; weights already make the sums means over the batch."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        return {**self.sums, **self.maxima}

    def add(self, **new: float | torch.Tensor) -> None:
        for name, value in new.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def top(self, **new: float | torch.Tensor) -> None:
        for name, value in new.items():
            self.maxima[name] = max(self.maxima.get(name, float("-inf")), float(value))

    def join(self, other: Measures) -> None:
        self.add(**other.sums)
        self.top(**other.maxima)


Loss = Callable[[Sequence[Row], Measures], torch.Tensor]


class _Again(Exception):
    """The gradients gathered so far are spoilt."""


class Updater:
    """Holds the optimizer and, when a KL penalty is asked for, the reference model."""

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        words: VerdictWords,
        *,
        temperature: float,
        microbatch_tokens: int,
        total_steps: int = 0,
    ) -> None:
        """microbatch_tokens: distinct tokens per forward pass; halved when CUDA runs out of memory.
        total_steps: optimizer steps of the whole stage, for the decay of the learning rate."""
        self.policy = policy
        self.loss = loss
        self.words = words
        self.temperature = temperature
        self.microbatch_tokens = microbatch_tokens
        self.config = optimizer
        self.total_steps = total_steps
        self.steps = 0
        self._parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._parameters,
            lr=optimizer.lr,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
        )
        self._halvings = 0
        self.reference: Policy | None = None
        if loss.kl > 0:
            frozen = without_lora(policy.model).requires_grad_(False)
            self.reference = dataclasses.replace(policy, model=frozen)

    def step(
        self, policy_rows: Sequence[Row], verdict_rows: Sequence[Row], verdict_weight: float
    ) -> Measures:
        """Accumulate both losses and take one optimizer step. Rows of either kind may be empty."""

        def accumulate(measures: Measures) -> None:
            started = time.perf_counter()
            self._backward(policy_rows, self._policy_loss, measures)
            middle = time.perf_counter()
            self._verdicts(verdict_rows, verdict_weight, measures)
            measures.add(seconds_policy=middle - started, seconds_gcd=time.perf_counter() - middle)

        return self._apply(accumulate)

    def imitate(
        self, rows: Sequence[Row], verdict_rows: Sequence[Row], verdict_weight: float
    ) -> Measures:
        """One step of imitation: mean cross-entropy per token, plus the verdict loss.

        Tokens with an advantage are the expert's; the others are text (`imitation_rows`), whose
        mean cross-entropy is added with its weight.
        """
        tokens = max(1, sum(int((row.advantages != 0).sum()) for row in rows))
        others = max(1, sum(len(row.targets) for row in rows) - tokens)

        def imitation(batch: Sequence[Row], measures: Measures) -> torch.Tensor:
            targets = score(self.policy, batch)
            acted_N = targets.advantages_N != 0
            loss = -targets.logprobs_N[acted_N].sum() / tokens
            text_loss = (-targets.logprobs_N * targets.weights_N * ~acted_N).sum() / others
            right_N = targets.likeliest_N == targets.ids_N
            measures.add(
                loss=loss.detach(),
                text_loss=text_loss.detach(),
                token_accuracy=(right_N & acted_N).sum() / tokens,
            )
            return loss + text_loss

        def accumulate(measures: Measures) -> None:
            self._backward(rows, imitation, measures)
            self._verdicts(verdict_rows, verdict_weight, measures)

        return self._apply(accumulate)

    def _policy_loss(self, rows: Sequence[Row], measures: Measures) -> torch.Tensor:
        reference_N = None
        if self.reference is not None:
            with torch.no_grad():
                reference_N = score(self.reference, rows, self.temperature).logprobs_N
        targets = score(self.policy, rows, self.temperature, entropy_gradient=self.loss.entropy > 0)
        result = policy_loss(
            targets.entropies_N,
            targets.logprobs_N,
            targets.old_logprobs_N,
            targets.advantages_N,
            targets.weights_N,
            reference_N,
            clip_low=self.loss.clip_low,
            clip_high=self.loss.clip_high,
            kl_weight=self.loss.kl,
            entropy_weight=self.loss.entropy,
        )
        measures.add(
            policy_loss=result.loss.detach(),
            kl=result.kl,
            entropy=result.entropy,
            clip_fraction=result.clip_fraction,
            update_tokens=targets.computed_tokens,
        )
        measures.top(ratio_max=result.ratio_max)
        return result.loss

    def _verdicts(self, rows: Sequence[Row], weight: float, measures: Measures) -> None:
        def loss(batch: Sequence[Row], measures: Measures) -> torch.Tensor:
            with torch.set_grad_enabled(weight > 0):
                targets = score(self.policy, batch)
                loss = verdict_loss(targets)
            measures.add(
                gcd_loss=loss.detach(),
                gcd_tokens=sum(row.length for row in batch),
                verdict_accuracy=self.words.correct(batch, targets) / len(rows),
            )
            return weight * loss

        self._backward(rows, loss, measures)

    def _backward(self, rows: Sequence[Row], loss: Loss, measures: Measures) -> None:
        """Add the gradient of `loss` over all rows, one micro-batch after the other. When CUDA runs
        out of memory in a forward pass, what is left is split anew by half the budget; when it does
        in a backward pass, which may have added part of its gradient, all is done again."""
        waiting = list(microbatches(rows, self.microbatch_tokens))
        while waiting:
            found = Measures()
            value = None
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                value = loss(waiting[0], found)
            if value is None:  # the traceback no longer holds the tensors
                self._halve(waiting[0])
                left = [row for batch in waiting for row in batch]
                waiting = list(microbatches(left, self.microbatch_tokens))
                continue
            if value.requires_grad:
                try:
                    value.backward()  # type: ignore[no-untyped-call]
                except torch.cuda.OutOfMemoryError:
                    value = None
                if value is None:
                    self._halve(waiting[0])
                    raise _Again
            measures.join(found)
            del waiting[0]

    def _halve(self, batch: Sequence[Row]) -> None:
        size = distinct_tokens(batch)
        if len(batch) == 1:
            raise UntwineError(
                f"one sequence of {size} tokens does not fit into the memory of the GPU; set "
                "policy.gradient_checkpointing=true or policy.dtype=bfloat16, or lower "
                "prompt.max_tokens"
            )
        self.microbatch_tokens = max(1, min(self.microbatch_tokens, size) // 2)
        self._halvings += 1
        warnings.warn(
            f"out of memory with {size} tokens at once; going on with "
            f"rl.microbatch_tokens={self.microbatch_tokens}",
            stacklevel=2,
        )
        torch.cuda.empty_cache()

    def _learning_rate(self) -> float:
        """Linear warm-up, then linear decay to the `final` share of the rate."""
        config = self.config
        warm = min(1.0, (self.steps + 1) / config.warmup) if config.warmup else 1.0
        progress = min(1.0, self.steps / self.total_steps) if self.total_steps else 0.0
        return config.lr * warm * (1.0 - (1.0 - config.final) * progress)

    def _apply(self, accumulate: Callable[[Measures], None]) -> Measures:
        """Gather gradients and take the step."""
        before = self._halvings
        while True:
            measures = Measures()
            self.optimizer.zero_grad(set_to_none=True)
            try:
                accumulate(measures)
                break
            except _Again:
                continue
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.config.grad_clip)
        if not torch.isfinite(norm):
            raise UntwineError(
                f"the gradient is not finite after {self.steps} optimizer steps; lower the "
                "learning rate or use policy.dtype=float32 (the last checkpoint is intact)"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        self.steps += 1
        measures.add(grad_norm=norm)
        if self._halvings > before:
            measures.add(out_of_memory=self._halvings - before)
        return measures
