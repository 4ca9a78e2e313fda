"""What a run has on record: the episodes of an iteration, and the policy that played them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from untwine.config import Recipe
from untwine.episodes import read_groups
from untwine.errors import CheckpointError
from untwine.policy.loading import Policy, load_policy
from untwine.records import Group
from untwine.training.checkpoint import load_weights, read_position
from untwine.training.run_dir import episode_files


def iteration_files(run: Path) -> dict[int, Path]:
    """Episode files by iteration. CheckpointError when there are none."""
    files = {int(file.name[5:11]): file for file in episode_files(run)}
    if not files:
        raise CheckpointError(f"{run} holds no episodes; train it for at least one iteration")
    return files


def episode_file(run: Path, iteration: int | None, checkpoint: str = "") -> tuple[int, Path]:
    """An iteration and its file. By default the last one, or, when no `checkpoint` is named, the
    last one whose policy is still there. CheckpointError when there is none."""
    files = iteration_files(run)
    if iteration is None:
        kept = [k for k in files if checkpoint or policy_folder(run, k)]
        if not kept:
            raise CheckpointError(
                f"{run} keeps no policy that played one of its iterations; name one with "
                f"--checkpoint, such as {run / 'model'}"
            )
        iteration = max(kept)
    if iteration not in files:
        known = ", ".join(map(str, list(files)[-8:]))
        raise CheckpointError(f"{run} holds no episodes of iteration {iteration}; it has {known}")
    return iteration, files[iteration]


def read_recorded(file: Path, recipe: Recipe) -> list[Group]:
    """The groups of an episode file, with the returns the recipe counts."""
    return [dataclasses.replace(g, returns=recipe.rl.returns) for g in read_groups(file)]


def policy_folder(run: Path, iteration: int) -> Path | None:
    """Where the policy is kept that played an iteration: the checkpoint of the same number."""
    checkpoint = run / "checkpoints" / f"rl-{iteration:06d}"
    if (checkpoint / "state.json").is_file():
        return checkpoint
    return run / "initial" if iteration == 0 and (run / "initial").is_dir() else None


def load_recorded_policy(run: Path, recipe: Recipe, iteration: int, checkpoint: str) -> Policy:
    """The policy that played an iteration, or the one in `checkpoint`: a checkpoint folder (or its
    name), a model folder, or a model id."""
    folder = policy_folder(run, iteration)
    if checkpoint:
        named = run / "checkpoints" / checkpoint
        folder = named if named.is_dir() else Path(checkpoint)
    if folder is None:
        raise CheckpointError(
            f"the policy that played iteration {iteration} is no longer in {run}; name another "
            f"one with --checkpoint, such as {run / 'model'}"
        )
    weights_only = (folder / "state.json").is_file()
    source = str(run / "model") if weights_only else str(folder)
    config = recipe.policy.model_copy(update={"model": source})
    policy = load_policy(config, tuple, recipe.seed)
    if weights_only:
        read_position(folder)  # checks the files
        load_weights(folder, policy.model)
    return policy
