"""Run directories as finished runs leave them, without training anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.builders import REF
from untwine.config import EnvConfig, Recipe, make_recipe
from untwine.evaluate.identity import DECODINGS, set_identity

RATES = {"episode_length": 5.0, "invalid_rate": 0.1, "repeated_rate": 0.2, "flawed_rate": 0.3}
Tasks = Mapping[str, float]


def row(
    success: Tasks, *, name: str = "L0", greedy: bool = False, episodes: int = 8, seed: int = 0
) -> dict[str, Any]:
    """One evaluation, of equally many episodes for each task."""
    refs = [
        dataclasses.replace(REF, task=task, variation=v)
        for task in success
        for v in range(episodes // len(success))
    ]
    mean = sum(success.values()) / len(success)
    return {
        "set": name,
        "episodes": len(refs),
        "success_rate": mean,
        "outcome_mean": mean / 2,
        **RATES,
        "by_task": {
            task: {"success_rate": value, "outcome_mean": value / 2}
            for task, value in success.items()
        },
        "identity": set_identity(
            EnvConfig(name="rooms"), name, refs, decoding=DECODINGS[greedy], seed=seed
        ),
    }


def write_run(
    path: Path,
    rows: list[dict[str, Any]],
    *,
    start: int = 0,
    status: str = "finished",
    iterations: int = 2,
    **recipe: Any,
) -> Path:
    """A run whose evaluations found `rows`; `start` stands for the weights it began with."""
    tree = {"env": {"name": "rooms"}, "rl": {"iterations": iterations}} | recipe
    resolved: Recipe = make_recipe(tree)
    for folder, value in (("initial", start), ("model", start + (100 if iterations else 0))):
        (path / folder).mkdir(parents=True)
        save_file({"w": np.array([float(value)])}, path / folder / "model.safetensors")
    (path / "recipe.yaml").write_text(resolved.to_yaml())
    (path / "run.json").write_text(json.dumps({"status": status, "name": resolved.name}))
    spent = {"policy_tokens": 10, "gcd_tokens": 5, "seconds_rollout": 1, "seconds_update": 2}
    lines: list[dict[str, Any]] = [
        {"stage": "rl", "step": step, **spent} for step in range(iterations)
    ]
    phase = "rl" if iterations else "cold_start"
    lines += [{"stage": "evaluate", "step": iterations, "phase": phase, **r} for r in rows]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_arm(
    folder: Path, values: list[float], *, first: int = 0, shift: float = 0.0, **recipe: Any
) -> list[Path]:
    """One run per value: seed k, start k, its success on task `a`; on `b` it is lower by .1."""
    return [
        write_run(
            folder / f"seed-{seed}",
            [row({"a": value + shift, "b": value + shift - 0.1}, seed=seed)],
            start=seed,
            seed=seed,
            **recipe,
        )
        for seed, value in enumerate(values, first)
    ]
