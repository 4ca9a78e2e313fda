"""The real ALFWorld engine (textworld's PddlEnv with alfworld's names) behind our small interface.

Needs the extra `alfworld`. It is not thread-safe, changes `sys.argv` and swaps `sys.stdout` while
it loads (both are put back here), and cannot be copied, so `snapshot` is the list of commands so
far and `restore` plays them again. Use it in worker processes only.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from untwine.envs.alfworld.engine import Turn
from untwine.envs.alfworld.text import NOTHING
from untwine.errors import EnvError, install


class Replay(NamedTuple):
    """A snapshot of the real engine: the commands that lead there, from the start."""

    commands: tuple[str, ...]


class StockEngine:
    """One live game of the real engine. Same methods as `engine.Engine`."""

    def __init__(self, path: str | Path) -> None:
        textworld, pddl_env, demangler = _modules()
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        self._env: Any = demangler(pddl_env(infos))
        self.load(path)

    def load(self, path: str | Path) -> None:
        """Change to another game, which costs less memory than a second engine."""
        self._commands: tuple[str, ...] = ()
        self._state: Any = None
        try:
            with _kept_process():
                self._env.load(str(path))
        except (Exception, SystemExit) as error:
            raise EnvError(
                f"game file {path}: the real engine cannot load it: {type(error).__name__} "
                f"{str(error)[:200]}"
            ) from error

    def reset(self) -> Turn:
        with _kept_process():
            self._state = self._env.reset()
        self._commands = ()
        won = bool(self._state["won"])
        return Turn(str(self._state.feedback), int(won), won, True)

    def step(self, command: str) -> Turn:
        self._state, score, _ = self._env.step(command)
        text = str(self._state.feedback)
        valid = text != NOTHING
        if valid:
            self._commands = (*self._commands, command)
        return Turn(text, int(score), bool(self._state["won"]), valid)

    def admissible(self) -> tuple[str, ...]:
        return tuple(self._state["admissible_commands"])

    def key(self) -> str:
        """Checksum of the engine's facts; visits (`checked`) do not count, as they change nothing.

        `not_` facts of `inreceptacle` count, as `look` depends on them.
        """
        kept = sorted(
            str(fact)
            for fact in self._state["_facts"]
            if fact.name != "checked"
            and (not fact.name.startswith("not_") or fact.name == "not_inreceptacle")
        )
        return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:32]

    def snapshot(self) -> Replay:
        return Replay(self._commands)

    def restore(self, snapshot: Replay) -> Turn:
        """Play the commands of a snapshot again; the text is what the last one says."""
        turn = self.reset()
        for command in snapshot.commands:
            turn = self.step(command)
        return turn

    def close(self) -> None:
        """Forget the engine. The planner's library stays loaded: unloading it crashes."""
        self._env = self._state = None


def _modules() -> tuple[Any, Any, Any]:
    try:
        with _kept_process():
            import textworld
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld.envs.pddl import PddlEnv
    except ImportError as error:
        raise EnvError(
            f"the real ALFWorld engine is not installed ({error}); {install('alfworld')}, or use "
            "engine: native"
        ) from error
    return textworld, PddlEnv, AlfredDemangler


@contextmanager
def _kept_process() -> Iterator[None]:
    """Undo what the real engine does to its process.

    Its translator overwrites sys.argv, and sys.stdout when it fails; alfworld sets $ALFWORLD_DATA.
    """
    argv, stdout, data = sys.argv, sys.stdout, os.environ.get("ALFWORLD_DATA")
    try:
        yield
    finally:
        sys.argv, sys.stdout = argv, stdout
        if data is None:
            os.environ.pop("ALFWORLD_DATA", None)
        else:
            os.environ["ALFWORLD_DATA"] = data
