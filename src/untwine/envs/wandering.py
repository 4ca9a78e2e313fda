"""Experts that err: what a demonstrator does who now and then takes a wrong command, and recovers.

A cold start on faultless plans never shows what to do after a mistake, and leaves nothing to learn
by trying (docs/log.md).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from untwine.envs.protocol import Planner, Searcher

STALE = 0.5  # of the errors, how many were valid before and are not now, where there are such


class Command(NamedTuple):
    """One command of an expert.

    expert   false where it errs on purpose
    off_plan an error after which a shortest plan is as long as before it, or longer
    chance   drawn from several that were as good: the first word is the expert's, the rest is luck
    """

    text: str
    expert: bool = True
    off_plan: bool = False
    chance: bool = False


def wandering_plan(
    env: Planner,
    task: str,
    variation: int,
    noise: float,
    max_steps: int,
    seed: int = 0,
    *,
    valid_only: bool = False,
    searching: bool = False,
) -> tuple[Command, ...] | None:
    """Solve an instance, erring with probability `noise` at each step; None when that fails, or
    takes more than `max_steps`.

    An error is any command that is valid now, except the one that is due, or, unless `valid_only`,
    one that was valid before and no longer is: neither tells where the plan goes. The expert then
    plans anew (`EnvInfo.replans`). Where there are too few steps left for a detour, it errs no
    more. When `searching`, it does not know what it has not read (`EnvInfo.searches`). The same
    arguments give the same commands where the environment is deterministic.
    """
    rng = random.Random(f"{seed}/{task}/{variation}")
    observation = env.reset(task, variation).observation
    taken: list[Command] = []
    read = [observation.text]
    known: dict[str, None] = {}  # every command that was valid at some step, in order
    plan = env.plan()
    while plan and not observation.done and len(taken) < max_steps:
        valid = env.admissible()
        known |= dict.fromkeys(valid)
        due = planned = plan[0]
        if searching:
            assert isinstance(env, Searcher)
            due = env.search(plan, read, [command.text for command in taken], rng)
        wrong: Sequence[str] = []
        if rng.random() < noise and len(taken) + 2 + len(plan) <= max_steps:
            stale = [] if valid_only else [c for c in known if c not in set(valid)]
            wrong = _errors(valid, due, stale, rng)
        said, left = rng.choice(wrong) if wrong else due, len(plan)
        observation = env.step(said)
        read.append(observation.text)
        plan = plan[1:] if said == plan[0] else env.plan()
        off_plan = bool(wrong) and (plan is None or len(plan) >= left)
        taken.append(Command(said, not wrong, off_plan, chance=not wrong and said != planned))
    return tuple(taken) if observation.success and taken else None


def _errors(
    valid: Sequence[str], due: str, stale: Sequence[str], rng: random.Random
) -> Sequence[str]:
    """The errors to draw one from: all of them valid, or none."""
    if stale and rng.random() < STALE:
        return stale
    return [command for command in valid if command != due]
