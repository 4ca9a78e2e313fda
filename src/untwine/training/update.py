"""One optimizer step: L = L_policy + lambda * L_gcd, summed over micro-batches.

The loop, the cold start and the tests all go through `Updater`."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from untwine.batch import Row, microbatches, score
from untwine.config import LossConfig, OptimizerConfig
from untwine.errors import UntwineError
from untwine.gcd.verdicts import VerdictWords, verdict_loss
from untwine.losses.policy import policy_loss
from untwine.policy.loading import Policy


@dataclass(slots=True)
class Measures:
    """Sums over micro-batches; weights already make them means over the batch."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, **new: float | torch.Tensor) -> None:
        for name, value in new.items():
            self.values[name] = self.values.get(name, 0.0) + float(value)

    def top(self, name: str, value: float | torch.Tensor) -> None:
        self.values[name] = max(self.values.get(name, float("-inf")), float(value))


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
        """total_steps: optimizer steps of the whole stage, for the decay of the learning rate."""
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
        self.reference: Any = None
        if loss.kl > 0:
            self.reference = copy.deepcopy(policy.model).requires_grad_(False)

    def step(
        self, policy_rows: Sequence[Row], verdict_rows: Sequence[Row], verdict_weight: float
    ) -> Measures:
        """Accumulate both losses and take one optimizer step. Rows of either kind may be empty."""
        measures = Measures()
        self.optimizer.zero_grad(set_to_none=True)
        started = time.perf_counter()
        for rows in microbatches(policy_rows, self.microbatch_tokens):
            self._policy_backward(rows, measures)
        middle = time.perf_counter()
        self._verdict_backward(verdict_rows, verdict_weight, measures)
        measures.add(seconds_policy=middle - started, seconds_gcd=time.perf_counter() - middle)
        self._apply(measures)
        return measures

    def imitate(
        self, rows: Sequence[Row], verdict_rows: Sequence[Row], verdict_weight: float
    ) -> Measures:
        """One step of imitation: mean cross-entropy per token, plus the verdict loss.

        Tokens with an advantage are the expert's; the others are text (`imitation_rows`), whose
        mean cross-entropy is added with its weight.
        """
        measures = Measures()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = max(1, sum(int((row.advantages != 0).sum()) for row in rows))
        others = max(1, sum(len(row.targets) for row in rows) - tokens)
        for batch in microbatches(rows, self.microbatch_tokens):
            targets = score(self.policy, batch)
            acted_N = targets.advantages_N != 0
            loss = -targets.logprobs_N[acted_N].sum() / tokens
            text_N = -targets.logprobs_N * targets.weights_N * ~acted_N
            (loss + text_N.sum() / others).backward()  # type: ignore[no-untyped-call]
            right_N = targets.logits_NV.argmax(-1) == targets.ids_N
            measures.add(
                loss=loss.detach(),
                text_loss=text_N.sum().detach() / others,
                token_accuracy=(right_N & acted_N).sum() / tokens,
            )
        self._verdict_backward(verdict_rows, verdict_weight, measures)
        self._apply(measures)
        return measures

    def _policy_backward(self, rows: Sequence[Row], measures: Measures) -> None:
        reference = self._reference_logprobs(rows) if self.reference is not None else None
        targets = score(self.policy, rows, self.temperature)
        result = policy_loss(
            targets.logits_NV,
            targets.logprobs_N,
            targets.old_logprobs_N,
            targets.advantages_N,
            targets.weights_N,
            reference,
            clip_low=self.loss.clip_low,
            clip_high=self.loss.clip_high,
            kl_weight=self.loss.kl,
            entropy_weight=self.loss.entropy,
        )
        result.loss.backward()  # type: ignore[no-untyped-call]
        measures.add(
            policy_loss=result.loss.detach(),
            kl=result.kl,
            entropy=result.entropy,
            clip_fraction=result.clip_fraction,
        )
        measures.top("ratio_max", result.ratio_max)

    @torch.no_grad()
    def _reference_logprobs(self, rows: Sequence[Row]) -> torch.Tensor:
        trained, self.policy.model = self.policy.model, self.reference
        try:
            return score(self.policy, rows, self.temperature).logprobs_N
        finally:
            self.policy.model = trained

    def _verdict_backward(self, rows: Sequence[Row], weight: float, measures: Measures) -> None:
        if not rows:
            return
        right = 0
        for batch in microbatches(rows, self.microbatch_tokens):
            targets = score(self.policy, batch)
            loss = verdict_loss(targets)
            if weight > 0:
                (weight * loss).backward()  # type: ignore[no-untyped-call]
            right += self.words.correct(batch, targets)
            measures.add(gcd_loss=loss.detach(), gcd_tokens=sum(row.length for row in batch))
        measures.add(verdict_accuracy=right / len(rows))

    def _learning_rate(self) -> float:
        """Linear warm-up, then linear decay to the `final` share of the rate."""
        config = self.config
        warm = min(1.0, (self.steps + 1) / config.warmup) if config.warmup else 1.0
        progress = min(1.0, self.steps / self.total_steps) if self.total_steps else 0.0
        return config.lr * warm * (1.0 - (1.0 - config.final) * progress)

    def _apply(self, measures: Measures) -> None:
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
