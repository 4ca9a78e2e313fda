"""What an expert thinks of each state that an episode passed through."""

from __future__ import annotations

import random
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

from untwine.envs.protocol import Planner, Searcher

KnownPlans = MutableMapping[tuple[str, int, str], "tuple[str, ...] | None"]


class Advice(NamedTuple):
    """An expert's view of one state.

    state_key  of the state
    left       commands of a shortest plan from here; None: there is none
    due        the command an expert that searches would give (`EnvInfo.searches`), or None
    lucky      it is one of several that are as good: any that begins with the same word and was not
               given before
    """

    state_key: str
    left: int | None
    due: str | None = None
    lucky: bool = False


def helps(command: str, before: Advice, left: int | None, fresh: bool) -> bool | None:
    """Whether a command is good, of which `left` commands of a shortest plan were left after it;
    None: not known.

    Where the expert searches, the command it would give is good, and so is any other that begins
    alike where its choice is luck, if it is `fresh`: allowed, and not given before. Another command
    that brings the goal nearer is luck, and not known to be good.
    """
    nearer = before.left is not None and left is not None and left < before.left
    if before.due is None:
        return nearer
    command, due = command.lower(), before.due.lower()
    if command == due or (before.lucky and fresh and command.split()[:1] == due.split()[:1]):
        return True
    return None if nearer else False


def advice_along(
    env: Planner,
    task: str,
    variation: int,
    commands: Sequence[str],
    known: KnownPlans,
    *,
    searching: bool = False,
    seed: int = 0,
) -> tuple[Advice, ...]:
    """Advice in the first state and after each command; it ends where the environment is done.

    known  plans by task, variation and state key; equal keys are equal situations, so each is made
           once
    """
    rng = random.Random(f"{seed}/{task}/{variation}")
    observation = env.reset(task, variation).observation
    read = [observation.text]
    found: list[Advice] = []
    for number in range(len(commands) + 1):
        key = (task, variation, observation.state_key)
        if observation.done:
            found.append(Advice(observation.state_key, 0 if observation.success else None))
            break
        if key not in known:
            known[key] = env.plan()
        plan = known[key]
        due, lucky = None, False
        if searching and plan:
            assert isinstance(env, Searcher)
            due, lucky = env.search(plan, read, commands[:number], rng)
        left = None if plan is None else len(plan)
        found.append(Advice(observation.state_key, left, due, lucky))
        if number < len(commands):
            observation = env.step(commands[number])
            read.append(observation.text)
    return tuple(found)
