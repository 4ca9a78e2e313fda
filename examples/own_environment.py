"""An environment of one's own: a safe with a dial from 0 to 9. Pulled too early, it jams for good.

From the folder above this one, since the module of such an environment is looked for there:

    untwine play examples.own_environment:FAMILY open 0
    untwine train examples/own_environment.yaml

docs/environments.md says what each part is for.
"""

import random
from collections.abc import Mapping
from typing import Any

from untwine.envs.protocol import EnvFamily, EnvInfo, Reset, Split
from untwine.errors import EnvError
from untwine.records import Observation

GOALS = {"open": "open the safe", "find": "find the number of the safe"}
COMMANDS = ("turn left", "turn right", "pull")
INSTANCES = [(dial, number) for dial in range(10) for number in range(10) if dial != number]
random.Random(0).shuffle(INSTANCES)  # variation -> the digit at the start, and the number
RANGES = {"train": range(60), "dev": range(60, 75), "test": range(75, 90), None: range(90)}


class Catalogue:
    """What there is. No instance is in two splits."""

    info = EnvInfo("safe", deterministic=True, snapshots=True, lists_commands=True,
                   has_expert=True, replans=True)  # fmt: skip

    def tasks(self) -> tuple[str, ...]:
        return tuple(GOALS)

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        if task not in GOALS:
            raise EnvError(f"the safe has no task {task!r}; known are {', '.join(GOALS)}")
        return tuple(RANGES[split])


class SafeEnv:
    """One safe at a time: the task, its number, where the dial is, and the door."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._state = ("", 0, 0, "")

    def reset(self, task: str, variation: int) -> Reset:
        if variation not in Catalogue().variations(task):
            raise EnvError(f"the safe has no variation {variation}; use 0 to 89")
        dial, number = INSTANCES[variation]
        return Reset(GOALS[task], self.restore((task, number, dial, "closed")))

    def step(self, command: str) -> Observation:
        task, number, dial, door = self._state
        if command not in COMMANDS:
            return self._seen(invalid="unknown_command")
        if command == "pull":
            door = "open" if dial == number else "jammed"
        else:
            dial = min(dial + 1, 9) if command == "turn right" else max(dial - 1, 0)
        return self.restore((task, number, dial, door))

    def admissible(self) -> tuple[str, ...]:
        return COMMANDS

    def plan(self) -> tuple[str, ...] | None:
        task, number, dial, door = self._state
        turns = ["turn right"] * (number - dial) + ["turn left"] * (dial - number)
        return None if door == "jammed" else (*turns, *["pull"] * (task == "open"))

    def expert(self, task: str, variation: int) -> tuple[str, ...] | None:
        self.reset(task, variation)
        return self.plan()

    def snapshot(self) -> tuple[str, int, int, str]:
        return self._state

    def restore(self, snapshot: tuple[str, int, int, str]) -> Observation:
        self._state = snapshot
        return self._seen()

    def _seen(self, invalid: str | None = None) -> Observation:
        task, number, dial, door = self._state
        solved = door == "open" if task == "open" else dial == number
        over = solved or door == "jammed"
        side = "to the left" if number < dial else "to the right" if number > dial else "here"
        return Observation(
            text=f"The safe is {door}. The dial is at {dial}; the number is {side}.",
            state_key=f"{dial} {door}",
            score=float(solved),
            outcome=float(solved),
            done=over,
            success=solved,
            invalid=invalid,
        )

    def close(self) -> None:
        pass


FAMILY = EnvFamily(Catalogue(), SafeEnv, option_names=())
