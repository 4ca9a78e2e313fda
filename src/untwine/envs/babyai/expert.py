"""Solutions by the bot of minigrid, which sees no more of the world than the agent does.

Its plan counts only when a replay in a world drawn anew succeeds.
"""

from __future__ import annotations

from typing import Any

from untwine.envs.babyai.level import Level, draw
from untwine.envs.babyai.text import COMMANDS

MAX_PLAN = 500  # commands
MAX_THOUGHTS = 100_000  # looks at its own stack of subgoals; the bot can go round in circles


class _GaveUp(Exception):
    pass


class _Stack(list[Any]):
    """The bot's stack of subgoals, with an end to how often it is looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        if self.looks > MAX_THOUGHTS:
            raise _GaveUp
        return super().__getitem__(index)


def solve(level: Level, variation: int) -> tuple[str, ...] | None:
    """Commands that solve the variation, or None. The level holds another episode afterwards."""
    draw(level, variation)
    plan = _bot_plan(level)
    if plan is None:
        return None
    draw(level, variation)
    for number, action in enumerate(plan, 1):
        _, reward, terminated, _, _ = level.step(action)
        if terminated:
            solved = reward > 0 and number == len(plan)
            return tuple(COMMANDS[int(a)] for a in plan) if solved else None
    return None


def _bot_plan(level: Level) -> list[Any] | None:
    """The actions of the bot until the level ends; None when it gives up or fails."""
    from minigrid.utils.baby_ai_bot import BabyAIBot, DisappearedBoxError

    plan: list[Any] = []
    try:
        bot = BabyAIBot(level)
        bot.stack = _Stack(bot.stack)
        while len(plan) < MAX_PLAN:
            action = bot.replan()
            if action == level.actions.done:
                return None
            plan.append(action)
            if level.step(action)[2]:
                return plan
    except (_GaveUp, AssertionError, DisappearedBoxError):
        pass
    return None
