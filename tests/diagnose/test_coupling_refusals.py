"""What the Gram refuses: layers it does not know, weights used unseen, bad samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.diagnose.reference import (
    OddLayer,
    gradients,
    gram_of,
    relative_error,
    small_model,
    small_samples,
    trained,
)
from untwine.diagnose.coupling import gram
from untwine.diagnose.samples import StepSample
from untwine.diagnose.scoring import log_probabilities
from untwine.errors import ModelError, UntwineError


class _Kink(nn.Module):
    """silu whose gradient at exactly 0 is NaN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x) + 0 * x.abs().sqrt()


def test_unknown_layers_are_never_left_out() -> None:
    model, samples = small_model("llama", tie_word_embeddings=True), small_samples(6)
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), OddLayer(40))
    found = gram(model, samples, chunk=4)
    assert found.looped == ("model.layers.0.mlp.act_fn.1.a",)
    reference = gram_of(gradients(model, samples, trained(model)))
    assert relative_error(found.K_NN, reference) < 1e-5


def test_weights_used_behind_the_back_of_their_module_are_noticed() -> None:
    model, samples = small_model("llama", tie_word_embeddings=True), small_samples(4)
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(
        nn.functional.silu(mlp.gate_proj(x)) * nn.functional.linear(x, mlp.up_proj.weight)
    )
    with pytest.raises(ModelError, match="cannot be followed"):
        gram(model, samples)


def test_a_layer_used_twice_is_refused() -> None:
    model, samples = small_model("llama", tie_word_embeddings=True), small_samples(4)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ModelError, match=r"mlp.*used twice"):
        gram(model, samples)
    assert gram(model, samples, parameters=["*self_attn*"]).K_NN.shape == (4, 4)


def test_models_with_logits_of_their_own_are_refused() -> None:
    samples = small_samples(4)
    with pytest.raises(ModelError, match="treats its logits"):
        gram(small_model("granite", logits_scaling=8.0), samples)
    with pytest.raises(ModelError, match="no causal language model"):
        gram(nn.Linear(3, 3), samples)


def test_bad_samples() -> None:
    model, samples = small_model("llama", tie_word_embeddings=True), small_samples(4)
    with pytest.raises(UntwineError, match="at least two samples"):
        gram(model, samples[:1])
    with pytest.raises(UntwineError, match="at least one prompt id"):
        gram(model, [([], [3]), ([4], [5])])
    with pytest.raises(UntwineError, match="not among the ids allowed"):
        StepSample((1, 2), (3,), ((4, 5),))
    with pytest.raises(UntwineError, match="2 action ids but `allowed` has 1"):
        StepSample((1, 2), (3, 4), ((3,),))


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model, samples = small_model("llama", tie_word_embeddings=False), small_samples(5)
    assert not any(59 in s.prompt_ids for s in samples)
    samples.insert(2, StepSample((59, 59), (3,)))
    model.model.embed_tokens.weight.data[59] = 0
    model.model.layers[0].mlp.act_fn = _Kink()
    assert log_probabilities(model, samples).isfinite().all()
    with pytest.raises(UntwineError, match=r"sample 2 in model\.layers\.0.* is not finite"):
        gram(model, samples)
    model.model.embed_tokens.weight.data[59] = torch.nan
    with pytest.raises(UntwineError, match=r"log pi of sample 2 is not finite"):
        gram(model, samples)


@pytest.mark.parametrize("others", [0, 3])
def test_gradients_of_sure_actions_are_mostly_rounding(others: int) -> None:
    """Where pi is near 1 the gradient is near 0, and float32 leaves few digits of it: nothing that
    a model would be refused for, with unsure actions beside or without."""
    model = small_model("llama", tie_word_embeddings=False)
    model.lm_head.weight.data *= 30
    sure = []
    for seed in range(200):
        (drawn,) = small_samples(1, seed=seed)
        with torch.no_grad():
            logits_V = model(input_ids=torch.tensor([drawn.prompt_ids])).logits[0, -1]
        if 1e-5 < -logits_V.log_softmax(-1).max() < 1e-4:
            sure.append(StepSample(drawn.prompt_ids, (int(logits_V.argmax()),)))
    samples = [*sure[:6], *small_samples(others, seed=1)]
    assert len(samples) == 6 + others
    exact = gradients(model, samples, trained(model))
    found = gram(model, samples)
    assert (found.logprobs_N[:6] > -1e-4).all()
    assert relative_error(found.K_NN, gram_of(exact)) < 0.05
