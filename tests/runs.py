"""What tests read in run folders, and runs whose parts must be the whole."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from untwine.config import Recipe
from untwine.progress import Display
from untwine.training.cold_start import ColdStart
from untwine.training.loop import train
from untwine.workshop import Workshop


def rows(run: Path, stage: str = "rl") -> list[dict[str, Any]]:
    """Metrics of a stage; those that were written whole, of a run that may still go on."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [r for line in lines if line.endswith("}") and (r := json.loads(line))["stage"] == stage]


def steady(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without those that tell how long something took."""
    timed = ("time", "seconds", "cost_seconds", "diagnose_share")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in found]


def cold_start_of(workshop: Workshop) -> ColdStart:
    """The data of its cold start."""
    return ColdStart(
        workshop.recipe,
        workshop.info,
        workshop.transcripts,
        workshop.policy,
        workshop.collector,
        random.Random(0),
    )


def assert_same_weights(run: Path, reference: Path) -> None:
    """Bit for bit."""
    ours, theirs = (load_file(r / "model" / "model.safetensors") for r in (run, reference))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].tobytes() == theirs[name].tobytes(), name


def in_one_and_in_two(
    folder: Path, recipe: Callable[[int], Recipe], last: int
) -> tuple[Path, Path]:
    """Train `last` iterations, and again with a break before the last one; both must be the same.

    recipe  makes the recipe for a number of iterations
    """
    whole, parts = folder / "whole", folder / "parts"
    train(recipe(last), whole, Display(quiet=True))
    train(recipe(last - 1), parts, Display(quiet=True))
    train(recipe(last), parts, Display(quiet=True), resume=True)
    assert_same_weights(parts, whole)
    assert rows(whole)
    assert steady(rows(parts)) == steady(rows(whole))
    return whole, parts
