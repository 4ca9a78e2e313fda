"""Game files: made on demand, kept on disk, and checked before the engine gets them.

A game is two files: `NAME.z8` for the Z-machine and `NAME.json` with the world, the quests and the
walkthrough. Games are made in a folder of their own and then moved, the `.z8` last, so that a
`.z8` in the cache is always complete, whoever else makes the same game at the same time.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from untwine.envs.textworld.catalogue import SPLIT_RANGES, TASKS
from untwine.errors import EnvError, install

MEND = install("textworld")
MAX_BYTES = 16 * 2**20  # of a .json; those of tw-make have some ten thousand
_HEADER = 64  # bytes, The Z-Machine Standards Document 1.1, section 11


def engine() -> Any:
    """The package textworld. EnvError when it is not installed."""
    try:
        import textworld
    except ImportError as error:
        raise EnvError(f"the package textworld is missing ({error}): {MEND}") from error
    return textworld


def cached_game(task: str, variation: int, cache: Path) -> Path:
    """The `.z8` of a task instance, made now if need be (about one second, 0.5 MB on disk).

    EnvError without TextWorld, or when the cache cannot be written.
    """
    folder = cache / f"textworld-{engine().__version__}" / task
    path = folder / f"{variation}.z8"
    if path.is_file() and path.with_suffix(".json").is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{variation}-") as scratch:
            made = Path(scratch) / path.name
            make_game(task, variation, made)
            made.with_suffix(".json").replace(path.with_suffix(".json"))
            made.replace(path)
    except OSError as error:
        raise EnvError(f"cannot make a TextWorld game in {folder}: {error.strerror}") from error
    return path


def make_game(task: str, variation: int, path: Path) -> None:
    """Generate and compile one game, as `tw-make` does with `--seed VARIATION`."""
    textworld = engine()
    from textworld.challenges import CHALLENGES
    from textworld.generator import compile_game
    from textworld.generator import make_game as make_custom

    generator, settings = TASKS[task]
    options = textworld.GameOptions()
    options.seeds = variation
    options.path = str(path)
    options.grammar.only_last_action = True  # the goal, not the way to it
    if generator == "custom":
        for name, value in settings.items():
            setattr(options, name, value)
        game = make_custom(options)
    else:
        examined = variation in SPLIT_RANGES["test"]  # `simple` has other foods for its test games
        game = CHALLENGES[generator][1]({**settings, "test": examined}, options)
    if not game.walkthrough:  # derived from the quests here, and then stored with the game
        raise AssertionError(f"{task}/{variation} has no walkthrough")
    compile_game(game, options)


def own_game(folder: str, variation: int) -> Path:
    """A game file of the user's folder, by its place in the order of names.

    EnvError when there is no such folder, no such file, or one that cannot be played.
    """
    if not folder:
        raise EnvError("the task 'files' needs the option games: a folder with .z8 files")
    root = Path(folder)
    if not root.is_dir():
        raise EnvError(f"there is no folder {root} to take TextWorld games from")
    found = sorted(p for p in root.iterdir() if p.suffix in (".z8", ".ulx"))
    if variation >= len(found):
        raise EnvError(f"folder {root} has {len(found)} game files, so there is no {variation}th")
    return found[variation]


def load_game(path: Path) -> Any:
    """The world, quests and walkthrough of a game (a `textworld.Game`), and the `.z8` checked.

    EnvError with the file and the fault when it is missing, truncated, damaged, of another kind,
    or was not made by TextWorld.
    """
    if path.suffix == ".ulx":
        raise EnvError(f"{path} is a Glulx game, which TextWorld 1.7 no longer plays; make a .z8")
    _check_story(path)
    return _read_game(path.with_suffix(".json"))


def _check_story(path: Path) -> None:
    """The header of the story file: version, length and checksum."""
    try:
        story = path.read_bytes()
    except OSError as error:
        raise EnvError(f"game file {path} cannot be read: {error.strerror}") from error
    if len(story) < _HEADER or story[0] != 8:
        raise EnvError(f"{path} is no .z8 game file (version 8 of the Z-machine)")
    length = int.from_bytes(story[0x1A:0x1C]) * 8
    if length > len(story) or length < _HEADER:
        raise EnvError(f"game file {path} is truncated: {len(story)} of {length} bytes")
    if sum(story[_HEADER:length]) % 65536 != int.from_bytes(story[0x1C:0x1E]):
        raise EnvError(f"game file {path} is damaged: its checksum is wrong")


def _read_game(path: Path) -> Any:
    textworld = engine()
    if not path.is_file():
        raise EnvError(f"the game has no {path} beside it; `tw-make` writes both files")
    if path.stat().st_size > MAX_BYTES:
        raise EnvError(f"{path} is larger than {MAX_BYTES // 2**20} MiB, so no game of tw-make")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        missing = {"KB", "world", "quests", "infos", "grammar"} - set(tree)
    except (OSError, ValueError, TypeError) as error:
        raise EnvError(f"{path} is not well formed: {error}") from error
    except RecursionError as error:
        raise EnvError(f"{path} is not well formed: nested too deep") from error
    if missing or not isinstance(tree, dict):
        raise EnvError(f"{path} is no TextWorld game: it lacks {', '.join(sorted(missing))}")
    try:
        return textworld.Game.deserialize(tree)
    except Exception as error:  # of any kind: the reader of TextWorld trusts its input
        raise EnvError(
            f"{path} is no TextWorld game: {type(error).__name__}: {str(error)[:200]}"
        ) from error
