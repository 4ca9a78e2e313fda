"""Rooms on a map with ledges that can only be climbed down, and an environment that plans anew.

    A B C      Walk left and right in a row; `down` leads from A to D and from C to F, where there
    D E F      is no way up again; G is reached from D alone, and a game that comes to X is over
    X . G      without success. F is a dead end.

The planner has its distances from the map below, worked out by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from untwine.envs.protocol import EnvFamily, EnvInfo, Reset
from untwine.records import Observation

WAYS = {
    "A": {"right": "B", "down": "D"},
    "B": {"left": "A", "right": "C"},
    "C": {"left": "B", "down": "F"},
    "D": {"right": "E", "down": "X", "jump": "G"},
    "E": {"left": "D"},
    "F": {},
    "X": {},
    "G": {},
}
PLANS: dict[str, tuple[str, ...] | None] = {
    "A": ("down", "jump"),
    "B": ("left", "down", "jump"),
    "C": ("left", "left", "down", "jump"),
    "D": ("jump",),
    "E": ("left", "jump"),
    "F": None,
    "X": None,
    "G": (),
}
INFO = EnvInfo(
    "ledges",
    deterministic=True,
    snapshots=True,
    lists_commands=True,
    has_expert=True,
    replans=True,
    inspecting=("look",),
)


class LedgeCatalogue:
    held_out_tasks = ()

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.info = INFO

    def tasks(self) -> tuple[str, ...]:
        return ("climb",)

    def variations(self, task: str, split: str | None = None) -> tuple[int, ...]:
        return (0, 1, 2)


class LedgeEnv:
    """Variation 0 starts in B, 1 in C, 2 in A. Option `starts`: another room for all of them."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._starts = options.get("starts", "")
        self._at = "B"

    def reset(self, task: str, variation: int) -> Reset:
        self._at = self._starts or "BCA"[variation]
        return Reset("come to G", self._seen())

    def step(self, command: str) -> Observation:
        self._at = WAYS[self._at].get(command, self._at)
        return self._seen()

    def admissible(self) -> tuple[str, ...]:
        return (*WAYS[self._at], "look")

    def plan(self) -> tuple[str, ...] | None:
        return PLANS[self._at]

    def snapshot(self) -> str:
        return self._at

    def restore(self, snapshot: str) -> Observation:
        self._at = snapshot
        return self._seen()

    def expert(self, task: str, variation: int) -> tuple[str, ...] | None:
        return PLANS["BCA"[variation]]

    def close(self) -> None:
        pass

    def _seen(self) -> Observation:
        won = self._at == "G"
        return Observation(
            f"room {self._at}", self._at, float(won), float(won), won or self._at == "X", won
        )


FAMILY = EnvFamily(LedgeCatalogue(), LedgeEnv, ("starts",))
