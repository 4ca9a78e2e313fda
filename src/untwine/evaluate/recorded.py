"""RUN/evaluations.jsonl: what `untwine evaluate` found, each row with the weights it is about."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from untwine.evaluate.identity import model_digest

RECORDED = "evaluations.jsonl"


def record_evaluation(run: Path, row: Mapping[str, Any]) -> None:
    """Add a row to RUN/evaluations.jsonl, with the digest of the weights that were evaluated."""
    entry = {"time": round(time.time(), 3), "weights": model_digest(run / "model"), **row}
    with (run / RECORDED).open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":  # a kill has left half a line
                stream.write(b"\n")
        stream.write((json.dumps(entry) + "\n").encode())


def recorded_evaluations(run: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of RUN/evaluations.jsonl that are about the policy the run ends with, oldest first,
    and how many are left out because they are about another one, as of a run that was trained
    further since."""
    file = run / RECORDED
    if not file.is_file():
        return [], 0
    rows = []
    for line in file.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # a kill may leave half a line
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    weights = model_digest(run / "model")
    own = [row for row in rows if weights and row.get("weights") == weights]
    return own, len(rows) - len(own)
