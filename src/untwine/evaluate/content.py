"""Games that are no part of the package, and the evaluations that play them.

Where games come from a folder, number 3 of a task is another game in another folder. So the
identity of an evaluation holds a checksum of the very games that are played, and not where they
lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from untwine.config import EnvConfig
from untwine.envs.registry import get_catalogue
from untwine.errors import EnvError
from untwine.records import TaskRef

Options = Mapping[str, Any]


class Content(NamedTuple):
    """checksum  of the games that are played, in the order of the instances
    place     the options that only say where they lie"""

    checksum: str
    place: tuple[str, ...]


class _Folder(NamedTuple):
    """The option that names a folder of games, and the files of an instance; none where it is made
    by the package."""

    option: str
    files: Callable[[Options, TaskRef], Sequence[Path]]


def _alfworld(options: Options, ref: TaskRef) -> Sequence[Path]:
    from untwine.envs.alfworld.games import games_of

    data = options.get("data")
    return [games_of(data).path(ref.task, ref.variation)] if data else []


def _textworld(options: Options, ref: TaskRef) -> Sequence[Path]:
    from untwine.envs.textworld.catalogue import FILES
    from untwine.envs.textworld.games import own_game

    if ref.task != FILES:
        return []
    story = own_game(options.get("games", ""), ref.variation)
    return [story, story.with_suffix(".json")]


_FOLDERS = {"alfworld": _Folder("data", _alfworld), "textworld": _Folder("games", _textworld)}


def outside_content(env: EnvConfig, refs: Sequence[TaskRef]) -> Content | None:
    """What is played that the package does not fix; None when it fixes everything.

    Of other families than those above, the fingerprint of the catalogue counts where the options
    change it (envs/protocol.py). EnvError when a game cannot be read.
    """
    folder = _FOLDERS.get(env.name)
    if folder is None:
        taken = _fingerprint(env, env.options)
        return Content(taken, ()) if taken and taken != _fingerprint(env, {}) else None
    sums = [
        _checksum(path) for ref in dict.fromkeys(refs) for path in folder.files(env.options, ref)
    ]
    if not sums:
        return None
    return Content(hashlib.sha256("".join(sums).encode()).hexdigest(), (folder.option,))


def _fingerprint(env: EnvConfig, options: Options) -> str | None:
    taken = getattr(get_catalogue(env.name, options), "fingerprint", None)
    return None if taken is None else str(taken())


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise EnvError(f"game file {path} cannot be read: {error.strerror}") from error
