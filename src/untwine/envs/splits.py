"""Split files: which task instances to train on, and which to be examined on.

A split file names sets of (task, variation). The default files have five of them:

    train   the train variations of the tasks that are seen in training, without a tenth of them
    L0      that tenth: same tasks, same distribution, never trained on
    dev     the dev variations of the seen tasks
    L1      the test variations of the seen tasks
    L2      the test variations of the held-out tasks, of which nothing is ever seen in training

They are committed as `splits_data/<env>-<name>.json`, with their checksums in
`splits_data/SHA256SUMS` (`sha256sum --check` reads it), so that a score always belongs to known
instances: a packaged file that differs from its checksum is refused. A file of your own is given
by its path and needs no checksum.

The tenth is every tenth variation. Where the catalogue has `kin`, it is a tenth of the groups of
kin instead, chosen by a checksum of their names, so that what is alike is never in both sets, not
even as another task.

The default sets are computed, by the same rule, when other tasks are to be held out, and when the
options of the environment choose other instances than those the packaged file is for. A family
without a packaged file gets its default sets in this way, too: `env.held_out_tasks` (`[]`: none).

To give an environment family a default split file, let its catalogue have an attribute
`held_out_tasks` (a tuple of task names) and run

    python -m untwine.envs.splits

which writes `<family>-default.json` for every such family, and SHA256SUMS; doing so twice changes
nothing. Other files: `write_splits(env, name, description, sets, held_out_tasks)`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untwine.envs.checksums import checksum_of, known_checksums, write_checksums
from untwine.envs.protocol import Catalogue, Split
from untwine.envs.registry import family_names, get_catalogue, get_family
from untwine.errors import EnvError, nearest
from untwine.records import TaskRef

FOLDER = Path(__file__).parent / "splits_data"
DEFAULT = "default"
EVERY = 10  # one in ten train variations, or kin, goes to L0
Sets = dict[str, dict[str, tuple[int, ...]]]  # set -> task -> variations


@dataclass(frozen=True)
class SplitFile:
    """Named sets of task instances of one environment family; no instance is in two sets.

    checksum  sha256 of the file, or of the sets that were computed; kept with the run
    """

    name: str
    env: str
    description: str
    held_out_tasks: tuple[str, ...]
    sets: Sets
    checksum: str

    def refs(self, set_name: str, tasks: Sequence[str] = (), limit: int = 0) -> tuple[TaskRef, ...]:
        """The instances of a set, by task (all of them, or those in `tasks`) and variation.

        limit  the first so many variations of each task; 0 means all

        EnvError for an unknown set or task, and for a task that is not in the set.
        """
        if set_name not in self.sets:
            known = ", ".join(self.sets)
            raise EnvError(
                f"split file {self.name!r} of {self.env} has no set {set_name!r}, only {known}."
                + nearest(set_name, self.sets)
            )
        chosen = self.sets[set_name]
        for task in tasks:
            if task not in chosen:
                raise EnvError(self._why_not(task, set_name))
        return tuple(
            TaskRef(self.env, task, variation)
            for task in dict.fromkeys(tasks or chosen)
            for variation in chosen[task][: limit or None]
        )

    def _why_not(self, task: str, set_name: str) -> str:
        holders = [name for name, tasks in self.sets.items() if task in tasks]
        if holders:
            return (
                f"task {task!r} is not in set {set_name!r} of split file {self.name!r}; "
                f"it is in {', '.join(holders)}"
            )
        known = dict.fromkeys(t for tasks in self.sets.values() for t in tasks)
        return f"unknown task {task!r} of environment {self.env!r}.{nearest(task, known)}"


def load_splits(
    env: str,
    name_or_path: str | Path,
    options: Mapping[str, Any] | None = None,
    held_out_tasks: Sequence[str] | None = None,
) -> SplitFile:
    """The packaged split file of that name, or the file at a path (with a `/` or ending in .json).

    options         those of the environment, which may choose other instances
    held_out_tasks  other held-out tasks than those of the default file; None for those

    EnvError when there is none, when it is of another environment, differs from its checksum, is
    not well formed, names instances that do not exist, or has an instance in two sets (also where
    the sets are computed); and for unknown held-out tasks, or such with a split file that is not
    the default one.
    """
    catalogue, text = get_catalogue(env, options), str(name_or_path)
    if text == DEFAULT:
        instances = _other_instances(env, catalogue)
        if instances or held_out_tasks is not None:
            return _computed(env, catalogue, held_out_tasks, instances)
    elif held_out_tasks is not None:
        raise EnvError(
            f"env.held_out_tasks needs env.splits: {DEFAULT}, since the file {text!r} says itself "
            "which tasks it holds out"
        )
    packaged = not (text.endswith(".json") or "/" in text or "\\" in text)
    path = _packaged_path(env, text, catalogue) if packaged else Path(text)
    splits = _read(path, packaged)
    if splits.env != env:
        raise EnvError(f"split file {path} is for environment {splits.env!r}, not {env!r}")
    _check(splits, f"split file {path}", catalogue)
    return splits


def _other_instances(env: str, catalogue: Catalogue) -> str:
    """The fingerprint of a catalogue whose instances are not those of the packaged files, or ""."""
    taken = getattr(catalogue, "fingerprint", None)
    if taken is None:
        return ""
    own = str(taken())
    usual = get_catalogue(env).fingerprint()  # type: ignore[attr-defined]
    return "" if own == usual else own


def _computed(
    env: str, catalogue: Catalogue, held_out_tasks: Sequence[str] | None, instances: str
) -> SplitFile:
    """The default sets of a catalogue. With the same instances and held-out tasks, the checksum is
    that of the packaged file."""
    if held_out_tasks is None:
        held_out_tasks = getattr(catalogue, "held_out_tasks", ())
    tasks = catalogue.tasks()
    for task in held_out_tasks:
        if task not in tasks:
            raise EnvError(
                f"env.held_out_tasks: environment {env!r} has no task {task!r}."
                f"{nearest(task, tasks)}"
            )
    held_out = tuple(task for task in tasks if task in held_out_tasks)
    sets = default_sets(catalogue, held_out)
    tree = _tree(env, DEFAULT, _description(env, catalogue), sets, held_out)
    content = _bytes({**tree, "instances": instances} if instances else tree)
    splits = SplitFile(DEFAULT, env, tree["description"], held_out, sets, checksum_of(content))
    _check(splits, f"variations(task, split) of environment {env!r}", catalogue)
    return splits


def _packaged_path(env: str, name: str, catalogue: Catalogue) -> Path:
    """EnvError for an unknown name."""
    path = FOLDER / _file_name(env, name)
    if not path.is_file():
        before = _file_name(env, "").removesuffix(".json")
        names = [p.stem.removeprefix(before) for p in sorted(FOLDER.glob(f"{before}*.json"))]
        mend = f"known are {', '.join(names)}.{nearest(name, names)}"
        if not names:
            held_out = ",".join(getattr(catalogue, "held_out_tasks", ()))
            keep = "" if name == DEFAULT else f" with env.splits={DEFAULT}"
            mend = (
                f"set env.held_out_tasks=[{held_out}]{keep} to have the sets made from its "
                "catalogue, or env.splits to the path of a split file of your own (FILE.json)"
            )
        raise EnvError(f"environment {env!r} has no split file {name!r}; {mend}")
    return path


def _file_name(env: str, name: str) -> str:
    """A colon ("my_module:FAMILY") is not allowed in file names everywhere."""
    return f"{env.replace(':', '.')}-{name}.json"


def _read(path: Path, packaged: bool) -> SplitFile:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EnvError(f"split file {path} cannot be read: {error.strerror}") from error
    checksum = checksum_of(content)
    if packaged and known_checksums(FOLDER).get(path.name) != checksum:
        raise EnvError(
            f"split file {path.name} differs from its checksum in SHA256SUMS; reinstall untwine, "
            "or give a changed copy by its path"
        )
    return _parse(content, checksum, path)


def _parse(content: bytes, checksum: str, path: Path) -> SplitFile:
    try:
        tree = json.loads(content)
        sets = {
            str(set_name): {str(task): parse_ranges(text) for task, text in tasks.items()}
            for set_name, tasks in tree["sets"].items()
        }
        return SplitFile(
            name=str(tree["name"]),
            env=str(tree["env"]),
            description=str(tree["description"]),
            held_out_tasks=tuple(tree["held_out_tasks"]),
            sets=sets,
            checksum=checksum,
        )
    except KeyError as error:
        raise EnvError(f"split file {path} lacks {error}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise EnvError(f"split file {path} is not well formed: {error}") from error


def _check(splits: SplitFile, where: str, catalogue: Catalogue) -> None:
    """EnvError for an instance that does not exist or is in two sets."""
    owner: dict[tuple[str, int], str] = {}
    for set_name, tasks in splits.sets.items():
        for task, variations in tasks.items():
            missing = set(variations).difference(catalogue.variations(task))
            if missing:
                raise EnvError(f"{where}: {task} has no variation {min(missing)}")
            for variation in variations:
                other = owner.setdefault((task, variation), set_name)
                if other != set_name:
                    raise EnvError(f"{where}: {task}/{variation} is in both {other} and {set_name}")


def default_sets(catalogue: Catalogue, held_out_tasks: Sequence[str]) -> Sets:
    """The five sets described above, from a family's own train, dev and test variations."""
    sets: Sets = {name: {} for name in ("train", "L0", "dev", "L1", "L2")}
    for task in catalogue.tasks():
        of: dict[Split, tuple[int, ...]] = {
            split: catalogue.variations(task, split) for split in ("train", "dev", "test")
        }
        if task in held_out_tasks:
            sets["L2"][task] = of["test"]
            continue
        sets["L0"][task] = _tenth(catalogue, task, of["train"])
        sets["train"][task] = tuple(v for v in of["train"] if v not in sets["L0"][task])
        sets["dev"][task] = of["dev"]
        sets["L1"][task] = of["test"]
    return {
        name: {task: variations for task, variations in tasks.items() if variations}
        for name, tasks in sets.items()
    }


