"""From task instances to groups of episodes, with a real policy in a real environment."""

from __future__ import annotations

import torch

from untwine.config import Recipe
from untwine.progress import Display
from untwine.records import Group
from untwine.rollout import RolloutStats
from untwine.workshop import Workshop


def collected(**sections: object) -> tuple[list[Group], RolloutStats]:
    recipe = Recipe.model_validate(
        {
            "env": {"name": "rooms", "tasks": ["fetch"], "variations": 3, "max_steps": 6},
            "policy": {
                "model": "tiny",
                "threads": 1,
                "tiny": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2},
            },
            **sections,
        }
    )
    with Workshop(recipe, Display(quiet=True)) as workshop:
        return workshop.collector.collect(workshop.refs, 4, torch.Generator().manual_seed(0))


def test_a_constrained_policy_says_admissible_commands_only() -> None:
    groups, stats = collected(sampling={"constrained": True, "max_new_tokens": 1})
    steps = [step for group in groups for episode in group.episodes for step in episode.steps]
    assert len({step.command for step in steps}) > 5
    for step in steps:
        assert step.admissible is not None
        assert step.command in step.admissible
        assert step.invalid is None
        assert step.allowed is not None
        for token, among, logprob in zip(step.action_ids, step.allowed, step.logprobs, strict=True):
            assert token in among
            assert (logprob == 0.0) == (len(among) == 1)
    assert stats.env_steps == len(steps)


def test_an_unconstrained_policy_from_scratch_says_what_nobody_understands() -> None:
    groups, _ = collected()
    steps = [step for group in groups for episode in group.episodes for step in episode.steps]
    assert all(step.allowed is None for step in steps)
    assert sum(step.invalid is not None for step in steps) > len(steps) / 2
