"""The built-in games: 4080 synthetic ones, kept as the seeds they are drawn from.

`pack.json` has a line for each task type and split, and in it for each game the seed, the room, the
types of the object and its target, and a digest of the game. Loading a game draws it again
(generate.py), which takes milliseconds, and compares the digest: what is played is what was packed.

    python -m untwine.envs.alfworld.pack

writes `pack.json` and SHA256SUMS anew, the same bytes each time. Every game is then checked with
the oracle: it can be won, and is not won at the start. The room, object and target of a held-out
game come in no game of another split and in no other held-out game, whatever the task types; the
games of `valid_unseen` are in rooms of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from untwine.envs.alfworld.game import Game
from untwine.envs.alfworld.game_file import TASK_TYPES
from untwine.envs.alfworld.games import SPLIT_FOLDERS, Shelf, kin_of
from untwine.envs.alfworld.generate import SCENES_FILE, SyntheticGame, draw_game, solved
from untwine.envs.alfworld.oracle import shortest_plan
from untwine.envs.cache import default_cache
from untwine.envs.checksums import checksum_of, read_checked, write_checksums
from untwine.envs.protocol import Split
from untwine.errors import EnvError

FOLDER = Path(__file__).parent
PACK_NAME = "pack.json"
FORMAT = 1
COUNTS: dict[Split, int] = {"train": 600, "dev": 40, "test": 40}  # games of each task type
MEND = "reinstall untwine, or build the pack anew with python -m untwine.envs.alfworld.pack"
TRIES = 50  # seeds per game that is wanted


class Row(NamedTuple):
    """One game of the pack. `target` is the type of the receptacle, or of the lamp."""

    seed: int
    scene: int
    obj: str
    target: str
    digest: str

    @property
    def kin(self) -> str:
        return kin_of(self.scene, self.obj, self.target)


def row_of(seed: int, game: SyntheticGame) -> Row:
    return Row(seed, game.scene, game.obj, game.target, game.digest)


Rows = dict[tuple[str, Split], tuple[Row, ...]]


class PackGames:
    """The games of a pack: the built-in one, or that of another folder."""

    title = "ALFWorld (synthetic games)"

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder

    @cached_property
    def _content(self) -> bytes:
        return read_checked(self._folder / PACK_NAME)

    @cached_property
    def _shelf(self) -> Shelf[Row]:
        return Shelf(read_pack(self._content), "the built-in games")

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        return self._shelf.variations(task, split)

    def row(self, task: str, variation: int) -> Row:
        """What the pack holds of a game. EnvError when there is no such game."""
        return self._shelf.find(task, variation)[1]

    def draw(self, task: str, variation: int) -> SyntheticGame:
        """The game itself. EnvError when it is not the one that was packed."""
        split, row = self._shelf.find(task, variation)
        game = draw_game(task, SPLIT_FOLDERS[split], row.seed)
        if game is None or row_of(row.seed, game) != row:
            raise EnvError(
                f"{self.name(task, variation)} is not the one that was packed (digest "
                f"{row.digest}): the generator has changed since; {MEND}"
            )
        return game

    def load(self, task: str, variation: int) -> Game:
        return self.draw(task, variation).build()

    def path(self, task: str, variation: int) -> Path:
        """Writes the game, with its walkthrough, into the cache folder when first asked for.

        EnvError when the cache cannot be written.
        """
        split, _ = self._shelf.find(task, variation)
        root = default_cache() / f"alfworld-pack-{self.fingerprint()[:12]}" / SPLIT_FOLDERS[split]
        game = self.draw(task, variation)
        path = game.path_in(root)
        if not path.is_file():
            plan = shortest_plan(game.build(), self.name(task, variation))
            try:
                replace(game, walkthrough=plan).write(root)
            except OSError as error:
                raise EnvError(f"cannot write a game into {root}: {error.strerror}") from error
        return path

    def name(self, task: str, variation: int) -> str:
        return f"synthetic game {task}/{variation}"

    def walkthrough(self, task: str, variation: int) -> tuple[str, ...]:
        return shortest_plan(self.load(task, variation), self.name(task, variation))

    def kin(self, task: str, variation: int) -> str:
        return self.row(task, variation).kin

    def fingerprint(self) -> str:
        """Of the pack, and of the rooms and rules that all its games share."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return checksum_of(self._content + read_checked(SCENES_FILE))


def read_pack(content: bytes) -> Rows:
    """The rows of a `pack.json`. EnvError when it is not well formed."""
    try:
        tree = json.loads(content)
        if tree["format"] != FORMAT:
            raise ValueError(f"it has format {tree['format']}, not {FORMAT}")
        return {
            (line["task"], line["split"]): tuple(_row(text) for text in line["games"])
            for line in tree["lines"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise EnvError(f"{PACK_NAME} is not well formed: {error}; {MEND}") from error


def _row(text: str) -> Row:
    seed, scene, obj, target, digest = text.split(" ")
    return Row(int(seed), int(scene), obj, target, digest)


def pack_bytes(rows: Rows) -> bytes:
    """The inverse of `read_pack`: a line for each task type and split."""
    lines = [
        json.dumps(
            {"task": task, "split": split, "games": [" ".join(map(str, row)) for row in own]}
        )
        for (task, split), own in rows.items()
    ]
    return "\n".join([f'{{"format": {FORMAT}, "lines": [', ",\n".join(lines), "]}", ""]).encode()


def draw_pack(counts: Mapping[Split, int] = COUNTS) -> Rows:
    """Draw and check the games of a pack. The same counts give the same rows."""
    rows: Rows = {}
    taken: set[str] = set()  # kin of the held-out games
    order: tuple[Split, ...] = ("dev", "test", "train")
    for split in order:
        for task in TASK_TYPES:
            rows[task, split] = _draw_rows(task, split, counts[split], taken)
    return {(task, split): rows[task, split] for task in TASK_TYPES for split in SPLIT_FOLDERS}


def _draw_rows(task: str, split: Split, count: int, taken: set[str]) -> tuple[Row, ...]:
    """The first `count` games by their seeds that can be won and whose kin is not taken. Held-out
    games take theirs."""
    found: list[Row] = []
    for seed in range(TRIES * count):
        if len(found) == count:
            break
        game = draw_game(task, SPLIT_FOLDERS[split], seed)
        if game is None:
            continue
        row = row_of(seed, game)
        if row.kin in taken or not solved(game):
            continue
        found.append(row)
        if split != "train":
            taken.add(row.kin)
    if len(found) < count:
        raise EnvError(f"only {len(found)} of {count} games of {task} in {SPLIT_FOLDERS[split]}")
    return tuple(found)


def write_pack(folder: Path = FOLDER, counts: Mapping[Split, int] = COUNTS) -> Path:
    """Draw a pack and write it, with its checksum, into a folder."""
    path = folder / PACK_NAME
    path.write_bytes(pack_bytes(draw_pack(counts)))
    write_checksums(folder, [PACK_NAME])
    return path


if __name__ == "__main__":
    write_checksums(FOLDER, [SCENES_FILE.name])  # as it is now, since games are drawn from it
    print(write_pack())
