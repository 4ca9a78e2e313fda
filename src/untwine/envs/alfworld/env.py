"""ALFWorld as an untwine environment: the native engine, or the real one.

Commands go to the engine as they are, and its answers come back as they are. The task sentence is
split off the first observation and becomes the goal. A command that is not admissible now changes
nothing, is answered with "Nothing happens.", and is `invalid` (`not_admissible`). The score is 1
while the goal holds and 0 otherwise; like the real game, this one can be played on after it is won.

The tasks are the six task types. Variations number the games of a type: those of `train` first,
then `valid_seen` (our dev) and `valid_unseen` (our test), each in the order of their paths.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from untwine.envs.alfworld.engine import Engine, State, Turn
from untwine.envs.alfworld.game import Game
from untwine.envs.alfworld.game_file import (
    TASK_TYPES,
    data_folder,
    index_dataset,
    load_game,
    read_game_file,
)
from untwine.envs.alfworld.importing import read_index
from untwine.envs.alfworld.oracle import Unreachable, shortest_plan
from untwine.envs.alfworld.stock import Replay, StockEngine
from untwine.envs.alfworld.text import GOAL_PREFIX
from untwine.envs.protocol import EnvInfo, Reset, Split
from untwine.errors import EnvError, nearest
from untwine.records import Observation

SPLIT_FOLDERS: dict[Split, str] = {"train": "train", "dev": "valid_seen", "test": "valid_unseen"}
KEPT_GAMES = 64  # games an environment keeps in memory, about 100 kB each
NO_PACK = (
    "alfworld has no built-in games yet: give the option data, the folder that alfworld-download "
    "filled, or set $ALFWORLD_DATA"
)

INFO = EnvInfo(
    name="alfworld",
    deterministic=True,
    snapshots=True,
    lists_commands=True,
    has_expert=True,
    replans=True,
    inspecting=("look", "examine", "inventory", "help"),
)


class Options(BaseModel):
    """Options of the family `alfworld`.

    engine  native, or textworld: the real one (extra `alfworld`; slow, for comparisons)
    data    folder of official games (json_2.1.1 or the folder that holds it); empty: the built-in
            games
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    engine: Literal["native", "textworld"] = "native"
    data: str = ""


class OfficialGames:
    """The games of a folder in the official layout, by task type and variation."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @cached_property
    def _files(self) -> dict[tuple[str, Split], tuple[Path, ...]]:
        root = data_folder(self.folder)
        games = (read_index(root) or index_dataset(root)).games
        return {
            (task, split): games.get(folder, {}).get(task, ())
            for task in TASK_TYPES
            for split, folder in SPLIT_FOLDERS.items()
        }

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        """Variation numbers of a task. EnvError for an unknown task."""
        check_task(task)
        first = 0
        found: list[int] = []
        for name in SPLIT_FOLDERS:
            count = len(self._files[task, name])
            if split in (None, name):
                found.extend(range(first, first + count))
            first += count
        return tuple(found)

    def path(self, task: str, variation: int) -> Path:
        """The file of a game. EnvError when there is no such game."""
        check_task(task)
        files = [path for name in SPLIT_FOLDERS for path in self._files[task, name]]
        if type(variation) is not int or not 0 <= variation < len(files):
            has = f"use 0 to {len(files) - 1}" if files else "there are none of this type"
            raise EnvError(f"alfworld/{task} has no variation {variation} in {self.folder}; {has}")
        return files[variation]

    def load(self, task: str, variation: int) -> Game:
        """A game, read anew. EnvError when there is none, or its file is damaged."""
        return load_game(self.path(task, variation))


def check_task(task: str) -> None:
    if task not in TASK_TYPES:
        known = ", ".join(TASK_TYPES)
        raise EnvError(
            f"alfworld has no task {task!r}; known are {known}.{nearest(task, TASK_TYPES)}"
        )


def games_of(data: str) -> OfficialGames:
    """The games of a folder, or of $ALFWORLD_DATA. EnvError when neither is given."""
    folder = data or os.environ.get("ALFWORLD_DATA", "")
    if not folder:
        raise EnvError(NO_PACK)
    return _indexed(folder)


@lru_cache(8)  # the index of the whole dataset takes long, and is the same for all environments
def _indexed(folder: str) -> OfficialGames:
    return OfficialGames(folder)


class Catalogue:
    """The task types, and the games of $ALFWORLD_DATA (none when it is not set)."""

    info = INFO

    def tasks(self) -> tuple[str, ...]:
        return TASK_TYPES

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        check_task(task)
        folder = os.environ.get("ALFWORLD_DATA", "")
        return games_of(folder).variations(task, split) if folder else ()


class Snapshot(NamedTuple):
    """A moment of one game: which, the engine's state (or the commands so far), the last text."""

    task: str
    variation: int
    state: State | Replay
    text: str


