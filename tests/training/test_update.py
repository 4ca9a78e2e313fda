"""Running out of memory: half the budget, nothing lost, nothing counted twice."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tests import exercises
from tests.exercises import plain_exercise
from untwine.batch import Row, _with_text, completion_row, distinct_tokens
from untwine.config import LossConfig, OptimizerConfig
from untwine.errors import UntwineError
from untwine.policy.loading import Policy
from untwine.scoring import Targets
from untwine.scoring import score as real_score
from untwine.training import update
from untwine.training.update import Measures, Updater


def updater(policy: Policy, budget: int) -> Updater:
    return Updater(
        policy,
        OptimizerConfig(lr=1e-12, grad_clip=1e9),
        LossConfig(kl=0.1, entropy=0.05),
        temperature=1.0,
        microbatch_tokens=budget,
    )


def policy_batch() -> list[Row]:
    rows = []
    for k in range(12):
        row = completion_row([5, 6, *range(20 + k, 28 + k)], [30 + k, 31], 1 / 12)
        advantage = torch.full((2,), (-1.0) ** k).numpy()
        rows.append(Row(row.ids, row.targets, row.weights, row.old_logprobs - 5, advantage))
    return rows


def verdict_batch() -> list[Row]:
    return [completion_row([5, 9, *range(40, 46 + k)], [7 + k % 2], 1 / 4) for k in range(4)]


def run(policy: Policy, budget: int) -> tuple[Measures, list[torch.Tensor], Updater]:
    worker = updater(policy, budget)
    measures = worker.step(policy_batch(), plain_exercise(policy, verdict_batch()), 0.7)
    return measures, [p.grad.clone() for p in policy.model.parameters()], worker


class ScarceMemory:
    """Scoring that fails like CUDA when more than `limit` distinct tokens come at once; with
    `in_backward`, only when the gradient flows back, after part of it has been added."""

    def __init__(self, limit: int, in_backward: bool = False) -> None:
        self.limit = limit
        self.in_backward = in_backward
        self.failures = 0

    def __call__(self, policy: Policy, rows: list[Row], *args: Any, **kwargs: Any) -> Targets:
        short = distinct_tokens(rows) > self.limit
        if short and not self.in_backward:
            self.fail()
        if short and torch.is_grad_enabled():
            embedding = policy.model.get_input_embeddings()
            hook = embedding.register_forward_hook(self.arm)
            try:
                return real_score(policy, rows, *args, **kwargs)
            finally:
                hook.remove()
        return real_score(policy, rows, *args, **kwargs)

    def arm(self, _module: Any, _inputs: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(self.fail)

    def fail(self, *_: Any) -> None:
        self.failures += 1
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("in_backward", [False, True])
def test_gradients_and_measures_are_those_of_enough_memory(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, in_backward: bool
) -> None:
    expected, gradients, _ = run(policy, 10_000)
    scarce = ScarceMemory(40, in_backward)
    monkeypatch.setattr(update, "score", scarce)
    monkeypatch.setattr(exercises, "score", scarce)
    with pytest.warns(UserWarning, match="out of memory with .* tokens at once"):
        measures, found, worker = run(policy, 10_000)
    assert worker.microbatch_tokens <= 40
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    for name in ("policy_loss", "kl", "entropy", "clip_fraction", "gcd_loss", "verdict_accuracy"):
        assert measures.values[name] == pytest.approx(expected.values[name], rel=1e-5, abs=1e-7)
    assert measures.values["out_of_memory"] == scarce.failures
    assert "out_of_memory" not in expected.values
    with_less = run(policy, worker.microbatch_tokens)[0]
    assert "out_of_memory" not in with_less.values


def test_a_gradient_kept_apart_is_not_counted_twice(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that ends while a second micro-batch is added to what the first has left."""

    asked = [completion_row([50 + k, 5, 6], [7 + k % 2], 1 / 6) for k in range(6)]

    def apart() -> tuple[list[torch.Tensor], Measures]:
        worker, found = updater(policy, 8), []  # two of the rows at once

        def accumulate(measures: Measures) -> None:
            exercise = plain_exercise(policy, asked)
            found[:] = worker.add_apart(policy_batch(), exercise, measures)

        return found, worker.gather(accumulate)

    class NoRoom:
        def __add__(self, other: torch.Tensor) -> torch.Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    real, calls = update.Aside.add, []

    def add(self: update.Aside, loss: torch.Tensor) -> None:
        calls.append(len(self.values))
        if len(calls) == 2:
            assert all(value is not None for value in self.values)
            self.values[len(self.values) // 2] = NoRoom()  # type: ignore[call-overload]
        real(self, loss)

    expected, _ = apart()
    monkeypatch.setattr(update.Aside, "add", add)
    with pytest.warns(UserWarning, match="out of memory"):
        found, measures = apart()
    assert len(calls) > 2
    assert measures.values["out_of_memory"] == 1
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_micro_batches_that_were_done_are_not_done_again(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, bool]] = []
    second = iter([False, True])

    def score(p: Policy, rows: list[Row], *args: Any, **kwargs: Any) -> Targets:
        fails = next(second, False)
        calls.append((len(rows), fails))
        if fails:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real_score(p, rows, *args, **kwargs)

    worker = updater(policy, 60)
    worker.reference = None
    monkeypatch.setattr(update, "score", score)
    with pytest.warns(UserWarning, match="out of memory"):
        worker.step(policy_batch())
    assert [fails for _, fails in calls[:2]] == [False, True]
    assert sum(n for n, fails in calls if not fails) == len(policy_batch())


