"""One optimizer step: L = L_policy + lambda * L_gcd, summed over micro-batches.

The loop, the cold start and the tests all go through `Updater`. How the two losses are joined
(lambda fixed, held to a ratio of gradient norms, or a step of its own for L_gcd) is in mixing.py.
Where questions follow the rows of the policy loss, both losses are read off one forward pass; their
sum has one backward pass, and two gradients that are to be kept apart have one each.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from untwine.batch import Row, distinct_tokens, halved, microbatches, split_again
from untwine.config import GCDConfig, LossConfig, OptimizerConfig, Recipe
from untwine.errors import CheckpointError, UntwineError
from untwine.gcd.entering import closed_parameters
from untwine.gcd.objectives import Exercise
from untwine.losses.policy import policy_loss
from untwine.policy.loading import Policy
from untwine.policy.lora import without_lora
from untwine.scoring import Targets, score
from untwine.training.checkpoint import fill_optimizer, optimizer_tensors
from untwine.training.measures import Measures
from untwine.training.mixing import Mixing, make_mixing
from untwine.training.optimizers import make_optimizer

Loss = Callable[[Sequence[Row], Measures], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Reading:
    """A loss that is read off scored rows, and how they are to be scored."""

    loss: Callable[[Sequence[Row], Targets, Measures], torch.Tensor]
    temperature: float = 1.0
    entropies: bool = True


def _follow(asked: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Whether most of what questions read is the beginning of other rows."""
    alone = distinct_tokens(asked)
    return distinct_tokens([*rows, *asked]) - distinct_tokens(rows) < alone / 2


class _Again(Exception):
    """The gradients gathered so far are spoilt."""


class _Spoilt(Exception):
    """Memory ran out when a part of a gradient had been added."""


