"""Where the games of ALFWorld come from: the built-in pack, or a folder of official ones.

Both number the games of a task type: those of `train` first, then `valid_seen` (our dev) and
`valid_unseen` (our test).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from untwine.envs.alfworld.game import Game
from untwine.envs.alfworld.game_file import (
    TASK_TYPES,
    data_folder,
    index_dataset,
    load_game,
    read_game_file,
)
from untwine.envs.alfworld.importing import read_index
from untwine.envs.checksums import checksum_of
from untwine.envs.protocol import Split
from untwine.errors import EnvError, nearest

SPLIT_FOLDERS: dict[Split, str] = {"train": "train", "dev": "valid_seen", "test": "valid_unseen"}
OFFICIAL = "official"
_KIND = re.compile(r"(?P<task>\w+)-(?P<obj>\w+)-\w*-(?P<target>\w+)-(?P<scene>\d+)")
Item = TypeVar("Item")


class Games(Protocol):
    """Games by task type and variation. Whatever takes a variation raises EnvError without it.

    title   the name shown with results
    """

    @property
    def title(self) -> str: ...

    def __hash__(self) -> int: ...

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        """Variation numbers of a task. EnvError for an unknown task."""

    def load(self, task: str, variation: int) -> Game:
        """The tables that `Engine` plays. EnvError when the game is damaged."""

    def path(self, task: str, variation: int) -> Path:
        """A `game.tw-pddl` with the game, for the real engine."""

    def name(self, task: str, variation: int) -> str:
        """What messages call the game."""

    def walkthrough(self, task: str, variation: int) -> tuple[str, ...] | None:
        """Commands that win it, where they are known."""

    def kin(self, task: str, variation: int) -> str:
        """Room, object and target: games that share them are too alike to be kept apart."""

    def fingerprint(self) -> str:
        """A checksum of which games there are."""


class Shelf(Generic[Item]):
    """Items by task type and split, numbered through all splits; `where` is said in errors."""

    def __init__(self, items: Mapping[tuple[str, Split], Sequence[Item]], where: str) -> None:
        self._items, self._where = items, where

    def variations(self, task: str, split: Split | None) -> tuple[int, ...]:
        check_task(task)
        first = 0
        found: list[int] = []
        for name in SPLIT_FOLDERS:
            count = len(self._items.get((task, name), ()))
            if split in (None, name):
                found.extend(range(first, first + count))
            first += count
        return tuple(found)

    def find(self, task: str, variation: int) -> tuple[Split, Item]:
        """An item and the split it is in. EnvError when there is none."""
        check_task(task)
        rest = variation if type(variation) is int and variation >= 0 else 10**12
        total = 0
        for split in SPLIT_FOLDERS:
            items = self._items.get((task, split), ())
            if rest - total < len(items):
                return split, items[rest - total]
            total += len(items)
        has = f"use 0 to {total - 1}" if total else "there are none of this type"
        raise EnvError(f"alfworld/{task} has no variation {variation} in {self._where}; {has}")

    def all(self) -> list[Item]:
        return [item for items in self._items.values() for item in items]


class OfficialGames:
    """The games of a folder in the official layout, each split in the order of the paths."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @cached_property
    def _root(self) -> Path:
        return data_folder(self.folder)

    @cached_property
    def _shelf(self) -> Shelf[Path]:
        games = (read_index(self._root) or index_dataset(self._root)).games
        items: dict[tuple[str, Split], Sequence[Path]] = {
            (task, split): games.get(folder, {}).get(task, ())
            for task in TASK_TYPES
            for split, folder in SPLIT_FOLDERS.items()
        }
        return Shelf(items, self.folder)

    @cached_property
    def title(self) -> str:
        """As official games, unless folders are named as `SyntheticGame.write` names them."""
        made = any(path.parent.name.startswith("synthetic_") for path in self._shelf.all())
        return "ALFWorld (synthetic games)" if made else "ALFWorld"

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        return self._shelf.variations(task, split)

    def path(self, task: str, variation: int) -> Path:
        return self._shelf.find(task, variation)[1]

    def load(self, task: str, variation: int) -> Game:
        return load_game(self.path(task, variation))

    def name(self, task: str, variation: int) -> str:
        return f"game file {self.path(task, variation)}"

    def walkthrough(self, task: str, variation: int) -> tuple[str, ...] | None:
        return read_game_file(self.path(task, variation)).walkthrough

    def kin(self, task: str, variation: int) -> str:
        """From the name of the folder; a folder named otherwise is its own kin."""
        folder = self.path(task, variation).parents[1]
        named = _KIND.fullmatch(folder.name)
        if named is None:
            return folder.relative_to(self._root).as_posix()
        return kin_of(int(named["scene"]), named["obj"], named["target"])

    def fingerprint(self) -> str:
        names = [path.relative_to(self._root).as_posix() for path in self._shelf.all()]
        return checksum_of("\n".join(names).encode())


def kin_of(scene: int, obj: str, target: str) -> str:
    return f"{scene}/{obj}/{target}"


def check_task(task: str) -> None:
    if task not in TASK_TYPES:
        known = ", ".join(TASK_TYPES)
        raise EnvError(
            f"alfworld has no task {task!r}; known are {known}.{nearest(task, TASK_TYPES)}"
        )


def games_of(data: str) -> Games:
    """The games that the option `data` names: empty for the built-in ones, `official` for those
    of $ALFWORLD_DATA, or a folder. EnvError when that variable is wanted and not set."""
    if not data:
        return _built_in()
    folder = os.environ.get("ALFWORLD_DATA", "") if data == OFFICIAL else data
    if not folder:
        raise EnvError(
            "option data=official needs $ALFWORLD_DATA, which is not set; set it to the folder "
            "that alfworld-download filled, or give that folder as the option data"
        )
    return _indexed(folder)


@cache
def _built_in() -> Games:
    from untwine.envs.alfworld.pack import PackGames  # `python -m` must find it not yet imported

    return PackGames()


@lru_cache(8)  # the index of the whole dataset takes long, and is the same for all environments
def _indexed(folder: str) -> OfficialGames:
    return OfficialGames(folder)
