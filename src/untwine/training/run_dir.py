"""The run directory: everything a run leaves behind.

RUN/
  recipe.yaml     the recipe as resolved
  run.json        versions, machine, seed, command, status
  metrics.jsonl   one JSON object per line; `stage` is cold_start, rl or evaluate
  tensorboard/    the same numbers
  episodes/       every episode of every iteration (episodes.py)
  diagnose/       what `untwine diagnose`, and training itself, found (diagnose/)
  evaluations.jsonl  what `untwine evaluate` found
  judge.jsonl     answers of a judge (gcd/sources/judge.py)
  checkpoints/    state to continue from (checkpoint.py)
  initial/        the policy as the iterations began, an ordinary Hugging Face folder
  model/          the policy at the end, the same
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch

import untwine
from untwine.config import Recipe, load_recipe
from untwine.episodes import write_groups
from untwine.errors import CheckpointError, ConfigError
from untwine.records import Group

_NO_NUMBERS = {"stage", "step", "time", "set", "identity"}
# what each result is shown with: name there -> name in the lines of both stages
_TOKENS = {
    "imitation": "imitation_tokens",
    "policy": "policy_tokens",
    "sampled": "sampled_tokens",
    "gcd": "gcd_tokens",
    "gcd_sampled": "gcd_sampled_tokens",
    "labels": "label_tokens",
}
_SECONDS = {
    "cold_start": "seconds",
    "rollout": "seconds_rollout",
    "labels": "seconds_labels",
    "update": "seconds_update",
    "gcd": "seconds_gcd",
}


class RunDir:
    """Writes a run directory. Make one with `create` or `resume`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = _count_lines(path / "metrics.jsonl")
        self._totals: Counter[str] = Counter()
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        _claim(self._metrics, path)
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(path / "tensorboard"))

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunDir:
        """A fresh directory. CheckpointError when `path` already holds something, unless it is a
        run that failed before anything came of it."""
        if _nothing_came_of(path):
            shutil.rmtree(path)
        if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
            raise CheckpointError(
                f"{path} already exists; choose another --run, continue it with --resume, "
                "or delete it first"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"no run can be written to {path} ({error.strerror}); choose another --run"
            ) from error
        run = cls(path)
        run.describe(
            name=recipe.name,
            seed=recipe.seed,
            untwine=untwine.__version__,
            torch=torch.__version__,
            python=platform.python_version(),
            platform=platform.platform(),
            cpus=os.cpu_count(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            command=" ".join(["untwine", *sys.argv[1:]]),
            status="running",
        )
        return run

    @classmethod
    def resume(cls, path: Path, recipe: Recipe, metric_lines: int, first_iteration: int) -> RunDir:
        """Reopen a directory and take back what was written after the checkpoint. CheckpointError
        when another process is at work in it."""
        if not (path / "metrics.jsonl").is_file():
            raise CheckpointError(
                f"{path} has lost its metrics.jsonl; put it back, or make an empty file to go on "
                "without what was measured"
            )
        with (path / "metrics.jsonl").open("rb") as stream:
            _claim(stream, path)
            lines = stream.read().splitlines(keepends=True)
        _replace_text(path / "recipe.yaml", recipe.to_yaml())
        _replace(path / "metrics.jsonl", b"".join(lines[:metric_lines]))
        for file in [*path.glob("episodes/iter-*"), *path.glob("diagnose/*-iter-*")]:
            if int(file.name.partition("iter-")[2][:6]) >= first_iteration:
                file.unlink()
        shutil.rmtree(path / "tensorboard", ignore_errors=True)
        run = cls(path)
        for row in _whole_rows(lines[:metric_lines]):
            run._take(row)
        run.describe(status="running")
        return run

    @property
    def metric_lines(self) -> int:
        return self._lines

    def describe(self, **values: Any) -> None:
        """Merge values into run.json."""
        known = run_info(self.path)
        _replace_text(self.path / "run.json", json.dumps(known | values, indent=2))

    def log(self, stage: str, step: int, **values: Any) -> None:
        """Append one line of metrics."""
        record = {"stage": stage, "step": step, "time": round(time.time(), 3), **values}
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        self._lines += 1
        self._take(record)

    def cost(self) -> dict[str, dict[str, float]]:
        """Tokens and seconds spent so far, by purpose, over both stages and all parts of a resumed
        run. What is not used is left out."""
        return _cost(self._totals)

    def _take(self, record: dict[str, Any]) -> None:
        """Add up what a line of metrics cost, and draw it."""
        _add_up(self._totals, record)
        self._draw(record)

    def _draw(self, record: dict[str, Any]) -> None:
        """Put one line of metrics into the TensorBoard file."""
        tag = f"{record['stage']}/{record['set']}" if "set" in record else record["stage"]
        values = {k: v for k, v in record.items() if k not in _NO_NUMBERS}
        for name, value in _scalars(values):
            self._board.add_scalar(f"{tag}/{name}", value, record["step"], record.get("time"))

    def save_groups(self, iteration: int, groups: Sequence[Group]) -> Path:
        """Write the episodes of an iteration; the path of the file."""
        path = self.path / "episodes" / f"iter-{iteration:06d}.jsonl.gz"
        write_groups(path, groups)
        return path

    def close(self, status: str) -> None:
        self.describe(status=status)
        self._metrics.close()
        self._board.close()


def run_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run directory. CheckpointError when `path` is none."""
    if not (path / "recipe.yaml").is_file():
        raise CheckpointError(f"{path} is no run directory: it holds no recipe.yaml")
    return load_recipe(path / "recipe.yaml", overrides)


def resumed_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with which a run goes on. ConfigError when it names another model: the weights are
    those of the run, so its recipe would no longer be true."""
    before, after = run_recipe(path), run_recipe(path, overrides)
    for key in ("model", "tiny"):
        if getattr(before.policy, key) != getattr(after.policy, key):
            raise ConfigError(
                f"--resume goes on with the model of the run, so policy.{key} cannot change; begin "
                "a run of its own with --run for another model"
            )
    return after


def episode_files(path: Path) -> list[Path]:
    """Episode files of a run directory, oldest first."""
    return sorted((path / "episodes").glob("iter-*.jsonl.gz"))


def _claim(stream: IO[Any], path: Path) -> None:
    """Hold a lock on the metrics of a run as long as they are open."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(
            f"another process is at work in {path}; wait for its end, or stop it"
        ) from error


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of an old one."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(target)
    new.replace(target)


def finish_replacing(new: Path, target: Path) -> None:
    """Do what a kill in the middle of `replace_folder` left undone: the old folder is gone, and the
    new one, which was finished before, is not there yet."""
    if new.is_dir() and not target.exists():
        new.replace(target)


def metric_rows(run: Path, stage: str) -> list[dict[str, Any]]:
    """Rows of one stage of a run, in order; one that is still under way may end in half a line.
    Lines that are damaged are left out."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    return [row for row in _whole_rows(lines) if row["stage"] == stage]


def _whole_rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The lines that say of what stage and step they are."""
    for line in lines:
        row = _json_object(line)
        if "stage" in row and isinstance(row.get("step"), int):
            yield row


def run_cost(run: Path) -> dict[str, dict[str, float]]:
    """What a run has spent in all, as `RunDir.cost`."""
    totals: Counter[str] = Counter()
    for stage in ("cold_start", "rl"):
        for row in metric_rows(run, stage):
            _add_up(totals, row)
    return _cost(totals)


def _add_up(totals: Counter[str], record: Mapping[str, Any]) -> None:
    for key in (*_TOKENS.values(), *_SECONDS.values()):
        value = record.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            totals[key] += record[key]


def _cost(totals: Counter[str]) -> dict[str, dict[str, float]]:
    return {
        name: {k: totals[key] for k, key in keys.items() if totals[key]}
        for name, keys in (("cost_tokens", _TOKENS), ("cost_seconds", _SECONDS))
    }


def run_info(run: Path) -> dict[str, Any]:
    """run.json, or {} when there is none, or it is damaged."""
    file = run / "run.json"
    return _json_object(file.read_bytes()) if file.is_file() else {}


def _json_object(text: bytes) -> dict[str, Any]:
    """What a file or line says; {} when it is no JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _nothing_came_of(path: Path) -> bool:
    """Whether a run failed here before it had measured anything, as with a missing model."""
    made = {"recipe.yaml", "run.json", "metrics.jsonl", "tensorboard", "model"}
    return (
        path.is_dir()
        and {"run.json", "metrics.jsonl"} <= {file.name for file in path.iterdir()} <= made
        and run_info(path).get("status") == "failed"
        and not (path / "metrics.jsonl").stat().st_size
    )


def _replace_text(file: Path, text: str) -> None:
    """Write a file whole, or leave the old one."""
    _replace(file, text.encode())


def _replace(file: Path, content: bytes) -> None:
    scratch = file.with_suffix(".partial")
    scratch.write_bytes(content)
    scratch.replace(file)


def _scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + name, float(value)))
    return found


def _count_lines(file: Path) -> int:
    return len(file.read_bytes().splitlines()) if file.exists() else 0
