"""`untwine diagnose separation`: are good and flawed actions of an iteration apart?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from untwine.config import Recipe
from untwine.diagnose.coupling_numbers import context_of
from untwine.diagnose.output import save_results
from untwine.diagnose.recorded import episode_file, load_recorded_policy, read_recorded
from untwine.diagnose.run_samples import check_tokens, draw_samples, labelled_samples
from untwine.diagnose.separation import Metric, Pool, action_states, plane, separations
from untwine.errors import UntwineError
from untwine.policy.loading import Policy
from untwine.progress import Display
from untwine.records import Group


@dataclass(frozen=True, slots=True)
class SeparationOptions:
    """count: samples at most; pool: which of the action's tokens; metric: for the silhouette."""

    count: int = 512
    seed: int = 0
    pool: Pool = "mean"
    metric: Metric = "cosine"
    chunk: int = 16


def find_separation(
    run: Path,
    recipe: Recipe,
    options: SeparationOptions,
    display: Display,
    *,
    iteration: int | None = None,
    checkpoint: str = "",
) -> dict[str, Any]:
    """Measure one iteration of a run, save what was found, and return the numbers.

    iteration   by default the last one
    checkpoint  the policy; by default the one that played the episodes, or else RUN/model
    """
    iteration, file = episode_file(run, iteration)
    found = load_recorded_policy(run, recipe, iteration, checkpoint, or_last=True)
    measured, tensors = measure_separation(
        found.policy, read_recorded(file, recipe), options, display
    )
    head = {"format": "untwine-separation-1", "iteration": iteration, "policy": found.source}
    numbers = {**head, **measured}
    save_results(run, "separation", numbers, tensors)
    return numbers


def measure_separation(
    policy: Policy, groups: Sequence[Group], options: SeparationOptions, display: Display
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Numbers for JSON, and tensors: maps_SN2 (a plane for each layer), flawed_N."""
    everyone = labelled_samples(groups)
    chosen = draw_samples(everyone, options.count, options.seed)
    if not chosen:
        raise UntwineError("no step of this iteration carries a label that its sources agree on")
    check_tokens(chosen, policy.model.get_input_embeddings().weight.shape[0])
    flawed_N = torch.tensor([s.verdict == "flawed" for s in chosen])
    with display.bar("hidden states", 1, "chunk") as bar:
        states_SND = action_states(
            policy.model,
            [s.sample for s in chosen],
            pool=options.pool,
            chunk=options.chunk,
            context=context_of(policy),
            on_progress=bar.update,
        )
    tasks = [s.task for s in chosen]
    with display.bar("probes", 1, "layer"):
        rows = separations(states_SND, flawed_N, tasks, metric=options.metric, seed=options.seed)
    maps = [plane(states_ND) for states_ND in states_SND]
    numbers = {
        "distinct": len(everyone),
        "samples": len(chosen),
        "flawed": int(flawed_N.sum()),
        "tasks": len(set(tasks)),
        "seed": options.seed,
        "pool": options.pool,
        "metric": options.metric,
        "layers": [
            {**dataclasses.asdict(row), "variance_shown": list(shares)}
            for row, (_, shares) in zip(rows, maps, strict=True)
        ],
        "sample_list": [
            {
                "task": s.task,
                "episode": s.episode.id,
                "step": s.step.index,
                "command": s.step.command,
                "verdict": s.verdict,
                "kind": s.kind,
            }
            for s in chosen
        ],
    }
    return numbers, {
        "maps_SN2": torch.stack([m for m, _ in maps]),
        "flawed_N": flawed_N.to(torch.uint8),
    }