def _clock(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Aside:
    """The gradient of a loss, kept apart from what `.grad` holds.

    values   one for each of `parameters`; None where nothing came
    seconds  that its backward passes took
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.values: list[torch.Tensor | None] = [None] * len(self.parameters)
        self.seconds = 0.0

    def add(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, whose graph is kept for another backward pass."""
        if not loss.requires_grad:  # nothing to learn from these rows
            return
        started = _clock(loss.device)
        found = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        try:
            for k, new in enumerate(found):
                if new is not None:
                    before = self.values[k]
                    self.values[k] = new if before is None else before + new
        except torch.cuda.OutOfMemoryError:
            raise _Spoilt from None
        self.seconds += _clock(loss.device) - started


class Updater:
    """Holds the optimizers and, when a KL penalty is asked for, the reference model.

    parameters  all that is trained: the policy's, and after them those of the objective
    acting      how many of them are the policy's
    everywhere  whether the verdict loss changes all of them
    own         the optimizer of the verdict loss, when it takes steps of its own
    norm_quotient  |g_policy| / |g_gcd| as last measured, where it is held between measurements
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        *,
        temperature: float,
        microbatch_tokens: int,
        total_steps: int = 0,
        gcd: GCDConfig | None = None,
        module: torch.nn.Module | None = None,
    ) -> None:
        """microbatch_tokens: distinct tokens per forward pass; halved when CUDA runs out of memory.
        total_steps: optimizer steps of the whole stage, for the decay of the learning rate.
        gcd: how the verdict loss is joined; by default with a fixed weight, into all weights.
        module: weights of the objective itself."""
        self.policy = policy
        self.loss = loss
        self.temperature = temperature
        self.microbatch_tokens = microbatch_tokens
        self.config = optimizer
        self.total_steps = total_steps
        self.steps = 0
        gcd = gcd or GCDConfig()
        self.module = module
        shut = set(map(id, closed_parameters(policy, gcd.gradient, gcd.from_layer)))
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        extra = [] if module is None else list(module.parameters())
        self.parameters = [*trained, *extra]
        self.acting = len(trained)
        self.everywhere = not shut
        self._open = [p for p in self.parameters if id(p) not in shut]
        main = trained if gcd.step == "own" else self.parameters
        self.optimizer = make_optimizer(optimizer, policy, main)
        self.own: torch.optim.Optimizer | None = None
        if gcd.step == "own":
            self.own = make_optimizer(optimizer, policy, self._open)
        self.norm_quotient: float | None = None
        self._mixing: Mixing = make_mixing(gcd)
        self._halvings = 0
        self.reference: Policy | None = None
        if loss.kl > 0:
            frozen = without_lora(policy.model).requires_grad_(False)
            self.reference = dataclasses.replace(policy, model=frozen)

    @classmethod
    def of_recipe(
        cls,
        policy: Policy,
        recipe: Recipe,
        *,
        optimizer: OptimizerConfig | None = None,
        loss: LossConfig | None = None,
        total_steps: int = 0,
        gcd: GCDConfig | None = None,
        module: torch.nn.Module | None = None,
    ) -> Updater:
        """As the recipe's iterations update, unless another `optimizer` or `loss` is given."""
        return cls(
            policy,
            optimizer or recipe.rl.optimizer,
            loss or recipe.loss,
            temperature=recipe.sampling.temperature,
            microbatch_tokens=recipe.rl.microbatch_tokens,
            total_steps=total_steps,
            gcd=gcd,
            module=module,
        )

    def step(
        self,
        policy_rows: Sequence[Row],
        exercise: Exercise | None = None,
        verdict_weight: float = 0.0,
    ) -> Measures:
        """Take the optimizer step (or steps) of both losses. Either may have no rows."""
        measures = self._mixing(self, policy_rows, exercise, verdict_weight)
        self.steps += 1
        return measures

    def _add(self, rows: Sequence[Row], reading: Reading, measures: Measures) -> None:
        def loss(batch: Sequence[Row], measures: Measures) -> torch.Tensor:
            return reading.loss(batch, self._score(batch, reading), measures)

        started = _clock(self.policy.device)
        self._backward(rows, loss, measures)
        measures.add(seconds_policy=_clock(self.policy.device) - started)

    def _score(self, rows: Sequence[Row], reading: Reading) -> Targets:
        return score(
            self.policy,
            rows,
            reading.temperature,
            entropies=reading.entropies,
            entropy_gradient=reading.entropies and self.loss.entropy > 0,
        )

    def _add_verdicts(
        self, exercise: Exercise, weight: float, measures: Measures, aside: Aside | None
    ) -> None:
        """Add `weight` times the gradient of the verdict loss, or its plain gradient `aside`. With
        weight 0 the loss is only measured."""
        started = _clock(self.policy.device)

        def loss(batch: Sequence[Row], measures: Measures) -> torch.Tensor:
            with torch.set_grad_enabled(weight > 0 or aside is not None):
                value, found = exercise.loss(batch)
            measures.add(
                gcd_loss=value.detach(),
                gcd_tokens=sum(row.length for row in batch),
                gcd_update_tokens=distinct_tokens(batch),
                **found,
            )
            if aside is None:
                return weight * value
            aside.add(value)
            return value.detach()

        self._backward(exercise.rows, loss, measures)
        measures.add(seconds_gcd=_clock(self.policy.device) - started)

    def extra_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint must hold beside policy and main optimizer, by name."""
        extra = {}
        if self.norm_quotient is not None:
            quotient = torch.tensor(self.norm_quotient, dtype=torch.float64)
            extra["gcd_norms"] = {"quotient": quotient}
        if self.own is not None:
            extra["gcd_optimizer"] = optimizer_tensors(self.own)
        if self.module is not None:
            extra["gcd_module"] = {k: v.contiguous() for k, v in self.module.state_dict().items()}
        return extra

    def load_extra_state(self, extra: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take up what `extra_state` gave; what is missing starts anew. CheckpointError for weights
        of another objective."""
        held = extra.get("gcd_module", {})
        own = {} if self.module is None else self.module.state_dict()
        if held and {k: v.shape for k, v in held.items()} != {k: v.shape for k, v in own.items()}:
            raise CheckpointError(
                "the checkpoint holds weights of another objective; resume with the gcd.objective "
                "that made it"
            )
        if self.own is not None and "gcd_optimizer" in extra:
            fill_optimizer(self.own, extra["gcd_optimizer"])
        if "gcd_norms" in extra:
            self.norm_quotient = float(extra["gcd_norms"]["quotient"])
        if self.module is not None and "gcd_module" in extra:
            self.module.load_state_dict(extra["gcd_module"])

    def imitate(
        self, rows: Sequence[Row], exercise: Exercise | None, verdict_weight: float
    ) -> Measures:
        """One step of imitation: weighted mean cross-entropy per token, plus the verdict loss.

        Tokens with an advantage are the expert's; the others are text (`imitation_rows`), whose
        mean cross-entropy is added with its weight.
        """
        tokens = max(1, sum(int((row.advantages != 0).sum()) for row in rows))
        weight = sum(float(row.weights[row.advantages != 0].sum()) for row in rows) or 1.0
        others = max(1, sum(len(row.targets) for row in rows) - tokens)

        def imitation(batch: Sequence[Row], targets: Targets, measures: Measures) -> torch.Tensor:
            acted_N = targets.advantages_N != 0
            loss = -(targets.logprobs_N * targets.weights_N)[acted_N].sum() / weight
            text_loss = (-targets.logprobs_N * targets.weights_N * ~acted_N).sum() / others
            right_N = targets.likeliest_N == targets.ids_N
            measures.add(
                loss=loss.detach(),
                text_loss=text_loss.detach(),
                token_accuracy=(right_N & acted_N).sum() / tokens,
                imitation_tokens=sum(row.length for row in batch),
            )
            return loss + text_loss

        reading = Reading(imitation, entropies=False)
        measures = self.apply(
            lambda found: self._add_both(rows, reading, exercise, verdict_weight, found)
        )
        self.steps += 1
        return measures

    def add_both(
        self, rows: Sequence[Row], exercise: Exercise | None, weight: float, measures: Measures
    ) -> None:
        """Add the gradients of the policy loss and of `weight` times the verdict loss."""
        self._add_both(rows, self._policy_reading, exercise, weight, measures)

    def add_apart(
        self, rows: Sequence[Row], exercise: Exercise | None, measures: Measures
    ) -> list[torch.Tensor | None]:
        """Add the gradient of the policy loss; that of the verdict loss, where it may enter, is
        returned, one for each of `parameters`."""
        aside = Aside(self._open)
        self._add_both(rows, self._policy_reading, exercise, 0.0, measures, aside)
        found = dict(zip(map(id, aside.parameters), aside.values, strict=True))
        return [found.get(id(p)) for p in self.parameters]

    def _add_both(
        self,
        rows: Sequence[Row],
        reading: Reading,
        exercise: Exercise | None,
        weight: float,
        measures: Measures,
        aside: Aside | None = None,
    ) -> None:
        """In one pass where questions follow the rows, and both losses can be read from it; what it
        took is then divided by tokens, but for backward passes of the verdict loss alone. With
        `aside` its gradient goes there, and `weight` is not used."""
        asked = exercise.rows if exercise else []
        read = exercise.read if exercise else None
        wanted = weight > 0 or aside is not None
        if not read or not wanted or reading.temperature != 1.0 or not _follow(asked, rows):
            self._add(rows, reading, measures)
            if exercise is not None:
                self._add_verdicts(exercise, weight, measures, aside)
            return
        questions = set(map(id, asked))

        def loss(batch: Sequence[Row], measures: Measures) -> torch.Tensor:
            own = [row for row in batch if id(row) not in questions]
            others = [row for row in batch if id(row) in questions]
            targets = self._score([*own, *others], reading)
            first, second = targets.split(sum(len(row.targets) for row in own))
            added = distinct_tokens(batch) - distinct_tokens(own)
            tokens = targets.computed_tokens - added  # of the policy's rows
            value = torch.zeros((), device=self.policy.device)
            if own:
                value = value + reading.loss(
                    own, dataclasses.replace(first, computed_tokens=tokens), measures
                )
            if others:
                answers, found = read(others, second)
                if aside is None:
                    value = value + weight * answers
                else:
                    aside.add(answers)
                measures.add(gcd_loss=answers.detach(), **found)
            measures.add(gcd_tokens=added, gcd_update_tokens=added, both=tokens + added)
            return value

        started = _clock(self.policy.device)
        found = Measures()
        self._backward([*rows, *asked], loss, found)
        seconds = _clock(self.policy.device) - started
        share = found.sums["gcd_tokens"] / found.sums.pop("both")
        alone = aside.seconds if aside else 0.0
        policy = (1 - share) * (seconds - alone)
        found.add(seconds_policy=policy, seconds_gcd=seconds - policy)
        measures.join(found)

    @property
    def _policy_reading(self) -> Reading:
        return Reading(self._policy_loss, self.temperature)

    def _policy_loss(
        self, rows: Sequence[Row], targets: Targets, measures: Measures
    ) -> torch.Tensor:
        reference_N = None
        if self.reference is not None:
            with torch.no_grad():
                frozen = score(self.reference, rows, self.temperature, entropies=False)
                reference_N = frozen.logprobs_N
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

    def _backward(self, rows: Sequence[Row], loss: Loss, measures: Measures) -> None:
        """Add the gradient of `loss` over all rows, one micro-batch after the other. When CUDA runs
        out of memory in a forward pass, what is left is split anew by half the budget; when it does
        in a backward pass, which may have added part of its gradient, all is done again."""
        waiting = list(microbatches(rows, self.microbatch_tokens))
        while waiting:
            found = Measures()
            value = None
            spoilt = False
            try:
                value = loss(waiting[0], found)
            except torch.cuda.OutOfMemoryError:
                pass
            except _Spoilt:
                spoilt = True
            if value is None:  # the traceback no longer holds the tensors
                self._halve(waiting[0])
                if spoilt:
                    raise _Again
                waiting = split_again(waiting, self.microbatch_tokens)
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
        self.microbatch_tokens = halved(self.microbatch_tokens, batch)
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

    def apply(self, accumulate: Callable[[Measures], None]) -> Measures:
        """Gather gradients and take a step of the main optimizer."""
        measures = self.gather(accumulate)
        measures.add(grad_norm=self.take(self.optimizer))
        return measures

    def gather(self, accumulate: Callable[[Measures], None]) -> Measures:
        """Gather gradients, beginning with none."""
        before = self._halvings
        while True:
            measures = Measures()
            for p in self.parameters:
                p.grad = None
            try:
                accumulate(measures)
                break
            except _Again:
                continue
        if self._halvings > before:
            measures.add(out_of_memory=self._halvings - before)
        return measures

    def take(self, optimizer: torch.optim.Optimizer, scale: float = 1.0) -> float:
        """Take a step on the gradients, with `scale` times the learning rate; their norm before
        they were clipped."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        if not torch.isfinite(norm):
            raise UntwineError(
                f"the gradient is not finite after {self.steps} optimizer steps; lower the "
                "learning rate or use policy.dtype=float32 (the last checkpoint is intact)"
            )
        for group in optimizer.param_groups:
            group["lr"] = scale * self._learning_rate()
        optimizer.step()
        return float(norm)
