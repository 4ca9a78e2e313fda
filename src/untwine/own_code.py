"""Code of the user's own, named in recipes and commands as "module:attribute"."""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from untwine.errors import UntwineError


def is_own(name: str) -> bool:
    """Whether a name in a recipe is the place of the user's own code."""
    return ":" in name


def own_module(
    what: str, target: str, example: str, error: type[UntwineError], *, here: bool = True
) -> tuple[ModuleType, str]:
    """The module of "module:attribute", and the name of the attribute, which need not be there.

    what     said first when it fails, such as "environment 'mine:FAMILY'"
    example  the attribute of the example that is shown then
    error    raised with one sentence when the form is wrong or the module cannot be imported
    here     it may lie in the current folder, too
    """
    name, _, attribute = target.partition(":")
    parts = name.split(".")
    if not all(part.isidentifier() for part in [*parts, attribute]) or parts[-1] == "py":
        raise error(
            f"{what}: {target!r} is not of the form module:attribute; write the module with dots "
            f"and without .py, such as my_folder.my_module:{example}"
        )
    if here:
        with contextlib.suppress(OSError):  # the current folder may be gone
            folder = str(Path.cwd())
            if folder not in sys.path:
                sys.path.insert(0, folder)  # before all others, where `python -m` has it
    try:
        return importlib.import_module(name), attribute
    except (Exception, SystemExit) as failure:
        missing = failure.name if isinstance(failure, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            top = missing.partition(".")[0]
            raise error(
                f"{what}: there is no module {missing!r} "
                + ("in the current folder or on Python's path; " if here else "on Python's path; ")
                + (f"start untwine in the folder that holds {top!r}, or " if here else "")
                + f"name the folder that holds {top!r} in PYTHONPATH"
            ) from failure
        raise error(
            f"{what}: importing module {name!r} failed with {_cause(failure)}; mend the module and "
            "try again"
        ) from failure


def own_callable(
    what: str, target: str, example: str, error: type[UntwineError]
) -> Callable[..., Any]:
    """The function or class "module:attribute"; arguments and errors as in `own_module`."""
    module, attribute = own_module(what, target, example, error)
    found: Any = getattr(module, attribute, None)
    if not callable(found):
        raise error(f"{what}: {place_of(module)} has no function {attribute!r}")
    return found  # type: ignore[no-any-return]


def table(found: object) -> list[list[Any]]:
    """What a function of the user's has returned, as rows; none where it is no table. What it
    raises while it is read is its own error."""
    rows = list(found) if isinstance(found, Iterable) else []
    if not all(isinstance(row, Iterable) for row in rows):
        return []
    return [list(row) for row in rows]


def cut_short(value: object) -> str:
    """How a value is written in a sentence about it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def place_of(module: ModuleType) -> str:
    """The module and its file, as a sentence names them."""
    where = f"module {module.__name__!r}"
    file = getattr(module, "__file__", None)
    return f"{where} ({file})" if file else where


def _cause(error: BaseException) -> str:
    """What was raised, and where: `ZeroDivisionError: division by zero (mine.py, line 3)`."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__)
        and not frame.filename.startswith("<frozen")
    ]
    if not frames or isinstance(error, SyntaxError):  # the latter says it itself
        return text
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
