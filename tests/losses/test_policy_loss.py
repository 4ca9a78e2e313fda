"""The policy loss against hand-worked values and enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from untwine.losses.policy import clipped_surrogate, entropy, k3, policy_loss


def surrogate(ratio: float, advantage: float) -> tuple[float, float]:
    """(loss, its derivative by the log-probability)."""
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = clipped_surrogate(logp, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.3).sum()
    (slope,) = torch.autograd.grad(loss, logp)
    return float(loss.detach()), float(slope)


def test_clipping_takes_the_pessimistic_side() -> None:
    assert surrogate(1.0, 2.0) == pytest.approx((-2.0, -2.0))
    assert surrogate(1.5, 1.0) == pytest.approx((-1.3, 0.0))  # good action, already raised enough
    assert surrogate(0.5, -1.0) == pytest.approx((0.8, 0.0))  # bad action, already lowered enough
    assert surrogate(1.5, -1.0) == pytest.approx((1.5, 1.5))  # bad action that rose: full gradient
    assert surrogate(0.5, 1.0) == pytest.approx((-0.5, -0.5))


def test_k3_is_unbiased_for_the_kl_divergence() -> None:
    pi = torch.tensor([0.5, 0.3, 0.2])
    ref = torch.tensor([0.2, 0.2, 0.6])
    exact = float((pi * (pi / ref).log()).sum())
    expected = float((pi * k3(pi.log(), ref.log())).sum())
    assert expected == pytest.approx(exact)
    assert bool((k3(pi.log(), ref.log()) >= 0).all())


def test_entropy_of_known_distributions() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]])
    assert entropy(logits).tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)


def test_what_is_measured_by_hand() -> None:
    """Ratios 1.5, 1 and .5: the outer two lie beyond the clips, with .2 + .5 of the weight."""
    logp = torch.tensor([1.5, 1.0, 0.5]).log()
    weights, spread = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, 2.0, 4.0])
    found = policy_loss(
        spread, logp, torch.zeros(3), torch.tensor([1.0, 1.0, -1.0]), weights, logp + 0.2,
        clip_low=0.2, clip_high=0.3, kl_weight=0.0, entropy_weight=0.0,
    )  # fmt: skip
    assert float(found.clip_fraction) == pytest.approx(0.7)
    assert float(found.ratio_max) == pytest.approx(1.5)
    assert float(found.entropy) == pytest.approx(0.2 + 0.6 + 2.0)
    assert float(found.kl) == pytest.approx(math.exp(0.2) - 1.2, rel=1e-4)


def test_terms_add_up_with_their_weights() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, requires_grad=True)
    logp = logits.log_softmax(-1)[:, 0]
    old, ref = logp.detach() - 0.1, logp.detach() + 0.2
    advantages, weights = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.2, 0.3, 0.5])
    result = policy_loss(
        entropy(logits), logp, old, advantages, weights, ref,
        clip_low=0.2, clip_high=0.2, kl_weight=0.7, entropy_weight=0.01,
    )  # fmt: skip
    by_hand = 0.0
    for i in range(3):
        ratio = math.exp(0.1)
        surrogate_i = -min(ratio * float(advantages[i]), min(ratio, 1.2) * float(advantages[i]))
        p = logits[i].detach().softmax(-1)
        spread = -float((p * p.log()).sum())
        by_hand += float(weights[i]) * (
            surrogate_i + 0.7 * (math.exp(0.2) - 0.2 - 1.0) - 0.01 * spread
        )
    assert float(result.loss.detach()) == pytest.approx(by_hand, rel=1e-5)
    assert float(result.clip_fraction) == 0.0
    assert float(result.ratio_max) == pytest.approx(math.exp(0.1))
