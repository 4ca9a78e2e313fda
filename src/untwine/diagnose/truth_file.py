"""Truth on disk, beside the episodes: diagnose/truth-iter-000012.jsonl.

The first line is a header (format, settings, cost, mismatches, checksum of the episode file), every
other line a step that was drawn. docs/diagnose/truth.md explains the fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untwine.diagnose.branching import Verdict3
from untwine.diagnose.output import results_folder, write_text
from untwine.envs.protocol import EnvInfo
from untwine.errors import CheckpointError, ConfigError
from untwine.gcd.labels import LabelSource, action_key
from untwine.records import Group, Label

FORMAT = "untwine-truth-1"


@dataclass(frozen=True, slots=True)
class TruthRow:
    """What branching found about one drawn step.

    group, episode, step   where it is: number of the group in the file, episode id, index
    weight    how many steps of the file it stands for
    shared    steps of the file with the same action in the same state; the estimate is their mean
    q, value, action_value, advantage, low, high, n, label, clear, confidence, and the bounds of
              the values, which files from before these were found lack: see `Estimate`
    """

    group: int
    episode: str
    step: int
    ref: str
    state_key: str
    action: str
    kind: str
    position: str
    weight: float
    shared: int
    q: float
    value: float | None
    action_value: float | None
    advantage: float
    low: float
    high: float
    n: int
    label: Verdict3
    clear: bool
    confidence: float | None
    action_value_low: float = 0.0
    action_value_high: float = 1.0
    value_low: float = 0.0
    value_high: float = 1.0


@dataclass(frozen=True, slots=True)
class Truth:
    """One truth file: header and rows."""

    header: dict[str, Any]
    rows: tuple[TruthRow, ...]

    def numbers(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**self.header, "rows": [dataclasses.asdict(row) for row in self.rows]}


def truth_path(run: Path, iteration: int) -> Path:
    return results_folder(run) / f"truth-iter-{iteration:06d}.jsonl"


def files_with_truth(run: Path, files: Mapping[int, Path], otherwise: str) -> dict[int, Path]:
    """Those of the episode files, by iteration, that have a truth file. ConfigError when none has;
    `otherwise` says what can be done instead."""
    found = {k: file for k, file in files.items() if truth_path(run, k).is_file()}
    if not found:
        raise ConfigError(
            f"{run} holds no truth about these episodes; run `untwine diagnose truth {run}`, or "
            f"{otherwise}"
        )
    return found


def write_truth(path: Path, truth: Truth) -> None:
    """Write a truth file whole, in place of an older one, or not at all."""
    lines = [{"format": FORMAT, **truth.header}, *map(dataclasses.asdict, truth.rows)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_truth(path: Path, episodes: Path) -> Truth:
    """A truth file of these episodes. CheckpointError when it is damaged or of other ones."""
    try:
        with path.open(encoding="utf-8") as stream:
            header, *rows = [json.loads(line) for line in stream]
        if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
            raise CheckpointError(f"{path} is no truth file of this version ({FORMAT})")
        truth = Truth(header, tuple(TruthRow(**row) for row in rows))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"truth file {path} is damaged ({error}); delete it") from error
    if truth.header.get("episodes_sha256") != checksum(episodes):
        raise CheckpointError(
            f"{path} judges other episodes than {episodes.name} now holds; "
            "run `untwine diagnose truth` again"
        )
    return truth


def checksum(episodes: Path) -> str:
    """Checksum of an episode file. CheckpointError when it is missing."""
    try:
        return hashlib.sha256(episodes.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"episode file {episodes} is missing") from error


def branch_labels(rows: Sequence[TruthRow]) -> LabelSource:
    """A label source (`branch`) that knows what branching found, also for the other steps with the
    same action in the same state where these were judged together. Neutral steps have no label."""
    by_step = {(row.episode, row.step): row for row in rows}
    by_pair = {(row.ref, row.state_key, row.action): row for row in rows if row.shared > 1}

    def source(group: Group, info: EnvInfo) -> list[list[Label | None]]:
        ref = str(group.ref)
        return [
            [
                branch_label(
                    by_step.get((episode.id, step.index))
                    or by_pair.get((ref, step.state_key, action_key(step)))
                )
                for step in episode.steps
            ]
            for episode in group.episodes
        ]

    return source


def branch_label(row: TruthRow | None) -> Label | None:
    """The label that a row amounts to; None for neutral ones."""
    if row is None or row.label == "neutral" or not row.confidence:
        return None
    return Label("branch", row.label, "advantage", row.confidence)
