"""A walk on a line, small enough to know every value exactly: 2 wins, -1 loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from untwine.envs.protocol import EnvFamily, EnvInfo, Reset
from untwine.errors import EnvError
from untwine.records import Observation

MOVES = {"go right": 1, "go left": -1, "wait here": 0}


class ChainCatalogue:
    held_out_tasks = ("far",)

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.info = EnvInfo(
            "chain",
            deterministic=True,
            snapshots=bool(options.get("snapshots", True)),
            lists_commands=True,
            has_expert=True,
        )

    def tasks(self) -> tuple[str, ...]:
        return ("near", "far")

    def variations(self, task: str, split: str | None = None) -> tuple[int, ...]:
        parts = {None: (0, 12), "train": (0, 6), "dev": (6, 9), "test": (9, 12)}
        return tuple(range(*parts[split]))


class ChainEnv:
    """Options: `snapshots`; `drifts` changes the text or the state key from reset to reset;
    `breaks_after` does so with the state key after that many resets."""

    resets = 0  # of all environments together

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._drifts = options.get("drifts", "")
        self._breaks_after = int(options.get("breaks_after", 10**9))
        self._position = 0

    def reset(self, task: str, variation: int) -> Reset:
        ChainEnv.resets += 1
        self._position = 0
        return Reset("walk to the right", self._observe("You stand on a line."))

    def step(self, command: str) -> Observation:
        if command not in MOVES:
            return self._observe("Nothing happens.", invalid="unknown_command")
        self._position += MOVES[command]
        return self._observe(f"You are at {self._position}.")

    def _observe(self, text: str, invalid: str | None = None) -> Observation:
        won, lost = self._position >= 2, self._position < 0
        key = str(self._position)
        if self._drifts == "text":
            text = f"{text} ({ChainEnv.resets})"
        if self._drifts == "state" or ChainEnv.resets > self._breaks_after:
            key += f"/{ChainEnv.resets}"
        return Observation(text, key, float(won), float(won), won or lost, won, invalid)

    def admissible(self) -> tuple[str, ...]:
        return tuple(MOVES)

    def snapshot(self) -> int:
        return self._position

    def restore(self, snapshot: int) -> Observation:
        self._position = snapshot
        return self._observe("You are back.")

    def expert(self, task: str, variation: int) -> tuple[str, ...]:
        return ("go right", "go right")

    def close(self) -> None:
        pass


def catalogue_for(options: Mapping[str, Any]) -> ChainCatalogue:
    if "nonsense" in options:
        raise EnvError("no such option")
    return ChainCatalogue(options)


FAMILY = EnvFamily(
    ChainCatalogue({}),  # type: ignore[arg-type]
    ChainEnv,
    ("snapshots", "drifts", "breaks_after"),
    catalogue_for,  # type: ignore[arg-type]
)
