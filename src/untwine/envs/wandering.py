"""Experts that err: what a demonstrator does who now and then takes a wrong command, and recovers.

A cold start on faultless plans never shows what to do after a mistake, and leaves nothing to learn
by trying (docs/log.md).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

from untwine.envs.guiding import Advice, helps
from untwine.envs.protocol import ExpertKind, Planner, Searcher

STALE = 0.5  # of the errors, how many were valid before and are not now, where there are such
AGAIN = 0.5  # of the others, how many were given before, where there are such


class Command(NamedTuple):
    """One command of an expert.

    expert   false where it errs on purpose
    off_plan an error after which a shortest plan is as long as before it, or longer
    looks    for what the expert has not read of, as several others would
    chance   the one of them was drawn at random: the first word is the expert's, the rest is luck
    others   valid commands that were not given, and whether each would have been good
    """

    text: str
    expert: bool = True
    off_plan: bool = False
    looks: bool = False
    chance: bool = False
    others: tuple[tuple[str, bool], ...] = ()


def wandering_plan(
    env: Planner,
    task: str,
    variation: int,
    noise: float,
    max_steps: int,
    seed: int = 0,
    *,
    valid_only: bool = False,
    expert: ExpertKind = "oracle",
    alternatives: int = 0,
    memory: int = 0,
) -> tuple[Command, ...] | None:
    """Solve an instance, erring with probability `noise` at each step; None when that fails, or
    takes more than `max_steps`.

    An error is a command that is valid now, except the one that is due, or, unless `valid_only`,
    one that was valid before and no longer is: neither tells where the plan goes. Half of the valid
    ones say again what was said before, as agents do; of the rest each first word is as likely as
    the others. The expert then plans anew (`EnvInfo.replans`). Where there are too few steps left
    for a detour, it errs no more. One that searches does not know what it has not read
    (`EnvInfo.searches`) in the last `memory` observations, or in all of them where that is 0.
    Beside each command up to `alternatives` others are tried and judged (only where
    `EnvInfo.snapshots`). The same arguments give the same commands where the environment is
    deterministic.
    """
    rng = random.Random(f"{seed}/{task}/{variation}")
    draw = random.Random(f"others {seed}/{task}/{variation}")
    observation = env.reset(task, variation).observation
    taken: list[Command] = []
    read = [observation.text]
    known: dict[str, None] = {}  # every command that was valid at some step, in order
    plan = env.plan()
    while plan and not observation.done and len(taken) < max_steps:
        valid = env.admissible()
        known |= dict.fromkeys(valid)
        due, looks = plan[0], False
        if expert != "oracle":
            assert isinstance(env, Searcher)
            luck = rng if expert == "search" else None
            given = [command.text for command in taken]
            due, looks = env.search(plan, read[-memory:], given, luck)
        wrong: Sequence[str] = []
        if rng.random() < noise and len(taken) + 2 + len(plan) <= max_steps:
            stale = [] if valid_only else [c for c in known if c not in set(valid)]
            wrong = _errors(valid, due, stale, {command.text for command in taken}, rng)
        said, left = rng.choice(wrong) if wrong else due, len(plan)
        others: tuple[tuple[str, bool], ...] = ()
        if alternatives:
            before = {command.text for command in taken}
            asked = _beside([c for c in valid if c != said], before, due, alternatives, draw)
            advice = Advice("", left, None if expert == "oracle" else due, looks)
            others = _judged(env, asked, advice, before)
        observation = env.step(said)
        read.append(observation.text)
        plan = plan[1:] if said == plan[0] else env.plan()
        off_plan = bool(wrong) and (plan is None or len(plan) >= left)
        looks &= not wrong
        chance = looks and expert == "search"
        taken.append(Command(said, not wrong, off_plan, looks, chance, others))
    return tuple(taken) if observation.success and taken else None


def _beside(
    commands: Sequence[str], given: Collection[str], due: str, number: int, rng: random.Random
) -> list[str]:
    """Up to `number` commands. Those that are hardest to tell from the one that is due come as
    often as there are such: in turn one that was given before, one that begins like the due one,
    and one with any first word, each word as likely as the others."""
    left = list(commands)
    drawn: list[str] = []
    while left and len(drawn) < number:
        turn = len(drawn) % 3
        among = _beginning(left, first_word(due)) if turn == 1 else []
        among = among or _of_any_kind(left, rng)
        if turn == 0:
            among = [command for command in left if command in given] or among
        drawn.append(rng.choice(among))
        left.remove(drawn[-1])
    return drawn


def first_word(command: str) -> str:
    """What kind of command it is."""
    return command.partition(" ")[0]


def _judged(
    env: Planner, commands: Sequence[str], before: Advice, given: Collection[str]
) -> tuple[tuple[str, bool], ...]:
    """Commands with whether they are good; those of which it is not known are left out. The
    environment is in the same state afterwards."""
    here = env.snapshot()
    found = []
    for command in commands:
        observation = env.step(command)
        plan = () if observation.success else env.plan()
        good = helps(command, before, None if plan is None else len(plan), command not in given)
        if good is not None:
            found.append((command, good))
        env.restore(here)
    return tuple(found)


def _errors(
    valid: Sequence[str],
    due: str,
    stale: Sequence[str],
    given: Collection[str],
    rng: random.Random,
) -> Sequence[str]:
    """The errors to draw one from: all of them valid, or none."""
    if stale and rng.random() < STALE:
        return stale
    others = [command for command in valid if command != due]
    again = [command for command in others if command in given]
    if again and rng.random() < AGAIN:
        return again
    return _of_any_kind(others, rng) if others else others


def _of_any_kind(commands: Sequence[str], rng: random.Random) -> list[str]:
    """Those with one first word, each such word as likely as the others."""
    return _beginning(commands, rng.choice([*dict.fromkeys(map(first_word, commands))]))


def _beginning(commands: Sequence[str], word: str) -> list[str]:
    return [command for command in commands if first_word(command) == word]
