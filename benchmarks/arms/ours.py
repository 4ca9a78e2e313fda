"""The arm of this package: the pieces that the training loop uses."""

from __future__ import annotations

from pathlib import Path

import torch

from arms.machine import clock
from arms.world import ENDLESS, Count, Setting, Turn
from untwine.batch import policy_rows
from untwine.credit import credit_method
from untwine.envs.pool import EnvPool
from untwine.envs.registry import register_family
from untwine.policy.loading import load_policy
from untwine.training.update import Updater
from untwine.workshop import make_collector


def run(setting: Setting, model: Path, turn: Turn) -> None:
    recipe, now = setting.recipe(), clock(setting.threads)
    policy = load_policy(recipe.policy.model_copy(update={"model": str(model)}), tuple)
    generator = torch.Generator().manual_seed(setting.seed)
    credit = credit_method(recipe.credit.name, recipe.credit.options)
    register_family(ENDLESS, "arms.world:FAMILY")
    with EnvPool(ENDLESS, {}, workers=0, sessions=setting.episodes, timeout_s=60) as pool:
        collector = make_collector(policy, pool, recipe)
        updater = Updater.of_recipe(policy, recipe)
        for refs in setting.refs():
            turn.wait()
            started = now()
            groups, _ = collector.collect(refs, setting.group_size, generator)
            rolled = now()
            groups = [credit(group) for group in groups]
            updater.step(policy_rows(groups, recipe.loss.mean))
            ended = now()
            episodes = [episode for group in groups for episode in group.episodes]
            steps = [step for episode in episodes for step in episode.steps]
            turn.done(
                Count(
                    seconds=ended - started,
                    seconds_rollout=rolled - started,
                    episodes=len(episodes),
                    steps=len(steps),
                    sent=sum(step.command is not None for step in steps),
                    valid=sum(step.invalid is None for step in steps),
                    sampled=sum(len(step.action_ids) for step in steps),
                    tokens=sum(
                        len(e.steps[-1].prompt_ids) + len(e.steps[-1].action_ids) for e in episodes
                    ),
                )
            )