def _tenth(catalogue: Catalogue, task: str, variations: tuple[int, ...]) -> tuple[int, ...]:
    kin = getattr(catalogue, "kin", None)
    if kin is None:
        return variations[EVERY - 1 :: EVERY]
    return tuple(v for v in variations if int(checksum_of(kin(task, v).encode()), 16) % EVERY == 0)


def write_splits(
    env: str,
    name: str,
    description: str,
    sets: Mapping[str, Mapping[str, Iterable[int]]],
    held_out_tasks: Sequence[str] = (),
    folder: Path = FOLDER,
) -> Path:
    """Write `<env>-<name>.json` and its line in SHA256SUMS. The same input gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _file_name(env, name)
    path.write_bytes(_bytes(_tree(env, name, description, sets, held_out_tasks)))
    write_checksums(folder, [path.name])
    return path


def _tree(
    env: str,
    name: str,
    description: str,
    sets: Mapping[str, Mapping[str, Iterable[int]]],
    held_out_tasks: Sequence[str],
) -> dict[str, Any]:
    return {
        "name": name,
        "env": env,
        "description": description,
        "held_out_tasks": list(held_out_tasks),
        "sets": {
            set_name: {task: format_ranges(variations) for task, variations in tasks.items()}
            for set_name, tasks in sets.items()
        },
    }


def _bytes(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()


def parse_ranges(text: str) -> tuple[int, ...]:
    """`"0-2,5"` is (0, 1, 2, 5). ValueError for anything else, or numbers that do not rise."""
    numbers: list[int] = []
    for part in text.split(",") if text else ():
        first, dash, last = part.partition("-")
        numbers.extend(range(int(first), int(last if dash else first) + 1))
    if sorted(set(numbers)) != numbers:
        raise ValueError(f"the numbers of {text!r} do not rise")
    return tuple(numbers)


def format_ranges(numbers: Iterable[int]) -> str:
    """The inverse of `parse_ranges`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)


def write_default_splits(folder: Path = FOLDER) -> list[Path]:
    """Write the default split file of every family whose catalogue names `held_out_tasks`."""
    written = []
    for env in family_names():
        catalogue = get_family(env).catalogue
        held_out = getattr(catalogue, "held_out_tasks", None)
        if held_out is not None:
            sets = default_sets(catalogue, held_out)
            description = _description(env, catalogue)
            written.append(write_splits(env, DEFAULT, description, sets, held_out, folder))
    return written


def _description(env: str, catalogue: Catalogue) -> str:
    tenth = f"every {EVERY}th"
    if hasattr(catalogue, "kin"):
        tenth = f"one in {EVERY} groups of alike instances, over all tasks"
    return (
        f"Default sets of {env}: train and L0 from the train variations of the seen "
        f"tasks (L0 has {tenth}), dev and L1 from their dev and test "
        f"variations, L2 from the test variations of the held-out tasks."
    )


if __name__ == "__main__":
    for written_path in write_default_splits():
        print(written_path)
