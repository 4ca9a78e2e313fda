"""The tasks of the family `textworld`: settings for the game generator; a variation is its seed.

The task `files` is not listed and belongs to no default split: its variations are the game files of
the folder that the option `games` names, in the order of their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from untwine.envs.checking import check_variation
from untwine.envs.protocol import EnvInfo, Split
from untwine.errors import EnvError, nearest

# task -> (generator of TextWorld 1.7.0, its settings). The levels are those of `tw-make`:
# coin_collector n: a chain of n rooms, 100 + n: n dead ends besides; treasure_hunter 1 to 10: five
# rooms, 11 to 20: ten rooms with doors and containers; custom: as `tw-make custom`.
TASKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "coin-5": ("tw-coin_collector", {"level": 5}),
    "coin-104": ("tw-coin_collector", {"level": 104}),
    "treasure-3": ("tw-treasure_hunter", {"level": 3}),
    "treasure-7": ("tw-treasure_hunter", {"level": 7}),
    "treasure-13": ("tw-treasure_hunter", {"level": 13}),
    "simple": ("tw-simple", {"rewards": "balanced", "goal": "brief"}),
    "quest-3": ("custom", {"nb_rooms": 1, "nb_objects": 6, "quest_length": 3}),
    "quest-5": ("custom", {"nb_rooms": 4, "nb_objects": 10, "quest_length": 5}),
}
FILES = "files"
# Each has a sibling among the others: more dead ends, doors and containers, a longer quest.
HELD_OUT_TASKS = ("coin-104", "treasure-13", "quest-5")

SPLIT_RANGES: dict[Split, range] = {
    "train": range(0, 1000),
    "dev": range(1000, 1100),
    "test": range(1100, 1200),
}
VARIATIONS = 1200
MAX_FILES = 100_000

# First words of commands to the interpreter rather than to the game: they write files, end or
# rewind the game, or print what the agent should not see.
BLOCKED = (
    "quit", "q", "restart", "restore", "save", "undo", "script", "transcript", "recording",
    "replay", "verify", "version", "oops", "o", "notify", "pronouns", "superbrief", "brief",
    "verbose", "normal", "long", "short", "unscript", "restrict", "tw-extra-infos",
    "tw-trace-actions", "tw-print",
)  # fmt: skip


class Catalogue:
    """The task instances of the family, by formula; needs no TextWorld."""

    info = EnvInfo(
        name="textworld",
        title="TextWorld",
        deterministic=True,
        snapshots=True,
        lists_commands=True,
        has_expert=True,
        inspecting=("look", "l", "examine", "x", "inventory", "i"),
        blocked=BLOCKED,
    )
    held_out_tasks = HELD_OUT_TASKS

    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks but `files`."""
        return tuple(TASKS)

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        """Variation numbers of a task; of `files`, any that could exist. EnvError if unknown."""
        if task == FILES:
            return tuple(range(MAX_FILES)) if split is None else ()
        if task not in TASKS:
            hint = nearest(task, (*TASKS, FILES))
            raise EnvError(f"unknown textworld task {task!r}.{hint}")
        return tuple(range(VARIATIONS) if split is None else SPLIT_RANGES[split])

    def check(self, task: str, variation: int) -> None:
        """EnvError when there is no such instance."""
        check_variation("textworld", task, variation, len(self.variations(task)))


CATALOGUE = Catalogue()
