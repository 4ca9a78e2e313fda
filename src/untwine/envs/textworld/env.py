"""TextWorld as an untwine environment: the real engine, one story file per episode.

The goal is the objective of the game. The outcome is the score divided by the highest one, 1 when
the game is won. The state key comes from the facts of the world that the engine tracks and from
the progress of the quests, never from the text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from untwine.envs.cache import default_cache
from untwine.envs.checking import read_options
from untwine.envs.protocol import Reset
from untwine.envs.textworld.catalogue import BLOCKED, CATALOGUE, FILES
from untwine.envs.textworld.games import cached_game, engine, load_game, own_game
from untwine.errors import EnvError
from untwine.records import Observation

MAX_CHARS = 120  # of a command; the interpreter's buffer ends somewhere beyond
# Answers of the parser (Inform 7) to what it cannot read at all
_UNKNOWN = (
    "That's not a verb I recognise",
    "I didn't understand that",
    "I only understood you as far as",
    "I beg your pardon",
    "You seem to want to talk to someone",
    "You excepted something",
    "Nothing to do",
)
_STATUS = re.compile(r"^>.*-= .* =-\s*-?\d+/\d+ *$", re.MULTILINE)  # room, score and turn
# ... and its questions; the next command may be the answer to one
_ASKING = ("What do you want to", "Which do you mean", "Who do you mean", "Whom do you want to")


class Options(BaseModel):
    """Options of the family `textworld`.

    observe    feedback: what the game answers. look: besides it the room, unless the answer shows
               it, and what is carried
    games      folder with game files (.z8 with its .json) for the task `files`
    cache_dir  where made games are kept; empty: $UNTWINE_CACHE or ~/.cache/untwine
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    observe: Literal["feedback", "look"] = "look"
    games: str = ""
    cache_dir: str = ""


class Snapshot(NamedTuple):
    """How to come back to a state: the commands that led there, and the key to check it by."""

    task: str
    variation: int
    commands: tuple[str, ...]
    state_key: str


class TextWorldEnv:
    """One game at a time."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """EnvError for an option that does not exist or has a wrong value."""
        self.options = read_options("textworld", Options, options)
        self._cache = Path(self.options.cache_dir or default_cache())
        self._engine: Any = None
        self._game: Any = None
        self._state: Any = None
        self._instance = ("", -1)
        self._sent: list[str] = []
        self._asked = ""

    def reset(self, task: str, variation: int) -> Reset:
        """Begin an episode, making the game if need be. EnvError, see games.py."""
        CATALOGUE.check(task, variation)
        if self._instance != (task, variation) or self._engine is None:
            self._load(task, variation)
        self._state = self._engine.reset()
        self._sent, self._asked = [], ""
        return Reset(self._goal(), self._observe("", None))

    def step(self, command: str) -> Observation:
        """Send one command; once the game is over, nothing changes any more."""
        self._need()
        command = " ".join(command.split())
        if self._over():
            return self._observe("The game is over.", None)
        refused = _refusal(command)
        if refused is not None:
            return self._observe(*refused)
        self._state, _, _ = self._engine.step(command)
        self._sent.append(command)
        feedback = _tidy(self._state["feedback"])
        self._asked = feedback if feedback.startswith(_ASKING) else ""
        if self._asked:
            return self._observe(feedback, "ambiguous")
        return self._observe(feedback, "unknown_command" if _unreadable(feedback) else None)

    def admissible(self) -> tuple[str, ...]:
        """The commands that the world allows now, in alphabetical order; none once it is over."""
        self._need()
        return () if self._over() else tuple(self._state["admissible_commands"])

    def snapshot(self) -> Snapshot:
        """The commands so far; small, and can be pickled."""
        self._need()
        return Snapshot(*self._instance, tuple(self._sent), self._key())

    def restore(self, snapshot: Snapshot) -> Observation:
        """Play the commands of a snapshot again (some 5 ms each).

        EnvError when that does not lead to the same state: the game file was changed meanwhile.
        """
        _, observation = self.reset(snapshot.task, snapshot.variation)
        for command in snapshot.commands:
            observation = self.step(command)
        if observation.state_key != snapshot.state_key:
            raise EnvError("the TextWorld game was changed since the snapshot was taken")
        return observation

    def expert(self, task: str, variation: int) -> tuple[str, ...] | None:
        """The walkthrough stored with the game, up to where a replay wins; None if it does not."""
        observation = self.reset(task, variation).observation
        plan: list[str] = []
        for command in self._game.metadata.get("walkthrough") or ():
            observation = self.step(command)
            plan.append(command)
            if observation.invalid is not None or observation.done:
                break
        return tuple(plan) if observation.success else None

    def close(self) -> None:
        """End the interpreter."""
        if self._engine is not None:
            self._engine.close()
        self._engine = self._game = self._state = None

    def _load(self, task: str, variation: int) -> None:
        textworld = engine()
        if task == FILES:
            path = own_game(self.options.games, variation)
        else:
            path = cached_game(task, variation, self._cache)
        game = load_game(path)
        self.close()
        wanted = ("admissible_commands", "description", "inventory", "intermediate_reward")
        infos = textworld.EnvInfos(**dict.fromkeys(wanted, True))
        self._engine = textworld.start(str(path), infos)
        self._engine.seed(0)
        self._game, self._instance = game, (task, variation)

    def _goal(self) -> str:
        return " ".join(str(self._game.objective).split())

    def _need(self) -> None:
        if self._state is None:
            raise EnvError("textworld: call reset(task, variation) before anything else")

    def _over(self) -> bool:
        return bool(self._state["won"] or self._state["lost"])

    def _key(self) -> str:
        """Facts, quests done and failed, the end, and a question of the parser if it waits."""
        progress = [
            (quest.nb_completions, bool(quest.failed))
            for quest in self._state["_game_progression"].quest_progressions
        ]
        facts = sorted(str(fact) for fact in self._state["_facts"])
        parts = (facts, progress, bool(self._state["won"]), bool(self._state["lost"]), self._asked)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def _observe(self, message: str, invalid: str | None) -> Observation:
        state, highest = self._state, self._game.max_score
        score, won = float(state["score"] or 0), bool(state["won"])
        share = score / highest if highest and highest != float("inf") else 0.0
        return Observation(
            text=self._text(message),
            state_key=self._key(),
            score=score,
            outcome=1.0 if won else min(max(share, 0.0), 1.0),
            done=self._over(),
            success=won,
            invalid=invalid,
        )

    def _text(self, message: str) -> str:
        room = _tidy(self._state["description"] or "")
        if self.options.observe == "feedback" or self._over():
            return message or room
        carried = _tidy(self._state["inventory"] or "")
        besides = [part for part in (room, carried) if part not in message]
        return "\n".join(part for part in (message, *besides) if part)


def _refusal(command: str) -> tuple[str, str] | None:
    """Answer and reason for a command that is not sent to the game, or None."""
    words = command.lower().split()
    if words and words[0] in BLOCKED:
        return f"The command {words[0]!r} is not allowed here.", "blocked"
    if not command.isascii() or not command.isprintable() or len(command) > MAX_CHARS or not words:
        return "I don't understand that command.", "unknown_command"
    if "then" in words or any(mark in command for mark in '.,;:"'):
        return "One plain command at a time, please.", "several_commands"
    return None


def _unreadable(feedback: str) -> bool:
    return feedback.startswith(_UNKNOWN)


def _tidy(text: str) -> str:
    """Lines without the blank ones between them, and without the interpreter's status line."""
    text = _STATUS.sub("", text)
    return "\n".join(line.strip() for line in text.strip().splitlines() if line.strip())
