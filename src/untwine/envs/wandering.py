"""Experts that err: what a demonstrator does who now and then takes a wrong command, and recovers.

A cold start on faultless plans never shows what to do after a mistake, and leaves nothing to learn
by trying (docs/log.md).
"""

from __future__ import annotations

import random
from typing import NamedTuple

from untwine.envs.protocol import Planner

TOO_SOON = 0.5  # of the errors, how many are commands of the plan that come too soon


class Command(NamedTuple):
    """One command of an expert.

    expert   false where it errs on purpose
    off_plan an error after which a shortest plan is as long as before it, or longer
    """

    text: str
    expert: bool = True
    off_plan: bool = False


def wandering_plan(
    env: Planner, task: str, variation: int, noise: float, max_steps: int, seed: int = 0
) -> tuple[Command, ...] | None:
    """Solve an instance, erring with probability `noise` at each step; None when that fails, or
    takes more than `max_steps`.

    An error is either any command that is valid now, or a later command of the plan, come too soon
    and often invalid; never the one that is due. The expert then plans anew (`EnvInfo.replans`).
    Where there are too few steps left for a detour, it errs no more. The same arguments give the
    same commands where the environment is deterministic.
    """
    rng = random.Random(f"{seed}/{task}/{variation}")
    observation = env.reset(task, variation).observation
    taken: list[Command] = []
    plan = env.plan()
    while plan and not observation.done:
        wrong: list[str] = []
        if rng.random() < noise and len(taken) + 2 + len(plan) <= max_steps:
            choices = plan[1:] if len(plan) > 1 and rng.random() < TOO_SOON else env.admissible()
            wrong = [command for command in choices if command != plan[0]]
        if not wrong:
            taken.append(Command(plan[0]))
            observation, plan = env.step(plan[0]), plan[1:]
            continue
        error, left = rng.choice(wrong), len(plan)
        observation, plan = env.step(error), env.plan()
        taken.append(Command(error, expert=False, off_plan=plan is None or len(plan) >= left))
    solved = observation.success and 0 < len(taken) <= max_steps
    return tuple(taken) if solved else None
