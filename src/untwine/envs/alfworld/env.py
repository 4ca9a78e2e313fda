"""ALFWorld as an untwine environment: the native engine, or the real one.

Commands go to the engine as they are, and its answers come back as they are. The task sentence is
split off the first observation and becomes the goal. A command that is not admissible now changes
nothing, is answered with "Nothing happens.", and is `invalid` (`not_admissible`). The score is 1
while the goal holds and 0 otherwise; like the real game, this one can be played on after it is won.

The tasks are the six task types. Variations number the games of a type: those of `train` first,
then `valid_seen` (our dev) and `valid_unseen` (our test). Which games there are depends on the
option `data`, see games.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from untwine.envs.alfworld.engine import Engine, Move, State, Turn, feedback
from untwine.envs.alfworld.game import Game
from untwine.envs.alfworld.game_file import TASK_TYPES
from untwine.envs.alfworld.games import Games, games_of
from untwine.envs.alfworld.oracle import Unreachable, shortest_plan
from untwine.envs.alfworld.searching import in_order, search
from untwine.envs.alfworld.stock import Replay, StockEngine
from untwine.envs.alfworld.text import GOAL_PREFIX
from untwine.envs.checking import read_options
from untwine.envs.protocol import Due, EnvInfo, Reset, Split
from untwine.errors import EnvError
from untwine.records import Observation

KEPT_GAMES = 1024  # games a process keeps in memory, 30 to 100 kB each: whole evaluation sets

INFO = EnvInfo(
    name="alfworld",
    deterministic=True,
    snapshots=True,
    lists_commands=True,
    has_expert=True,
    replans=True,
    searches=True,
    inspecting=("look", "examine", "inventory", "help"),
)


class Options(BaseModel):
    """Options of the family `alfworld`.

    engine  native, or textworld: the real one (extra `alfworld`; slow, for comparisons)
    data    empty: the built-in games (pack.py), whatever $ALFWORLD_DATA says; official: those of
            $ALFWORLD_DATA; else a folder of games (json_2.1.1 or the folder that holds it)
    observe answer: what the game answers; inventory: and what is carried, in the words of the
            command `inventory` (native only)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    engine: Literal["native", "textworld"] = "native"
    data: str = ""
    observe: Literal["answer", "inventory"] = "answer"

    @field_validator("observe")
    @classmethod
    def _native(cls, observe: str, found: ValidationInfo) -> str:
        if observe != "answer" and found.data.get("engine") != "native":
            raise ValueError("what is carried is shown by the native engine only")
        return observe


class Catalogue:
    """The task types, and the games that the options choose. EnvError for wrong options."""

    held_out_tasks = ("pick_heat_then_place_in_recep", "pick_two_obj_and_place")

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self._options = read_options(INFO.name, Options, options or {})

    @property
    def info(self) -> EnvInfo:
        real = self._options.engine == "textworld"
        title = self._games.title + (", real engine" if real else "")
        return dataclasses.replace(
            INFO, title=title, remote=real, replans=not real, searches=not real
        )

    def tasks(self) -> tuple[str, ...]:
        return TASK_TYPES

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        return self._games.variations(task, split)

    def kin(self, task: str, variation: int) -> str:
        """Room, object and target of a game."""
        return self._games.kin(task, variation)

    def fingerprint(self) -> str:
        """A checksum of which games there are."""
        return self._games.fingerprint()

    @property
    def _games(self) -> Games:
        return games_of(self._options.data)


class Snapshot(NamedTuple):
    """A moment of one game: which, the engine's state (or the commands so far), the last text."""

    task: str
    variation: int
    state: State | Replay
    text: str


class AlfWorldEnv:
    """One game at a time. Options are explained in `Options`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = read_options(INFO.name, Options, options)
        self._games = games_of(self.options.data)
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

        Should the search be too long, the walkthrough of the game, when it has one.
        """
        game = _built(self._games, task, variation)
        try:
            return shortest_plan(game, self._games.name(task, variation))
        except Unreachable:
            return None
        except EnvError:
            return self._games.walkthrough(task, variation)

    def plan(self) -> tuple[str, ...] | None:
        """A shortest plan from here, None when there is none. Only with the native engine."""
        engine = self._need()
        if not isinstance(engine, Engine):
            raise EnvError("alfworld: only the native engine plans; set engine: native")
        with contextlib.suppress(Unreachable):
            return shortest_plan(dataclasses.replace(engine.game, start=engine.snapshot()))
        return None

    def search(
        self,
        plan: Sequence[str],
        read: Sequence[str],
        said: Sequence[str],
        rng: random.Random | None,
    ) -> Due:
        """The next command of an expert that knows what it has read (searching.py)."""
        if rng is None:
            return in_order(plan, self.admissible(), read, said)
        return search(plan, self.admissible(), read, said, rng)

    def close(self) -> None:
        if isinstance(self._engine, StockEngine):
            self._engine.close()
        self._engine = self._instance = None

    def _open(self, task: str, variation: int) -> Engine | StockEngine:
        """The engine with that game in it."""
        instance = (task, variation)
        if self._engine is not None and self._instance == instance:
            return self._engine
        if self.options.engine == "native":
            self._engine = Engine(_built(self._games, task, variation))
        elif isinstance(self._engine, StockEngine):
            self._engine.load(self._games.path(task, variation))
        else:
            self._engine = StockEngine(self._games.path(task, variation))
        self._instance = instance
        return self._engine

    def _need(self) -> Engine | StockEngine:
        if self._engine is None:
            raise EnvError("alfworld: call reset(task, variation) before anything else")
        return self._engine

    def _observe(self, turn: Turn) -> Observation:
        self._text = text = turn.text
        if self.options.observe == "inventory":
            engine = self._need()
            assert isinstance(engine, Engine)
            carried = feedback(engine.game, engine.snapshot(), Move("inventory"))
            text = f"{text}\n{carried}"
        return Observation(
            text=text,
            state_key=self._need().key(),
            score=float(turn.score),
            outcome=float(turn.score),
            done=turn.won,
            success=turn.won,
            invalid=None if turn.valid else "not_admissible",
        )


@lru_cache(KEPT_GAMES, typed=True)
def _built(games: Games, task: str, variation: int) -> Game:
    """A game, shared by all environments of this process."""
    return games.load(task, variation)


def _restored(engine: Engine | StockEngine, state: State | Replay) -> Turn:
    if isinstance(engine, Engine) and isinstance(state, State):
        return engine.restore(state)
    if isinstance(engine, StockEngine) and isinstance(state, Replay):
        return engine.restore(state)
    raise EnvError("alfworld: this snapshot was taken with the other engine")
