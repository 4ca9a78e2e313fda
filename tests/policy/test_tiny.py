"""The preset `tiny`."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from tests.conftest import TEXTS
from untwine.config import PolicyConfig, TinyConfig
from untwine.errors import ConfigError
from untwine.policy.loading import Policy, load_policy


def load(init: Literal["normal", "mimetic"], seed: int = 0, head_dim: int = 0) -> Policy:
    tiny = TinyConfig(
        hidden_size=64,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=head_dim,
        vocab_size=300,
        init=init,
    )
    return load_policy(PolicyConfig(model="tiny", tiny=tiny), lambda: TEXTS, seed)


def attention(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    """What the heads of the first layer look at, (heads, query, key)."""
    policy.model.set_attn_implementation("eager")
    with torch.no_grad():
        found = policy.model(input_ids=ids[None], output_attentions=True)
    weights: torch.Tensor = found.attentions[0][0]
    return weights


def twice() -> tuple[torch.Tensor, torch.Tensor]:
    """A text in which every token comes twice, and where each was before."""
    half = torch.arange(5, 37)
    ids = torch.cat([half, half[torch.randperm(32, generator=torch.Generator().manual_seed(0))]])
    return ids, torch.tensor([int((half == i).nonzero()) for i in ids[32:]])


def copies_attention(policy: Policy) -> float:
    """Share of the attention that tokens give to earlier copies of themselves, relative to even
    attention, in the last two heads of the first layer."""
    ids, earlier = twice()
    later = torch.arange(32, 64)
    return float((attention(policy, ids)[2:, later, earlier] * (later + 1)).mean())


def test_mimetic_attention_looks_for_copies_of_its_own_token() -> None:
    assert copies_attention(load("normal")) == pytest.approx(1.0, abs=0.1)
    assert copies_attention(load("mimetic")) > 2.0


def test_mimetic_heads_of_the_first_layer_look_back() -> None:
    """Everywhere in a long text, and whatever the tokens are."""
    ids = torch.randint(5, 250, (300,), generator=torch.Generator().manual_seed(1))
    for back, weights in enumerate(attention(load("mimetic"), ids)[:2], 1):
        before = weights.diagonal(-back)[20:]
        assert float(before.mean()) > 0.4
        most = weights[20 + back :].argmax(-1)
        assert float((most == torch.arange(20, 300 - back)).float().mean()) > 0.8


def test_the_same_seed_gives_the_same_weights() -> None:
    first, again, other = (load("mimetic", seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(
        first["model.layers.0.self_attn.q_proj.weight"],
        other["model.layers.0.self_attn.q_proj.weight"],
    )


def test_grouped_queries_are_refused() -> None:
    from untwine.config import make_recipe

    tiny = {"heads": 4, "kv_heads": 2, "hidden_size": 32, "init": "mimetic"}
    with pytest.raises(ConfigError, match="as many kv_heads as heads"):
        make_recipe({"policy": {"tiny": tiny}})
