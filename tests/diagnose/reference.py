"""Small models of several families, and gradients by separate backward passes in float64."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from untwine.diagnose.samples import StepSample

VOCABULARY = 60
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def small_model(family: str, **extra: Any) -> Any:
    """A random model; biases and norms away from 0 and 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **extra}))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def small_samples(count: int, seed: int = 0, *, narrow: bool = False) -> list[StepSample]:
    """Samples of unequal lengths; with `narrow`, every other one has restricted and forced ids."""
    rng = random.Random(seed)
    samples = []
    for i in range(count):
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 11)))
        action = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 4)))
        allowed = None
        if narrow and i % 2:
            sets = [(t, (t + 7) % VOCABULARY, (t + 9) % VOCABULARY) for t in action]
            allowed = ((action[0],), *sets[1:-1], None)[-len(action) :] if len(action) > 1 else None
        samples.append(StepSample(prompt, action, allowed))
    return samples


def logprob(model: Any, sample: StepSample, temperature: float = 1.0) -> torch.Tensor:
    """log pi(a|s), token by token from the definition."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.action_ids]])
    logits_TV = model(input_ids=ids).logits[0] / temperature
    total = torch.zeros((), dtype=logits_TV.dtype)
    for k, token in enumerate(sample.action_ids):
        logits_V = logits_TV[len(sample.prompt_ids) + k - 1]
        allowed = sample.allowed[k] if sample.allowed else None
        pool = range(len(logits_V)) if allowed is None else allowed
        total = total + logits_V[token] - torch.logsumexp(logits_V[list(pool)], 0)
    return total


def gradients(
    model: Any, samples: list[StepSample], names: list[str], temperature: float = 1.0
) -> list[dict[str, torch.Tensor]]:
    """One ordinary backward pass per sample, in float64, on a copy of the model."""
    exact = copy.deepcopy(model).double().eval()
    chosen = dict(exact.named_parameters())
    found = []
    for sample in samples:
        exact.zero_grad()
        logprob(exact, sample, temperature).backward()
        found.append(
            {
                n: torch.zeros_like(chosen[n]) if chosen[n].grad is None else chosen[n].grad.clone()
                for n in names
            }
        )
    return found


def gram_of(
    grads: list[dict[str, torch.Tensor]], scale: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    rows = torch.zeros(len(grads), len(grads), dtype=torch.float64)
    for name in grads[0]:
        flat = torch.stack([g[name].flatten() for g in grads])
        weight = torch.ones_like(flat[0]) if scale is None else scale[name].flatten().double()
        rows += (flat * weight) @ flat.T
    return rows


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest |K - K'| / (|g_i| |g_j|)."""
    norms = reference.diagonal().sqrt()
    return float(((found - reference).abs() / (norms[:, None] * norms)).nan_to_num().max())


def trained(model: Any) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


class OddLayer(nn.Module):
    """A layer nobody knows: x * exp(a) + a."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a = nn.Parameter(0.1 * torch.randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.a.exp() + self.a
