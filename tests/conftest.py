"""Shared pieces: a really tiny policy, and hand-made episodes."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from untwine.config import PolicyConfig, TinyConfig
from untwine.policy.loading import Policy, load_policy

torch.set_num_threads(1)

TEXTS = [
    "go to kitchen",
    "open door to hallway",
    "You move to the kitchen. In it, you see: a counter, a cupboard, a red apple.",
    "Your task is to find a living thing and move it to the green box.",
    "focus on red apple",
] * 8


@pytest.fixture
def policy() -> Policy:
    """Two layers, grouped-query attention, tied embeddings; about 60 000 parameters."""
    tiny = TinyConfig(
        hidden_size=48, layers=2, heads=4, kv_heads=2, intermediate_size=96, vocab_size=400
    )
    return load_policy(PolicyConfig(model="tiny", tiny=tiny), lambda: TEXTS, seed=3)
