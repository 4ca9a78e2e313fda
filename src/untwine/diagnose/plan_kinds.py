"""Action kinds that only an expert knows: whether a step brought the goal nearer.

The rules (gcd/labels.py) see what a command did at once. That it led away from the goal shows only
when plans before and after it are compared, so the recorded commands are given anew in the
environment, where it can plan from anywhere (`EnvInfo.replans`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from untwine.config import Recipe
from untwine.envs.protocol import EnvInfo
from untwine.errors import EnvError
from untwine.gcd.sources.expert import judge_by_plans
from untwine.progress import Display
from untwine.records import Episode
from untwine.workshop import open_pool

StepAt = tuple[int, str, int]  # iteration, episode id, index of the step


@dataclass(frozen=True, slots=True)
class PlanKinds:
    """kinds       expert (nearer), off_plan (no nearer) or lost (no plan any more), by step; a step
                that could not be repeated has none
    mismatches  episodes that could not be repeated to their end
    env_steps   commands given anew
    abstained   why no plan was asked for; empty where plans were
    """

    kinds: Mapping[StepAt, str] = field(default_factory=dict)
    mismatches: int = 0
    env_steps: int = 0
    abstained: str = ""


def plan_kinds(
    recipe: Recipe, info: EnvInfo, episodes: Mapping[int, Sequence[Episode]], display: Display
) -> PlanKinds:
    """What the environment's planner says of every step of these episodes, by iteration. Where it
    cannot be asked, the reason; never an error."""
    if not info.replans:
        return PlanKinds(abstained=f"{info.title} cannot plan from every state")
    kinds: dict[StepAt, str] = {}
    mismatches = env_steps = 0
    try:
        with (
            open_pool(recipe.env) as pool,
            display.bar("plans", len(episodes), "iteration") as bar,
        ):
            for done, (iteration, own) in enumerate(episodes.items()):
                rows, counts = judge_by_plans(pool, own)
                for episode, row in zip(own, rows, strict=True):
                    kinds |= {
                        (iteration, episode.id, t): label.kind
                        for t, label in enumerate(row)
                        if label is not None
                    }
                mismatches += int(counts["expert_mismatches"])
                env_steps += int(counts["label_env_steps"])
                bar.update(done + 1)
    except EnvError as error:
        return PlanKinds(abstained=str(error))
    return PlanKinds(kinds, mismatches, env_steps)
