"""`untwine games import DIR`: check every game of a dataset once, and keep the result beside it.

The index is written to `untwine-index.json` in the folder that holds the splits. Environments read
it instead of every file, which for the full dataset saves minutes at the start of each process.
Games that are added later are seen after another import.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from untwine.envs.alfworld.game_file import TASK_TYPES, DatasetIndex, index_dataset, read_json
from untwine.errors import EnvError
from untwine.progress import Display

INDEX_NAME = "untwine-index.json"
FORMAT = 1


def import_games(folder: Path, console: Console | None = None) -> DatasetIndex:
    """Check and index a dataset, show the counts, and write the index.

    EnvError when the folder has no games, or the index cannot be written into it.
    """
    console = console or Console()
    with Display() as display, display.bar("reading games", total=0, unit="games") as bar:
        index = index_dataset(folder, lambda done, total, _: bar.update(done, total), check=True)
    path = write_index(index)
    console.print(_table(index))
    for reason, count in index.reasons().items():
        console.print(f"left out {count}: {reason}", highlight=False, markup=False)
    console.print(f"{index.count} games; index: {path}", highlight=False, soft_wrap=True)
    return index


def write_index(index: DatasetIndex) -> Path:
    """Write an index beside its games. EnvError when the folder cannot be written to."""
    games: dict[str, dict[str, list[str]]] = {}
    for split, types in index.games.items():
        games[split] = {kind: _names(index.folder, files) for kind, files in types.items()}
    names = _names(index.folder, [path for path, _ in index.skipped])
    skipped = [[name, why] for name, (_, why) in zip(names, index.skipped, strict=True)]
    tree = {"format": FORMAT, "games": games, "skipped": skipped}
    path = index.folder / INDEX_NAME
    try:
        path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvError(f"index {path} cannot be written: {error.strerror}") from error
    return path


def read_index(folder: Path) -> DatasetIndex | None:
    """The index of a folder of splits, or None when it was never imported. EnvError if damaged."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    tree = read_json(path, f"index {path}")
    try:
        if tree["format"] != FORMAT:
            raise ValueError("it is of another version")
        games: dict[str, dict[str, tuple[Path, ...]]] = {}
        for split, types in tree["games"].items():
            games[split] = {kind: _paths(folder, names) for kind, names in types.items()}
        skipped = tuple((_inside(folder, p), str(why)) for p, why in tree["skipped"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnvError(
            f"index {path} is damaged ({error}); write it anew with untwine games import {folder}"
        ) from error
    return DatasetIndex(folder, games, skipped)


def _names(folder: Path, paths: Sequence[Path]) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def _paths(folder: Path, names: Sequence[str]) -> tuple[Path, ...]:
    return tuple(_inside(folder, name) for name in names)


def _inside(folder: Path, name: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is outside of the folder")
    return folder / name


def _table(index: DatasetIndex) -> Table:
    table = Table("task type", *index.games)
    for kind in TASK_TYPES:
        table.add_row(kind, *(str(len(types.get(kind, ()))) for types in index.games.values()))
    return table
