"""Official ALFWorld game files: `game.tw-pddl`, with `traj_data.json` beside it when there is one.

The layout is the one that `alfworld-download` fetches:

    FOLDER/json_2.1.1/{train,valid_seen,valid_unseen}/TASK-OBJECT-.../trial_.../game.tw-pddl

`load_game(path)` reads one game, `index_dataset(folder)` finds those of a folder and says which
files it leaves out and why. Like the stock loader, it leaves out games with movable receptacles
and sliced objects, those marked unsolvable, and those not yet marked at all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untwine.envs.alfworld.game import Game, build_game
from untwine.envs.alfworld.grammar import read_phrases
from untwine.envs.alfworld.problem import read_problem
from untwine.errors import EnvError

MAX_BYTES = 20_000_000  # official files have about 100 kB
GAME_NAME, TRAJECTORY_NAME = "game.tw-pddl", "traj_data.json"
TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
SPLITS = ("train", "valid_seen", "valid_unseen")


@dataclass(frozen=True, slots=True)
class GameFile:
    """A game file as read, before its problem is parsed.

    problem, grammar, domain  the texts of the file
    solvable     None in older files, which do not say
    walkthrough  commands that solve it, when the file has them
    task_type    from traj_data.json, or else from the name of the folder; "" when neither knows
    task_id, scene   from traj_data.json ("" and None without it)
    """

    path: Path
    problem: str
    grammar: str
    domain: str
    solvable: bool | None
    walkthrough: tuple[str, ...] | None
    task_type: str
    task_id: str
    scene: int | None


def load_game(path: str | Path) -> Game:
    """The game of a `game.tw-pddl`. EnvError, naming the file and the fault, when it has one."""
    file = read_game_file(path)
    return game_of(file)


def game_of(file: GameFile) -> Game:
    """The tables of a game file. EnvError as in `load_game`."""
    where = f"game file {file.path}"
    phrases = read_phrases(file.grammar, file.domain, where)
    return build_game(read_problem(file.problem, where), phrases, where)


def read_game_file(path: str | Path) -> GameFile:
    """The fields of a game file. EnvError when it is no game file, or larger than MAX_BYTES."""
    path = Path(path)
    where = f"game file {path}"
    tree = read_json(path, where)
    texts = {}
    for key in ("pddl_problem", "grammar", "pddl_domain"):
        text = tree.get(key)
        if not isinstance(text, str):
            raise EnvError(
                f"{where} has no text {key!r}: it is not an ALFWorld game; "
                "fetch the games again with alfworld-download"
            )
        texts[key] = text
    trajectory = _trajectory(path)
    scene = _at(trajectory, "scene", "scene_num")
    task_type = trajectory.get("task_type") or _type_of_folder(path)
    return GameFile(
        path=path,
        problem=texts["pddl_problem"],
        grammar=texts["grammar"],
        domain=texts["pddl_domain"],
        solvable=tree["solvable"] if isinstance(tree.get("solvable"), bool) else None,
        walkthrough=_walkthrough(tree.get("walkthrough")),
        task_type=task_type if isinstance(task_type, str) else "",
        task_id=str(trajectory.get("task_id", "")),
        scene=scene if isinstance(scene, int) else None,
    )


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON object from a file of at most MAX_BYTES, which is checked before it is read."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise EnvError(
                f"{where} has {size / 1e6:.0f} MB; games have at most {MAX_BYTES / 1e6:.0f} MB, "
                "so this is another file or a damaged one"
            )
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise EnvError(f"{where} cannot be read: {error.strerror}") from error
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise EnvError(f"{where} is not JSON, or is truncated: {fault}") from error
    if not isinstance(tree, dict):
        raise EnvError(f"{where} holds no JSON object: it is not an ALFWorld file")
    return tree


def _trajectory(path: Path) -> dict[str, Any]:
    beside = path.with_name(TRAJECTORY_NAME)
    return read_json(beside, f"file {beside}") if beside.is_file() else {}


def _at(tree: Mapping[str, Any], *keys: str) -> Any:
    found: Any = tree
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _walkthrough(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, list) and value and all(isinstance(x, str) for x in value):
        return tuple(value)
    return None


def _type_of_folder(path: Path) -> str:
    for folder in path.parts[:-1][::-1]:
        kind = folder.partition("-")[0]
        if kind in TASK_TYPES:
            return kind
    return ""


@dataclass(frozen=True, slots=True)
class DatasetIndex:
    """Which games a folder has.

    games    split -> task type -> files, in the order of their paths; splits and types without
             games are left out
    skipped  (file, reason) of every file left out
    """

    folder: Path
    games: Mapping[str, Mapping[str, tuple[Path, ...]]]
    skipped: tuple[tuple[Path, str], ...]

    @property
    def count(self) -> int:
        return sum(len(files) for types in self.games.values() for files in types.values())

    def reasons(self) -> dict[str, int]:
        """How many files were left out for which reason, most frequent first."""
        return dict(Counter(reason for _, reason in self.skipped).most_common())


def data_folder(data: str) -> Path:
    """The folder that holds the splits: `data`, or json_2.1.* within.

    EnvError when there is no split in it.
    """
    root = Path(data).expanduser()
    for folder in (root, *sorted(root.glob("json_2.1.*"), reverse=True)):
        if any((folder / split).is_dir() for split in SPLITS):
            return folder
    raise EnvError(
        f"folder {root} has no ALFWorld games: it has none of {', '.join(SPLITS)}, nor a "
        "json_2.1.1 with them; alfworld-download fetches them"
    )


def index_dataset(
    folder: str | Path,
    on_progress: Callable[[int, int, Path], None] | None = None,
    check: bool = False,
) -> DatasetIndex:
    """Find the games of a dataset.

    folder       one that holds `train`, `valid_seen` or `valid_unseen` (see `data_folder`)
    on_progress  called after each file with how many are done, how many there are, and its path
    check        also build each game, and leave out those that cannot be played, with the fault
    """
    root = data_folder(str(folder))
    files = [(split, path) for split in SPLITS for path in _game_paths(root / split)]
    games: dict[str, dict[str, list[Path]]] = {}
    skipped = []
    for number, (split, path) in enumerate(files, 1):
        task_type, reason = _judge(path, check)
        if reason:
            skipped.append((path, reason))
        else:
            games.setdefault(split, {}).setdefault(task_type, []).append(path)
        if on_progress is not None:
            on_progress(number, len(files), path)
    ordered = {
        split: {kind: tuple(types[kind]) for kind in TASK_TYPES if kind in types}
        for split, types in games.items()
    }
    return DatasetIndex(root, ordered, tuple(skipped))


def _game_paths(folder: Path) -> Iterator[Path]:
    """Where games are or should be: every folder with a game or a trajectory in it."""
    found = {path.with_name(GAME_NAME) for path in folder.rglob(TRAJECTORY_NAME)}
    found.update(folder.rglob(GAME_NAME))
    yield from sorted(found)


def _judge(path: Path, check: bool) -> tuple[str, str]:
    """The task type of a game, and the reason to leave it out or an empty string."""
    # as in the stock loader, the whole path counts
    if "movable" in str(path) or "Sliced" in str(path):
        return "", "movable receptacle or sliced object (not supported by ALFWorld either)"
    if not path.is_file():
        return "", "no game.tw-pddl beside traj_data.json"
    try:
        file = read_game_file(path)
        if file.task_type not in TASK_TYPES:
            return "", f"task type {file.task_type[:60]!r} is none of the six"
        if file.solvable is None:
            return file.task_type, "does not say whether it is solvable"
        if not file.solvable:
            return file.task_type, "marked as not solvable"
        if check:
            game_of(file)
    except EnvError as error:
        return "", str(error).replace(f"game file {path}", "damaged")
    return file.task_type, ""
