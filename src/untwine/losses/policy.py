"""The policy loss: clipped surrogate, KL penalty, entropy bonus. All terms are weighted sums over
the N trained tokens; the weights carry the loss mean (batch.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """loss is differentiable; the rest are detached measures weighted like the loss."""

    loss: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    clip_fraction: torch.Tensor
    ratio_max: torch.Tensor


def clipped_surrogate(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) of each token, r = pi / pi_old
    (Schulman et al., arXiv 1707.06347, eq. 7; two bounds as in DAPO, arXiv 2503.14476)."""
    ratio = (logprobs_N - old_logprobs_N).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantages_N, clipped * advantages_N)


def k3(logprobs_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """Unbiased, non-negative estimate of KL(pi || ref) for tokens drawn from pi:
    exp(ref - pi) - (ref - pi) - 1 (Schulman, "Approximating KL divergence", 2020)."""
    gap = reference_N - logprobs_N
    return gap.exp() - gap - 1.0


def entropy(logits_NV: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each row of logits, shape (N,); logits may be -inf."""
    logprobs = logits_NV.log_softmax(-1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)


def policy_loss(
    entropies_N: torch.Tensor,
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    weights_N: torch.Tensor,
    reference_N: torch.Tensor | None,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    entropy_weight: float,
) -> PolicyLoss:
    """sum_i w_i (surrogate_i + kl_weight * k3_i - entropy_weight * H_i)."""
    surrogate_N = clipped_surrogate(logprobs_N, old_logprobs_N, advantages_N, clip_low, clip_high)
    loss = (weights_N * surrogate_N).sum()
    kl = torch.zeros((), device=loss.device)
    if reference_N is not None:
        kl = (weights_N * k3(logprobs_N, reference_N)).sum()
        loss = loss + kl_weight * kl
    spread = (weights_N * entropies_N).sum()
    if entropy_weight > 0:
        loss = loss - entropy_weight * spread
    ratio = (logprobs_N - old_logprobs_N).exp().detach()
    outside = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)
    return PolicyLoss(
        loss=loss,
        kl=kl.detach(),
        entropy=spread.detach(),
        clip_fraction=(weights_N * outside).sum(),
        ratio_max=ratio.max(),
    )
