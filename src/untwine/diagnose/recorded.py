"""What a run has on record: the episodes of an iteration, and the policy that played them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from untwine.config import LoRAConfig, Recipe, make_recipe
from untwine.diagnose.parameters import adam_preconditioner
from untwine.envs.protocol import EnvInfo
from untwine.envs.registry import get_catalogue
from untwine.episodes import read_groups
from untwine.errors import CheckpointError, ConfigError
from untwine.policy.loading import Policy, load_policy
from untwine.records import Group
from untwine.training.checkpoint import load_optimizer, load_weights, read_position
from untwine.training.run_dir import episode_files, run_recipe


@dataclass(frozen=True, slots=True)
class RecordedPolicy:
    """A policy, the folder or id it is from, and the checkpoint where it is from one."""

    policy: Policy
    source: str
    checkpoint: Path | None


def is_foreign(run: Path) -> bool:
    """Whether a folder holds episodes that another program recorded: there is no recipe."""
    return not (run / "recipe.yaml").is_file() and bool(episode_files(run))


def recorded_recipe(run: Path, overrides: Sequence[str] = (), *, to_play: bool = False) -> Recipe:
    """The recipe of a run. Of a folder that another program wrote, what `overrides` say of its
    sampling, loss and credit, and defaults for the rest.

    to_play  whether its environment will be opened, which another program's cannot
    CheckpointError when it is neither, or cannot be played.
    """
    if not is_foreign(run):
        return run_recipe(run, overrides)
    if to_play:
        raise CheckpointError(
            f"{run} was recorded by another program, so its environment cannot be opened here; "
            "hand it to untwine.diagnose.true_advantages in Python"
        )
    return make_recipe({}, str(run), overrides)


def recorded_info(run: Path, recipe: Recipe) -> EnvInfo:
    """What is known of the environment of a run; of another program's, nothing."""
    if is_foreign(run):
        return EnvInfo("unknown", False, False, False, False)
    return get_catalogue(recipe.env.name, recipe.env.options).info


def iteration_files(run: Path) -> dict[int, Path]:
    """Episode files by iteration. CheckpointError when there are none."""
    try:
        files = {int(file.name[5:11]): file for file in episode_files(run)}
    except ValueError:
        raise CheckpointError(
            f"an episode file of {run} has no iteration number; name them iter-000000.jsonl.gz"
        ) from None
    if not files:
        raise CheckpointError(f"{run} holds no episodes yet; train it for at least one iteration")
    return files


def episode_file(
    run: Path, iteration: int | None, *, with_policy: bool = False
) -> tuple[int, Path]:
    """An iteration and its file. By default the last one, or, `with_policy`, the last one whose
    policy is still there. CheckpointError when there is none."""
    files = iteration_files(run)
    if iteration is None:
        kept = [k for k in files if not with_policy or policy_folder(run, k)]
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


def chosen_files(run: Path, iteration: int | None) -> dict[int, Path]:
    """Episode files by iteration: all of them, or that of one. CheckpointError when it is not
    there."""
    return iteration_files(run) if iteration is None else dict([episode_file(run, iteration)])


def read_recorded(file: Path, recipe: Recipe) -> list[Group]:
    """The groups of an episode file, with the returns the recipe counts."""
    return [dataclasses.replace(g, returns=recipe.rl.returns) for g in read_groups(file)]


def policy_folder(run: Path, iteration: int) -> Path | None:
    """Where the policy is kept that played an iteration: the checkpoint of the same number."""
    checkpoint = run / "checkpoints" / f"rl-{iteration:06d}"
    if (checkpoint / "state.json").is_file():
        return checkpoint
    return run / "initial" if iteration == 0 and (run / "initial").is_dir() else None


def load_recorded_policy(
    run: Path, recipe: Recipe, iteration: int, named: str = "", *, or_last: bool = False
) -> RecordedPolicy:
    """The policy that played an iteration, or the one that is named.

    named    a checkpoint folder (or its name), a model folder, or a model id
    or_last  take RUN/model when the policy of the iteration is no longer there; otherwise that is a
             CheckpointError
    """
    source = _source(run, iteration, named, or_last)
    checkpoint = Path(source) if (Path(source) / "state.json").is_file() else None
    model = source
    if checkpoint is not None:
        read_position(checkpoint)  # checks the files
        model = str(run / "model")  # gives shape and tokenizer
    if (checkpoint is not None or not named) and not (Path(model) / "config.json").is_file():
        raise CheckpointError(f"{model} holds no model; let the run do an iteration first")
    choice = recipe.policy.model_copy(update={"model": model})
    if checkpoint is None:  # saved models hold no adapters of their own
        choice = choice.model_copy(update={"lora": LoRAConfig()})
    policy = load_policy(choice, tuple, recipe.seed)
    if checkpoint is not None:
        load_weights(checkpoint, policy.model)
    return RecordedPolicy(policy, source, checkpoint)


def _source(run: Path, iteration: int, named: str, or_last: bool) -> str:
    if named:
        kept = run / "checkpoints" / named
        if re.fullmatch(r"[a-z_]+-\d{6}", named) and not kept.is_dir() and not Path(named).exists():
            known = ", ".join(sorted(p.name for p in kept.parent.glob("*-*") if p.is_dir()))
            raise CheckpointError(f"{run} keeps no checkpoint {named}; it has {known or 'none'}")
        return str(kept) if kept.is_dir() else named
    folder = policy_folder(run, iteration) or (run / "model" if or_last else None)
    if folder is None:
        raise CheckpointError(
            f"the policy that played iteration {iteration} is no longer in {run}; name another "
            f"one with --checkpoint, such as {run / 'model'}"
        )
    return str(folder)


def recorded_adam(found: RecordedPolicy, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Adam's diagonal by parameter name (see `adam_preconditioner`), as it was at the checkpoint.
    CheckpointError when the policy is from none, or its optimizer had not stepped."""
    if found.checkpoint is None:
        raise CheckpointError(
            "--metric adam needs the checkpoint the episodes were sampled with, and it is no "
            "longer there; take the last iteration, or keep more with checkpoint.keep"
        )
    model, settings = found.policy.model, recipe.rl.optimizer
    if settings.name != "adamw":
        raise ConfigError(
            f"--metric adam needs a run trained with AdamW, and its rl.optimizer.name is "
            f"{settings.name}; leave --metric out"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=settings.betas)
    load_optimizer(found.checkpoint, optimizer)
    if not optimizer.state:
        raise CheckpointError(
            "--metric adam needs an optimizer that has taken a step, and at "
            f"{found.checkpoint.name} it has taken none; take a later iteration"
        )
    return adam_preconditioner(model, optimizer)
