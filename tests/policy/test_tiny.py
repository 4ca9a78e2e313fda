"""The preset `tiny`."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import TEXTS
from untwine.config import PolicyConfig, TinyConfig
from untwine.errors import ConfigError
from untwine.policy.loading import Policy, load_policy


def load(init: str, seed: int = 0) -> Policy:
    tiny = TinyConfig(
        hidden_size=32,
        layers=2,
        heads=2,
        kv_heads=2,
        vocab_size=300,
        init=init,  # type: ignore[arg-type]
    )
    return load_policy(PolicyConfig(model="tiny", tiny=tiny), lambda: TEXTS, seed)


def copies_attention(policy: Policy) -> float:
    """Share of the attention that tokens give, in the first layer, to earlier copies of
    themselves, relative to even attention; by hooks, on a text in which every token comes twice."""
    model = policy.model
    model.set_attn_implementation("eager")
    half = torch.arange(5, 37)
    ids = torch.cat([half, half[torch.randperm(32, generator=torch.Generator().manual_seed(0))]])
    with torch.no_grad():
        weights = model(input_ids=ids[None], output_attentions=True).attentions[0][0]
    later = torch.arange(32, 64)
    earlier = torch.tensor([int((half == i).nonzero()) for i in ids[32:]])
    return float((weights[:, later, earlier] * (later + 1)).mean())


def test_mimetic_attention_looks_for_copies_of_its_own_token() -> None:
    assert copies_attention(load("normal")) == pytest.approx(1.0, abs=0.1)
    assert copies_attention(load("mimetic")) > 2.0


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
