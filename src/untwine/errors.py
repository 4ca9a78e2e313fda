"""Errors that a user can mend.

Every fault that comes from outside the code (a recipe, a file, a model folder, an environment, a
machine without Java) is raised as an `UntwineError`: one sentence that says what is wrong and how
to mend it. The command line prints the sentence and leaves with `exit_code`; nobody sees a
traceback for a typing mistake.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class UntwineError(Exception):
    """A fault the user can mend. `str(error)` is the sentence that is shown."""

    exit_code: int = 1


class ConfigError(UntwineError):
    """A recipe or an override is wrong (broken YAML, unknown key, wrong type or value)."""

    exit_code = 2


class EnvError(UntwineError):
    """An environment cannot be started, or a task or variation does not exist."""

    exit_code = 3


class ModelError(UntwineError):
    """A model cannot be loaded, or is not one this code can train exactly."""

    exit_code = 4


class CheckpointError(UntwineError):
    """A checkpoint or run directory is missing, truncated or of another run."""

    exit_code = 5


class Interrupted(UntwineError):
    """A signal asked the run to stop; everything finished so far has been saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


def install(extra: str) -> str:
    """The command that installs an extra, in the checkout."""
    return f".venv/bin/pip install -c constraints.txt -e '.[{extra}]'"


def complaint(problem: Mapping[str, Any]) -> str:
    """What pydantic finds wrong with a value, and the value, as the end of a sentence.

    problem  one of `ValidationError.errors()`
    """
    message = str(problem["msg"]).removeprefix("Value error, ")
    shown = repr(problem["input"])
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return f"{message[0].lower() + message[1:]} (got {shown})"


def nearest(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known word nearest to `word`, or an empty string."""
    return meant(closest(word, known))


def closest(word: str, known: Iterable[str], least: float = 0.5) -> list[str]:
    """The known word nearest to `word`; none where none is as like it as `least`."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=least)


def meant(words: Sequence[str]) -> str:
    """`" Did you mean 'x' or 'y'?"`, or an empty string for no words."""
    return f" Did you mean {' or '.join(map(repr, words))}?" if words else ""