class AlfWorldEnv:
    """One game at a time. Options are explained in `Options`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = _read_options(options)
        self._games = games_of(self.options.data)
        self._kept: OrderedDict[tuple[str, int], Game] = OrderedDict()
        self._engine: Engine | StockEngine | None = None
        self._instance: tuple[str, int] | None = None
        self._text = ""

    def reset(self, task: str, variation: int) -> Reset:
        """Begin an episode. EnvError for an unknown task or variation, or a damaged game file."""
        turn = self._open(task, variation).reset()
        text, _, goal = turn.text.partition(f"\n\n{GOAL_PREFIX}")
        return Reset(goal, self._observe(turn._replace(text=text)))

    def step(self, command: str) -> Observation:
        return self._observe(self._need().step(command))

    def admissible(self) -> tuple[str, ...]:
        return self._need().admissible()

    def snapshot(self) -> Snapshot:
        engine = self._need()
        assert self._instance is not None
        return Snapshot(*self._instance, engine.snapshot(), self._text)

    def restore(self, snapshot: Snapshot) -> Observation:
        """Return to a snapshot: the same observation again. The real engine plays up to it."""
        task, variation, state, text = snapshot
        turn = _restored(self._open(task, variation), state)
        return self._observe(turn._replace(text=text))

    def expert(self, task: str, variation: int) -> tuple[str, ...] | None:
        """A shortest plan (oracle.py); None when the goal cannot be reached.

        Should the search be too long, the walkthrough of the game file, when it has one.
        """
        path = self._games.path(task, variation)
        game = self._game(task, variation)
        try:
            return shortest_plan(game, f"game file {path}")
        except Unreachable:
            return None
        except EnvError:
            return read_game_file(path).walkthrough

    def plan(self) -> tuple[str, ...] | None:
        """A shortest plan from here, None when there is none. Only with the native engine."""
        engine = self._need()
        if not isinstance(engine, Engine):
            raise EnvError("alfworld: only the native engine plans; set engine: native")
        with contextlib.suppress(Unreachable):
            return shortest_plan(replace(engine.game, start=engine.snapshot()))
        return None

    def close(self) -> None:
        if isinstance(self._engine, StockEngine):
            self._engine.close()
        self._engine = self._instance = None
        self._kept.clear()

    def _open(self, task: str, variation: int) -> Engine | StockEngine:
        """The engine with that game in it."""
        instance = (task, variation)
        if self._engine is not None and self._instance == instance:
            return self._engine
        if self.options.engine == "native":
            self._engine = Engine(self._game(task, variation))
        elif isinstance(self._engine, StockEngine):
            self._engine.load(self._games.path(task, variation))
        else:
            self._engine = StockEngine(self._games.path(task, variation))
        self._instance = instance
        return self._engine

    def _game(self, task: str, variation: int) -> Game:
        game = self._kept.get((task, variation))
        if game is None:
            game = self._kept[task, variation] = self._games.load(task, variation)
            if len(self._kept) > KEPT_GAMES:
                self._kept.popitem(last=False)
        self._kept.move_to_end((task, variation))
        return game

    def _need(self) -> Engine | StockEngine:
        if self._engine is None:
            raise EnvError("alfworld: call reset(task, variation) before anything else")
        return self._engine

    def _observe(self, turn: Turn) -> Observation:
        self._text = turn.text
        return Observation(
            text=turn.text,
            state_key=self._need().key(),
            score=float(turn.score),
            outcome=float(turn.score),
            done=turn.won,
            success=turn.won,
            invalid=None if turn.valid else "not_admissible",
        )


def _restored(engine: Engine | StockEngine, state: State | Replay) -> Turn:
    if isinstance(engine, Engine) and isinstance(state, State):
        return engine.restore(state)
    if isinstance(engine, StockEngine) and isinstance(state, Replay):
        return engine.restore(state)
    raise EnvError("alfworld: this snapshot was taken with the other engine")


def _read_options(options: Mapping[str, Any]) -> Options:
    try:
        return Options(**options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise EnvError(f"alfworld: option {place}: {first['msg']}") from error
