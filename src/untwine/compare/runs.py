"""Find the runs of a comparison, group them into arms, and read what their evaluations found.

An arm is what is trained alike: runs whose recipes differ in nothing but the seed and in what does
not touch the result. The folder of a sweep names its arms itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from untwine.compare.arms import arm_key, arm_labels, differences, is_run
from untwine.compare.results import Key, Results, evaluate_command, lacking_tasks, read_results
from untwine.config import Recipe
from untwine.errors import CheckpointError, ConfigError, UntwineError
from untwine.evaluate.identity import model_digest
from untwine.report.run_data import RunData, load_run, number
from untwine.report.shape import Misshapen, shaped
from untwine.training.run_dir import run_recipe

SWEEP_FILE = "sweep.json"
COLD_ARM = "cold start"
_ENTRY = {"folder": str, "arm": str, "seed": int}


@dataclass(frozen=True)
class Run:
    """One finished run of an arm.

    results  evaluations after the last iteration by (set, decoding): candidates, the newest last
    """

    data: RunData
    recipe: Recipe
    arm: str
    results: Results = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.data.path

    @property
    def seed(self) -> int:
        return self.recipe.seed

    def total(self, *keys: str) -> float:
        """Sum of these metrics over all iterations; what was not recorded counts as 0."""
        return sum(number(row.get(key)) or 0.0 for row in self.data.rl for key in keys)

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
    recipes = _recipes(listed, notes)
    labels = _labels(listed, recipes, notes)
    runs: list[Run] = []
    for path in labels:
        run = _read(path, recipes[path][0], labels[path], notes)
        twin = next((r for r in runs if run and _twins(r, run)), None)
        if run and twin:
            notes.append(f"{path} has arm, seed and cold start of {twin.path} and was left out.")
        elif run:
            runs.append(run)
            if run.start is None:
                notes.append(
                    f"{run.arm}, seed {run.seed} ({path}): the weights it began with are missing "
                    "or damaged, so it is in no pair."
                )
    runs = _complete(runs, notes)
    if not runs:
        why = " ".join(notes) or "No run was named."
        raise CheckpointError(f"there is nothing to compare. {why}")
    planned = {path for path, arm in listed if arm}  # what lacks there is noted by now
    _note_missing_seeds([run for run in runs if run.path not in planned], notes)
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
    found = sorted(file.parent for file in path.rglob("recipe.yaml") if is_run(file.parent))
    if not found:
        raise CheckpointError(f"{path} holds no run directory")
    return [(run, None) for run in found]


def _sweep_runs(path: Path, notes: list[str]) -> list[tuple[Path, str | None]]:
    """The runs of a sweep with the names of their arms; those that are not there yet are noted."""
    found: list[tuple[Path, str | None]] = []
    for entry in read_sweep(path):
        run = path / entry["folder"]
        if is_run(run):
            found.append((run, entry["arm"]))
        else:
            notes.append(f"{entry['arm']}, seed {entry['seed']}: not begun.")
    return found


def read_sweep(path: Path) -> list[dict[str, Any]]:
    """The planned runs of a sweep folder: `folder`, `arm`, `seed` of each."""
    file = path / SWEEP_FILE
    try:
        tree = shaped(json.loads(file.read_bytes()), {"runs": [_ENTRY]})
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, Misshapen) else "it is not JSON"
        raise CheckpointError(
            f"{file} is damaged ({why}); start the sweep again to have it written anew"
        ) from error
    runs: list[dict[str, Any]] = tree["runs"]
    return runs


def _recipes(
    listed: Sequence[tuple[Path, str | None]], notes: list[str]
) -> dict[Path, tuple[Recipe, str]]:
    """Recipe and key of the arm of each run; one that cannot be read is left out with a note."""
    found: dict[Path, tuple[Recipe, str]] = {}
    for path, arm in listed:
        try:
            recipe = run_recipe(path)
            try:
                key = arm_key(recipe, path)
            except UntwineError:  # of its cold start; the sweep has named the arm
                if arm is None:
                    raise
                key = json.dumps({"name": arm})
            found[path] = (recipe, key)
        except UntwineError as error:
            notes.append(f"{path}: left out, since {error}")
    return found


def _labels(
    listed: Sequence[tuple[Path, str | None]],
    recipes: Mapping[Path, tuple[Recipe, str]],
    notes: list[str],
) -> dict[Path, str]:
    """The name of the arm of each run: what its sweep calls it, or else what `arm_labels` says. A
    name that stands for different recipes is told apart by what differs, with a note."""
    own = arm_labels({path: recipes[path] for path, arm in listed if not arm and path in recipes})
    labels = {path: arm or own[recipes[path][1]] for path, arm in listed if path in recipes}
    keys: dict[str, dict[str, None]] = {}
    for path, label in labels.items():
        keys.setdefault(label, {})[recipes[path][1]] = None
    for label, arms in keys.items():
        if len(arms) > 1:
            apart = differences(arms)
            notes.append(
                f"{label} stands for runs with different recipes, which are no arm together; they "
                f"are compared apart, by {_keys_of(apart.values())}."
            )
            for path, name in labels.items():
                if name == label:
                    labels[path] = f"{label} ({apart[recipes[path][1]]})"
    return labels


def _keys_of(descriptions: Iterable[str]) -> str:
    keys = [part.partition("=")[0] for text in descriptions for part in text.split(", ")]
    return ", ".join(dict.fromkeys(key for key in keys if key))


def _read(path: Path, recipe: Recipe, arm: str, notes: list[str]) -> Run | None:
    """A run with its last evaluations, or None with a note that says why not."""
    data = load_run(path)
    who = f"{arm}, seed {recipe.seed} ({path})"
    if data.info.get("status") != "finished":
        why = "not finished" if data.info else "its run.json is missing or damaged"
        notes.append(f"{who}: {why}, continue it with `untwine train --resume {path}`.")
        return None
    results = read_results(data, recipe, who, notes)
    return Run(data, recipe, arm, results) if results else None


def _complete(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """The runs without results that lack a task which the same evaluation has in other runs."""
    for run, tasks in zip(runs, lacking_tasks([run.results for run in runs]), strict=True):
        if tasks:
            notes.append(
                f"{run.arm}, seed {run.seed} ({run.path}): left out a damaged evaluation, it lacks "
                f"{tasks}; make it anew with `{evaluate_command(run.data, run.recipe)}`."
            )
    return [run for run in runs if run.results]


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


def rows_on(
    runs: Sequence[Run], name: str, decoding: str = "sampled"
) -> Mapping[Path, Mapping[str, Any]]:
    """The row of each run on an evaluation set, the same for all; ConfigError when there is
    none."""
    key = (name, decoding)
    for run in runs:
        if key not in run.results:
            raise ConfigError(f"{run.path} was not evaluated on {name}")
    fit = [replace(run, results={key: run.results[key]}) for run in runs]
    (evaluation,), _ = common_evaluations(Found(fit, []), [name])
    return evaluation.rows


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
    parts = [f"{k} ({one.get(k)} and {other.get(k)})" for k in keys if one.get(k) != other.get(k)]
    if not parts and one.get("content") != other.get("content"):
        return "the games that the folder holds"
    return ", ".join(parts) or "the instances that were played"