def test_one_sequence_that_does_not_fit_is_said(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "score", ScarceMemory(3))
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(UntwineError, match="one sequence of 12 tokens does not fit"),
    ):
        updater(policy, 10_000).step(policy_batch())


def test_the_rate_warms_up_and_decays(policy: Policy) -> None:
    """Worked out by hand: four steps of warm-up, a tenth left after ten steps."""
    config = OptimizerConfig(lr=2.0, warmup=4, final=0.1)
    worker = Updater(
        policy, config, LossConfig(), temperature=1.0, microbatch_tokens=100, total_steps=10
    )
    rates = []
    for step in (0, 1, 3, 5, 10, 12):
        worker.steps = step
        rates.append(worker._learning_rate())
    assert rates == pytest.approx([0.5, 0.91, 1.46, 1.1, 0.2, 0.2])
    for p in policy.model.parameters():
        p.grad = torch.zeros_like(p)
    worker.steps = 1
    worker.take(worker.optimizer, 0.5)
    assert {group["lr"] for group in worker.optimizer.param_groups} == {0.455}


def test_gradients_are_clipped_and_their_norm_is_told(policy: Policy) -> None:
    worker = updater(policy, 10_000)
    free = worker.step(policy_batch()).values["grad_norm"]
    worker.config = worker.config.model_copy(update={"grad_clip": free / 4})
    assert worker.step(policy_batch()).values["grad_norm"] == pytest.approx(free, rel=1e-4)
    norm = torch.stack([p.grad.norm() for p in policy.model.parameters()]).norm()
    assert float(norm) == pytest.approx(free / 4, rel=1e-4)


def test_a_gradient_that_is_not_finite_changes_nothing(policy: Policy) -> None:
    before = [p.detach().clone() for p in policy.model.parameters()]
    rows = policy_batch()
    rows[3].advantages[:] = np.inf
    with pytest.raises(UntwineError, match="gradient is not finite after 0 optimizer steps"):
        updater(policy, 10_000).step(rows)
    assert all(map(torch.equal, policy.model.parameters(), before))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_decay(policy: Policy, name: str) -> None:
    config = OptimizerConfig(name=name, lr=0.1, weight_decay=0.5)
    worker = Updater(policy, config, LossConfig(), temperature=1.0, microbatch_tokens=10_000)
    before = [p.detach().clone() for p in policy.model.parameters()]
    for p in policy.model.parameters():
        p.grad = torch.zeros_like(p)
    worker.take(worker.optimizer)
    for p, old in zip(policy.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), 0.95 * old)


def test_imitation_is_a_weighted_mean(policy: Policy) -> None:
    """Loss and gradient against plain forward passes over each row alone."""
    weights = [[2.0, 2.0], [0.5], [1.0, 1.0, 3.0]]
    rows = []
    for k, own in enumerate(weights):
        made = completion_row([5, 6, *range(20 + k, 28)], list(range(30, 30 + len(own))), 1.0)
        rows.append(dataclasses.replace(made, weights=np.array(own), advantages=np.ones(len(own))))
    weighted, text_weight = len(rows), 0.1
    for k in range(2):  # all tokens of these are text but the last two
        made = completion_row([7, 8, *range(40 + k, 45)], [50, 51], 2.0)
        rows.append(_with_text(dataclasses.replace(made, advantages=np.ones(2)), text_weight))
    weights += [[1.0, 1.0], [1.0, 1.0]]
    worker = updater(policy, 100)
    measures = worker.imitate(rows, None, 0.0)
    found = [p.grad.clone() for p in policy.model.parameters()]

    policy.model.zero_grad()
    total, text = torch.zeros(()), torch.zeros(())
    count = sum(len(row.ids) - 3 for row in rows[weighted:])  # neither the first one nor the reply
    for row, own in zip(rows, weights, strict=True):
        ids = torch.from_numpy(row.ids)
        logprobs = policy.model(ids[None]).logits[0].log_softmax(-1)
        reply = row.targets.tolist()[-len(own) :]
        for position, weight in zip(reply, own, strict=True):
            total = total - weight * logprobs[position - 1, ids[position]] / 13.5
        for position in row.targets.tolist()[: -len(own)]:
            text = text - text_weight * logprobs[position - 1, ids[position]] / count
    (total + text).backward()
    assert text.item() > 0.1
    assert measures.values["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert measures.values["text_loss"] == pytest.approx(text.item(), rel=1e-5)
    for gradient, p in zip(found, policy.model.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)
