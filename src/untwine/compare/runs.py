"""Find the runs of a comparison, group them into arms, and read what their evaluations found.

An arm is what is trained alike: runs whose recipes differ in nothing but the seed and in what does
not touch the result. The folder of a sweep names its arms itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from untwine.config import Recipe
from untwine.errors import CheckpointError, ConfigError
from untwine.evaluate.command import recorded_evaluations
from untwine.evaluate.identity import model_digest
from untwine.report.run_data import RunData, load_run
from untwine.training.run_dir import run_recipe

SWEEP_FILE = "sweep.json"
COLD_ARM = "cold start"
_NEUTRAL = {
    "name": ...,
    "seed": ...,
    "checkpoint": ...,
    "evaluate": ...,
    "diagnose": ...,
    "policy": {"threads", "device"},
    "env": {"workers", "sessions", "timeout_s"},
}
"""Keys that do not make an arm: seed, names, and how and where the work is done."""

Key = tuple[str, str]
"""Set and decoding of an evaluation."""


@dataclass(frozen=True)
class Run:
    """One finished run of an arm.

    results  evaluations after the last iteration by (set, decoding): candidates, the newest last
    """

    data: RunData
    recipe: Recipe
    arm: str
    results: Mapping[Key, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.data.path

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @cached_property
    def start(self) -> str | None:
        """Digest of the weights that the iterations began with; None when they are not kept."""
        return model_digest(self.path / ("initial" if self.recipe.rl.iterations else "model"))


@dataclass(frozen=True)
class Found:
    """Runs in the order of their arms, and a sentence for everything that was left out."""

    runs: list[Run]
    notes: list[str]

    @property
    def arms(self) -> dict[str, list[Run]]:
        arms: dict[str, list[Run]] = {}
        for run in self.runs:
            arms.setdefault(run.arm, []).append(run)
        return arms


def find_runs(paths: Sequence[Path]) -> Found:
    """The runs in `paths`: run directories, folders that hold some, folders of sweeps.

    Raises CheckpointError for a path that holds no run, and when no run is fit to be compared.
    """
    listed: list[tuple[Path, str | None]] = []
    notes: list[str] = []
    for path in paths:
        listed += _sweep_runs(path, notes) if (path / SWEEP_FILE).is_file() else _plain_runs(path)
    listed = list({path.resolve(): (path, arm) for path, arm in listed}.values())
    labels = _labels([run_recipe(path) for path, arm in listed if arm is None])
    runs: list[Run] = []
    for path, arm in listed:
        recipe = run_recipe(path)
        label = labels[_arm_key(recipe)] if arm is None else arm
        run = _read(path, recipe, label, notes)
        twin = next((r for r in runs if run and _twins(r, run)), None)
        if run and twin:
            notes.append(f"{path} has arm, seed and cold start of {twin.path} and was left out.")
        elif run:
            runs.append(run)
    if not runs:
        why = " ".join(notes) or "No run was named."
        raise CheckpointError(f"there is nothing to compare. {why}")
    _note_missing_seeds(runs, notes)
    runs.sort(key=lambda run: run.arm.startswith(COLD_ARM))
    return Found(runs, notes)


def paired(ours: Sequence[Run], theirs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """The runs of two arms that have seed and cold start in common, in the order of `ours`."""
    known: dict[tuple[int, str | None], Run]
    known = {(run.seed, run.start): run for run in theirs if run.start}
    return [(run, other) for run in ours if (other := known.get((run.seed, run.start)))]


def _plain_runs(path: Path) -> list[tuple[Path, str | None]]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; give run directories, or the folder of a sweep")
    if (path / "recipe.yaml").is_file():
        return [(path, None)]
    found = sorted(file.parent for file in path.rglob("recipe.yaml") if _is_run(file.parent))
    if not found:
        raise CheckpointError(f"{path} holds no run directory")
    return [(run, None) for run in found]


def _sweep_runs(path: Path, notes: list[str]) -> list[tuple[Path, str | None]]:
    """The runs of a sweep with the names of their arms; those that are not there yet are noted."""
    found: list[tuple[Path, str | None]] = []
    for entry in read_sweep(path):
        run = path / entry["folder"]
        if _is_run(run):
            found.append((run, entry["arm"]))
        else:
            notes.append(f"{entry['arm']}, seed {entry['seed']}: not begun.")
    return found


def read_sweep(path: Path) -> list[dict[str, Any]]:
    """The planned runs of a sweep folder: `folder`, `arm`, `seed` of each."""
    file = path / SWEEP_FILE
    try:
        runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
        return [{"folder": r["folder"], "arm": r["arm"], "seed": int(r["seed"])} for r in runs]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}); start the sweep again to have it written anew"
        ) from error


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and (path / "run.json").is_file()


def _read(path: Path, recipe: Recipe, arm: str, notes: list[str]) -> Run | None:
    """A run with its last evaluations, or None with a note that says why not."""
    data = load_run(path)
    who = f"{arm}, seed {recipe.seed} ({path})"
    if data.info.get("status") != "finished":
        notes.append(f"{who}: not finished, continue it with `untwine train --resume {path}`.")
        return None
    last = data.info.get("iterations", recipe.rl.iterations)
    phase, step = ("rl", last) if last else ("cold_start", None)
    rows = [
        row
        for row in data.evaluate
        if row.get("phase") == phase and (step is None or row["step"] == step)
    ]
    results: dict[Key, list[Mapping[str, Any]]] = {}
    for row in [*rows, *recorded_evaluations(path)]:
        if identity := row.get("identity"):
            results.setdefault((str(row["set"]), identity["decoding"]), []).append(row)
    if not results:
        old = "one of an older version only" if rows else "none"
        notes.append(
            f"{who}: no evaluation after the last iteration ({old}), make one with "
            f"`untwine evaluate {path}`."
        )
        return None
    return Run(data, recipe, arm, results)


def _twins(one: Run, other: Run) -> bool:
    """Whether two runs would count the same training twice."""
    same = (one.arm, one.seed) == (other.arm, other.seed)
    return same and one.start == other.start


def _note_missing_seeds(runs: Sequence[Run], notes: list[str]) -> None:
    """A word on every arm that lacks a seed which another one has, or has one twice."""
    arms: dict[str, list[int]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run.seed)
    everyone = sorted({seed for seeds in arms.values() for seed in seeds})
    for arm, seeds in arms.items():
        if missing := [str(seed) for seed in everyone if seed not in seeds]:
            word = "seed" if len(missing) == 1 else "seeds"
            notes.append(f"{arm} lacks {word} {', '.join(missing)}.")


# Arms of runs that no sweep has named


def _labels(recipes: Sequence[Recipe]) -> dict[str, str]:
    """A name for each arm, by its key: the name its runs share, or else the keys that differ."""
    names: dict[str, set[str]] = {}
    trees: dict[str, dict[str, str]] = {}
    for recipe in recipes:
        key = _arm_key(recipe)
        names.setdefault(key, set()).add(recipe.name)
        trees[key] = dict(_leaves(json.loads(key)))
    shared = [next(iter(own)) for own in names.values() if len(own) == 1]
    if len(shared) == len(names) == len(set(shared)):
        return dict(zip(names, shared, strict=True))
    if len(names) == 1:
        return {key: sorted(own)[0] for key, own in names.items()}
    everything = sorted({leaf for tree in trees.values() for leaf in tree})
    differing = [k for k in everything if len({tree.get(k) for tree in trees.values()}) > 1]
    return {
        key: ", ".join(f"{k}={tree[k]}" for k in differing if k in tree)
        for key, tree in trees.items()
    }


def _arm_key(recipe: Recipe) -> str:
    """Equal for the runs of one arm. A model that another run made stands for that run's recipe, so
    that cold starts of different seeds are alike."""
    tree = recipe.model_dump(mode="json")
    for section, keys in _NEUTRAL.items():
        if keys is ...:
            tree.pop(section)
        else:
            tree[section] = {k: v for k, v in tree[section].items() if k not in keys}  # type: ignore[operator]
    origin = Path(recipe.policy.model).parent
    if _is_run(origin):
        tree["policy"]["model"] = json.loads(_arm_key(run_recipe(origin)))
    return json.dumps(tree, sort_keys=True)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)


# One evaluation set for all


@dataclass(frozen=True)
class Evaluation:
    """One evaluation set, with the row of every run; the rows have equal digests."""

    set: str
    decoding: str
    identity: Mapping[str, Any]
    rows: Mapping[Path, Mapping[str, Any]]

    @property
    def title(self) -> str:
        return self.set if self.decoding == "sampled" else f"{self.set}, {self.decoding}"


def common_evaluations(
    found: Found, sets: Sequence[str] = ()
) -> tuple[list[Evaluation], list[str]]:
    """The evaluation sets that all runs were examined on, and notes on those left out.

    sets  which ones are wanted; by default all that every run has
    ConfigError when one that is wanted, or every one, differs between the runs.
    """
    keys = list(dict.fromkeys(key for run in found.runs for key in run.results))
    wanted = [key for key in keys if not sets or key[0] in sets]
    for name in sets:
        if name not in {key[0] for key in keys}:
            known = ", ".join(dict.fromkeys(key[0] for key in keys))
            raise ConfigError(
                f"no run was evaluated on {name}; they were on {known}, and "
                f"`untwine evaluate RUN --sets {name}` makes up for it"
            )
    evaluations, notes = [], []
    for key in wanted:
        lacking = [run for run in found.runs if key not in run.results]
        if lacking:
            notes.append(f"{' '.join(key)}: left out, {lacking[0].path} was not evaluated on it.")
            continue
        evaluations.append(_common(key, found.runs))
    if not evaluations:
        raise ConfigError(
            f"the runs have no evaluation set in common ({' '.join(notes)}); evaluate all of them "
            "on the same sets with `untwine evaluate RUN --sets ...`"
        )
    return evaluations, notes


def _common(key: Key, runs: Sequence[Run]) -> Evaluation:
    """The largest set that all runs share under this name, each run with its newest result."""
    by_run = [{row["identity"]["digest"]: row for row in run.results[key]} for run in runs]
    shared = set.intersection(*[set(rows) for rows in by_run])
    if not shared:
        first = runs[0].results[key][-1]["identity"]
        other = next(
            run for run, rows in zip(runs, by_run, strict=True) if first["digest"] not in rows
        )
        raise ConfigError(
            f"the evaluation sets differ, so the runs cannot be compared: on {key[0]} ({key[1]}) "
            f"{runs[0].path} and {other.path} differ in "
            f"{_difference(first, other.results[key][-1]['identity'])}; evaluate them alike with "
            f"`untwine evaluate RUN --sets {key[0]} --episodes N`"
        )
    digest = max(sorted(shared), key=lambda d: int(by_run[0][d]["identity"]["episodes"]))
    rows = {run.path: own[digest] for run, own in zip(runs, by_run, strict=True)}
    return Evaluation(*key, identity=by_run[0][digest]["identity"], rows=rows)


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    keys = ("environment", "options", "max_steps", "episodes")
    parts = [f"{k} ({one[k]} and {other[k]})" for k in keys if one[k] != other[k]]
    return ", ".join(parts) or "the instances that were played"
