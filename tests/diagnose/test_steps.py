"""Predicted against measured changes, and the push of mean gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.diagnose.reference import gradients, logprob, small_model, small_samples
from tests.diagnose.test_coupling import adam_state
from untwine.diagnose.coupling import gram
from untwine.diagnose.parameters import adam_preconditioner
from untwine.diagnose.samples import StepSample
from untwine.diagnose.steps import check_prediction, mean_push, stepped
from untwine.errors import UntwineError


def weights_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def copies(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_small_step_does_what_was_predicted(optimizer: str) -> None:
    model, samples = small_model("qwen2", tie_word_embeddings=True), small_samples(8, narrow=True)
    scale = adam_preconditioner(model, adam_state(model)) if optimizer == "adam" else None
    weights, before = weights_of(8), copies(model)
    k = gram(model, samples, preconditioner=scale).K_NN
    found = check_prediction(model, samples, weights, k, preconditioner=scale, largest=1e-3)
    assert found.correlation > 0.999
    assert found.slope == pytest.approx(1.0, abs=0.02)
    assert float(found.predicted.abs().max()) == pytest.approx(1e-3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    wrong = check_prediction(model, samples, weights, k.flip(0), preconditioner=scale)
    assert wrong.correlation < 0.9


def test_with_adam_the_plain_gram_predicts_worse() -> None:
    model, samples = small_model("llama", tie_word_embeddings=True), small_samples(8)
    scale = adam_preconditioner(model, adam_state(model))
    weights = weights_of(8)
    right = gram(model, samples, preconditioner=scale).K_NN
    plain = gram(model, samples).K_NN
    good = check_prediction(model, samples, weights, right, preconditioner=scale, largest=1e-3)
    bad = check_prediction(model, samples, weights, plain, preconditioner=scale, largest=1e-3)
    assert good.correlation > bad.correlation
    assert good.correlation > 0.999


def test_weights_come_back_even_when_something_breaks() -> None:
    model = small_model("llama", tie_word_embeddings=True)
    before = copies(model)
    direction = {n: torch.ones_like(p) for n, p in model.named_parameters() if "norm" in n}

    def inside() -> None:
        with stepped(model, direction, 0.5):
            now = dict(model.named_parameters())
            assert torch.equal(now["model.norm.weight"], before["model.norm.weight"] + 0.5)
            other = "model.embed_tokens.weight"
            assert torch.equal(now[other], before[other])
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        inside()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_nothing_to_predict() -> None:
    model, samples = small_model("llama", tie_word_embeddings=True), small_samples(3)
    with pytest.raises(UntwineError, match="are all weights 0"):
        check_prediction(model, samples, torch.zeros(3), torch.eye(3, dtype=torch.float64))


def test_mean_push_is_the_mean_of_the_batches() -> None:
    model, probes = small_model("llama", tie_word_embeddings=False), small_samples(4, seed=8)
    batches: list[tuple[list[StepSample], torch.Tensor]] = [
        (small_samples(n, seed=n), weights_of(n, n)) for n in (3, 5, 4)
    ]
    names = [n for n, _ in model.named_parameters()]
    vectors = []
    for samples, weights in batches:
        grads = gradients(model, samples, names)
        flat = [torch.cat([g[n].flatten() for n in names]) for g in grads]
        vectors.append(sum(w * g for w, g in zip(weights.tolist(), flat, strict=True)))
    rows = torch.stack(vectors)
    at_probes = torch.stack(
        [torch.cat([g[n].flatten() for n in names]) for g in gradients(model, probes, names)]
    )
    found = mean_push(model, probes, batches, nulls=3, chunk=2)
    torch.testing.assert_close(found.push, at_probes @ rows.mean(0), rtol=1e-4, atol=1e-3)
    assert found.null.shape == (3, 4)
    assert not torch.equal(found.null[0], found.null[1])
    # E of products of different batches, over the mean square
    products = rows @ rows.T
    crossed = (products.sum() - products.trace()) / 6
    assert found.signal_share == pytest.approx(float(crossed / (products.trace() / 3)), rel=1e-3)


def test_mean_push_with_a_preconditioner_and_equal_weights() -> None:
    model, samples = small_model("llama", tie_word_embeddings=True), small_samples(4)
    scale = adam_preconditioner(model, adam_state(model))
    weights = torch.ones(4, dtype=torch.float64)
    found = mean_push(model, samples, [(samples, weights)], preconditioner=scale, nulls=1)
    k = gram(model, samples, preconditioner=scale).K_NN
    torch.testing.assert_close(found.push, k @ weights, rtol=1e-3, atol=1e-3 * float(k.max()))
    torch.testing.assert_close(found.null[0], found.push, rtol=1e-3, atol=1e-3 * float(k.max()))
    assert found.signal_share is None


def measured_change(
    model: Any, samples: list[StepSample], optimizer: torch.optim.Optimizer, weights: torch.Tensor
) -> torch.Tensor:
    """What one step of a real optimizer on -sum_j w_j log pi_j does to every log pi."""

    def values() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([logprob(model, s) for s in samples])

    before = values()
    optimizer.zero_grad()
    total = sum(w * logprob(model, s) for w, s in zip(weights.tolist(), samples, strict=True))
    (-total).backward()
    optimizer.step()
    return values() - before


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1])


def test_the_gram_predicts_a_real_step_of_sgd() -> None:
    model, samples = small_model("llama", tie_word_embeddings=True).eval(), small_samples(8)
    weights = weights_of(8)
    predicted = gram(model, samples).K_NN @ weights
    rate = 1e-3 / float(predicted.abs().max())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    measured = measured_change(model, samples, optimizer, weights)
    assert correlation(predicted, measured) > 0.99


def test_the_gram_predicts_a_real_step_of_adam() -> None:
    """Of Adam with its momentum, once that has come to point along the gradient."""
    model, samples = small_model("llama", tie_word_embeddings=True).eval(), small_samples(8)
    weights = weights_of(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    for seed in range(2):  # moments of other batches first
        measured_change(model, small_samples(8, seed + 50), optimizer, weights_of(8, seed + 1))
    for _ in range(30):
        measured_change(model, samples, optimizer, weights)
    scale = adam_preconditioner(model, optimizer)
    predicted = gram(model, samples, preconditioner=scale).K_NN @ weights
    plain = gram(model, samples).K_NN @ weights
    measured = measured_change(model, samples, optimizer, weights)
    assert correlation(predicted, measured) > 0.95
    assert correlation(plain, measured) < correlation(predicted, measured)
