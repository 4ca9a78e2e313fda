"""BabyAI as an untwine environment: text in, text out, exactly repeatable.

The goal is the mission of the level. The outcome is 1 when it is accomplished and 0 before;
minigrid's reward shrinks with time, ours does not, and its step limit is left to the recipe. A
command outside the six is invalid (`unknown_command`); one that is understood but cannot take
effect is valid, and says why it did nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from untwine.envs.babyai.catalogue import CATALOGUE
from untwine.envs.babyai.expert import solve
from untwine.envs.babyai.level import Level, draw, new_level, world_key
from untwine.envs.babyai.text import COMMANDS, describe, effect, refusal
from untwine.envs.protocol import Reset
from untwine.errors import EnvError
from untwine.records import Observation

UNKNOWN = f"I don't understand that command; the commands are {', '.join(COMMANDS)}."


class Snapshot(NamedTuple):
    """A state to return to, any number of times; can be pickled."""

    level: Level
    done: bool
    success: bool


class BabyAIEnv:
    """One level at a time. Options are explained in `make`."""

    def __init__(self, view: int) -> None:
        self._view = view
        self._level: Level | None = None
        self._done = self._success = False

    def reset(self, task: str, variation: int) -> Reset:
        """Begin an episode. EnvError for an unknown instance, or without minigrid."""
        CATALOGUE.check(task, variation)
        level = new_level(task, self._view)
        draw(level, variation)
        self._level, self._done, self._success = level, False, False
        return Reset(level.mission, self._observe())

    def step(self, command: str) -> Observation:
        """Send one command; once the level is over, nothing changes any more."""
        level = self._need()
        command = " ".join(command.lower().split())
        if self._done:
            return self._observe("The mission is over.")
        if command not in COMMANDS:
            return self._observe(UNKNOWN, "unknown_command")
        message = refusal(level, command) or effect(level, command)
        _, reward, self._done, _, _ = level.step(COMMANDS.index(command))
        self._success = bool(self._done and reward > 0)
        if self._done:
            message += " The mission is accomplished." if self._success else " The mission failed."
        return self._observe(message)

    def admissible(self) -> tuple[str, ...]:
        """The commands that change something now; none once the level is over."""
        level = self._need()
        return () if self._done else tuple(c for c in COMMANDS if refusal(level, c) is None)

    def snapshot(self) -> Snapshot:
        """A deep copy of the level (about a millisecond)."""
        return Snapshot(copy.deepcopy(self._need()), self._done, self._success)

    def restore(self, snapshot: Snapshot) -> Observation:
        """Return to a snapshot; the snapshot stays as it is."""
        self._level = copy.deepcopy(snapshot.level)
        self._done, self._success = snapshot.done, snapshot.success
        return self._observe()

    def expert(self, task: str, variation: int) -> tuple[str, ...] | None:
        """The verified plan of minigrid's bot, or None; leaves the episode alone."""
        CATALOGUE.check(task, variation)
        return solve(new_level(task, self._view), variation)

    def close(self) -> None:
        self._level = None

    def _need(self) -> Level:
        if self._level is None:
            raise EnvError("babyai: call reset(task, variation) before anything else")
        return self._level

    def _observe(self, message: str = "", invalid: str | None = None) -> Observation:
        level = self._need()
        return Observation(
            text=f"{message} {describe(level)}".strip(),
            state_key=world_key(level) + ("|over" if self._done else ""),
            score=float(self._success),
            outcome=float(self._success),
            done=self._done,
            success=self._success,
            invalid=invalid,
        )


def make(options: Mapping[str, Any]) -> BabyAIEnv:
    """An environment. EnvError for a wrong value. Options:

    view  cells across the square that the agent sees: 3, 5, 7 (as in the paper), 9 or 11
    """
    view = options.get("view", 7)
    if type(view) is not int or view not in (3, 5, 7, 9, 11):
        raise EnvError(f"babyai: option view must be 3, 5, 7, 9 or 11, not {view!r}")
    return BabyAIEnv(view)
