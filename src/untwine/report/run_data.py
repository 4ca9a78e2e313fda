"""Read a run directory, forgiving what a crash may leave behind.

A report is wanted most when a run went wrong, so only a folder that is no run directory at all is
an error. A torn last line of `metrics.jsonl`, a missing recipe, an unreadable episode file: each is
left out and named in `RunData.problems`, which the report shows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untwine.errors import CheckpointError
from untwine.evaluate.recorded import RECORDED, recorded_evaluations
from untwine.records import Group

Row = Mapping[str, Any]

STAGES = ("cold_start", "rl", "evaluate")
_EPISODE_FILE = re.compile(r"iter-(\d+)\.jsonl\.gz")


@dataclass(frozen=True)
class RunData:
    """What one run directory says.

    info         run.json, or {} when it is missing
    recipe       recipe.yaml as text, or ""
    cold_start, rl, evaluate
                 rows of metrics.jsonl by stage, one per step and in order
    evaluated    what `untwine evaluate` found for the policy the run ends with, oldest first
    episodes     (iteration, file) of the recorded episodes, in order
    problems     one sentence for everything that could not be read
    """

    path: Path
    name: str
    info: Row
    recipe: str
    cold_start: tuple[Row, ...]
    rl: tuple[Row, ...]
    evaluate: tuple[Row, ...]
    evaluated: tuple[Row, ...]
    episodes: tuple[tuple[int, Path], ...]
    problems: tuple[str, ...]


def number(value: object) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def load_run(path: str | Path) -> RunData:
    """Read the run directory `path`; raises CheckpointError when it is none."""
    path = Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; give a run directory, the folder that holds metrics.jsonl"
        )
    metrics, recipe_file = path / "metrics.jsonl", path / "recipe.yaml"
    if not any(file.is_file() for file in (metrics, recipe_file, path / "run.json")):
        raise CheckpointError(
            f"{path} is not a run directory: it holds no run.json, recipe.yaml or metrics.jsonl"
        )
    problems: list[str] = []
    info = _read_info(path / "run.json", problems)
    recipe = _read_text(recipe_file, problems) or ""
    rows = _read_metrics(metrics, problems)
    evaluated, others = recorded_evaluations(path)
    if others:
        problems.append(
            f"Left out of {RECORDED}: {others} about another policy than the one the run ends with."
        )
    return RunData(
        path=path,
        name=str(info.get("name") or path.resolve().name),
        info=info,
        recipe=recipe,
        cold_start=_by_step(rows, "cold_start"),
        rl=_by_step(rows, "rl"),
        evaluate=_by_step(rows, "evaluate"),
        evaluated=tuple(evaluated),
        episodes=_episode_files(path / "episodes"),
        problems=tuple(problems),
    )


def load_groups(path: Path) -> list[Group]:
    """The recorded groups of one iteration: the only place where a report reads episodes."""
    from untwine.episodes import read_groups

    return list(read_groups(path))


def _read_text(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing.")
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror}).")
    return None


def _read_info(path: Path, problems: list[str]) -> dict[str, Any]:
    text = _read_text(path, problems)
    if text is None:
        return {}
    try:
        info = json.loads(text)
    except ValueError:
        info = None
    if not isinstance(info, dict):
        problems.append("run.json is not a JSON object and was left out.")
        return {}
    return info


def _read_metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    text = _read_text(path, problems)
    lines = [line for line in (text or "").split("\n") if line.strip()]
    rows, broken = [], []
    for index, line in enumerate(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(index)
    if broken == [len(lines) - 1]:
        problems.append("The last line of metrics.jsonl is torn and was left out.")
    elif broken:
        problems.append(f"{len(broken)} lines of metrics.jsonl are unreadable and were left out.")
    return rows


def _by_step(rows: Iterable[Row], stage: str) -> tuple[Row, ...]:
    """Rows of one stage in order; where a resumed run wrote a step again, the last one counts."""
    kept: dict[tuple[float, str, str], Row] = {}
    for row in rows:
        step = number(row.get("step"))
        if row.get("stage") == stage and step is not None:
            what = (str(row.get("set", "")), str(row.get("phase", "")))
            kept[(step, *what)] = row
    return tuple(kept[key] for key in sorted(kept, key=lambda key: key[0]))


def _episode_files(folder: Path) -> tuple[tuple[int, Path], ...]:
    if not folder.is_dir():
        return ()
    matches = ((_EPISODE_FILE.fullmatch(file.name), file) for file in folder.iterdir())
    return tuple(sorted((int(match.group(1)), file) for match, file in matches if match))
