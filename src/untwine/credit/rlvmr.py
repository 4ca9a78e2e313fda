"""RLVMR: verifiable rewards for reasoning tags beside the outcome (Zhang et al., arXiv 2507.22844).

A = A_episode + weight * A_tag - penalty of replies that could not be read
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Literal

from untwine.credit.grpo import AboveZero, AtLeastZero, grpo
from untwine.prompting.tags import failures
from untwine.records import Episode, Group


def rlvmr(
    group: Group,
    weight: AtLeastZero = 1.0,
    normalise: Literal["std", "none"] = "std",
    refusal: AtLeastZero = 0.1,
    eps: AboveZero = 1e-6,
) -> list[list[float | None]]:
    """A = A_g + weight * (r - mean_tag r) / (std_tag r + eps), for a step of episode g whose tag
    earned r (`tag_rewards`).

    A_g is that of `grpo`. Mean and unbiased standard deviation are over all steps of the group with
    the same tag, so a tag is only compared with itself and using it pays nothing in itself;
    `normalise="none"` leaves out both standard deviations. A tag that occurs once in the group has
    nothing to be compared with, and gets 0 (the released code gives it its raw reward). Steps
    whose reply the parser refused have A_g - `refusal`; this penalty is in no mean, since it would
    cancel there. Without tags this is GRPO with that penalty.

    Returns G rows, one value per step.
    """
    rewards_GT = [tag_rewards(episode) for episode in group.episodes]
    by_tag: dict[str, list[float]] = defaultdict(list)
    for episode, rewards in zip(group.episodes, rewards_GT, strict=True):
        for step, reward in zip(episode.steps, rewards, strict=True):
            if step.command is not None and step.tag is not None:
                by_tag[step.tag].append(reward)
    scales = {tag: _mean_and_scale(found, normalise, eps) for tag, found in by_tag.items()}
    advantages_GT: list[list[float | None]] = []
    outcome_GT = grpo(group, normalise, eps)
    for episode, rewards, outcome in zip(group.episodes, rewards_GT, outcome_GT, strict=True):
        row: list[float | None] = []
        for step, reward, advantage in zip(episode.steps, rewards, outcome, strict=True):
            assert advantage is not None
            if step.command is None:
                advantage -= refusal
            elif step.tag is not None:
                mean, scale = scales[step.tag]
                advantage += weight * (reward - mean) / scale
            row.append(advantage)
        advantages_GT.append(row)
    return advantages_GT


def tag_rewards(episode: Episode) -> list[float]:
    """What the tag of each step earns, 0 or 1; a step that is not valid earns nothing.

    planning    the episode ends in success
    explore     a command that was not valid before in the episode, to a state it has not been in
    reflection  the step before came to nothing (prompting/tags.py, `failures`), and this one is
                another command that changes the state
    monitor     nothing

    The released code asks `explore` for a new command only, which naming things at random is; a new
    state alone is reached by waiting wherever time is part of it. Both are required here.
    """
    failed = failures(episode.steps)
    said: set[str] = set()
    seen = {step.state_key for step in episode.steps[:1]}
    rewards = []
    for t, step in enumerate(episode.steps):
        command = (step.command or "").lower()
        before = episode.steps[t - 1] if t else None
        earned = False
        if step.invalid is None:
            if step.tag == "planning":
                earned = episode.success
            elif step.tag == "explore":
                earned = command not in said and step.next_state_key not in seen
            elif step.tag == "reflection" and before is not None:
                other = command != (before.command or "").lower()
                earned = failed[t - 1] and other and step.next_state_key != step.state_key
        rewards.append(float(earned))
        if step.invalid is None:
            said.add(command)
        seen.add(step.next_state_key)
    return rewards


def _mean_and_scale(
    rewards: list[float], normalise: Literal["std", "none"], eps: float
) -> tuple[float, float]:
    """What a reward is compared with, and what the difference is divided by."""
    n = len(rewards)
    mean = math.fsum(rewards) / n
    if n == 1 or normalise == "none":
        return mean, 1.0
    return mean, math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (n - 1)) + eps
