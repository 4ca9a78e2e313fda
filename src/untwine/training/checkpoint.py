"""Checkpoints: what is needed to continue a run exactly.

    checkpoints/rl-000012/
      model.safetensors      weights (tied tensors once)
      optimizer.safetensors  moments and step counts, by parameter number
      gcd_*.safetensors      what the objective trains or steps with of its own, if anything
      state.json             stage, step, generators, cursor, size of the metrics file, checksums

A checkpoint is written beside its final place and renamed, so a kill at any moment leaves the
previous one intact.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model

from untwine.errors import CheckpointError

Stage = Literal["cold_start", "rl"]
FORMAT = "untwine-checkpoint-1"


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands, apart from weights and optimizer.

    stage, step     the next thing to do: cold-start step or iteration number `step`
    optimizer_steps steps taken in this stage
    cursor          how many task instances have been handed out
    sampling        state of the generator that draws tokens
    choices         state of the generator that draws rows and verdicts
    metric_lines    lines of metrics.jsonl at this moment
    """

    stage: Stage
    step: int
    optimizer_steps: int
    cursor: int
    sampling: torch.Tensor
    choices: tuple[Any, ...]
    metric_lines: int


def save_checkpoint(
    folder: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    position: Position,
    keep: int,
    extra: Mapping[str, dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Write a checkpoint under `folder` and drop all but the newest `keep`.

    extra   further tensors, each entry a file of its own
    """
    target = folder / f"{position.stage}-{position.step:06d}"
    scratch = folder / f".partial-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_model(model, str(scratch / "model.safetensors"))
    save_file(optimizer_tensors(optimizer), scratch / "optimizer.safetensors")
    for name, tensors in (extra or {}).items():
        save_file(tensors, scratch / f"{name}.safetensors")
    state = {
        "format": FORMAT,
        "stage": position.stage,
        "step": position.step,
        "optimizer_steps": position.optimizer_steps,
        "cursor": position.cursor,
        "sampling": base64.b64encode(bytes(position.sampling.tolist())).decode(),
        "choices": position.choices,
        "metric_lines": position.metric_lines,
        "sha256": {f.name: _sha256(f) for f in sorted(scratch.glob("*.safetensors"))},
    }
    (scratch / "state.json").write_text(json.dumps(state), encoding="utf-8")
    _sync(scratch)
    aside = folder / f".old-{os.getpid()}"  # one of them is whole at any moment
    if target.exists():
        target.rename(aside)
    scratch.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first (the cold start comes before the iterations)."""
    return sorted(
        (p for p in folder.glob("*-[0-9]*") if (p / "state.json").is_file()),
        key=lambda p: (p.name.startswith("rl"), p.name),
    )


def latest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run directory. CheckpointError when there is none."""
    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise CheckpointError(f"{run} holds no checkpoint to resume from; start the run again")
    return found[-1]


def read_position(checkpoint: Path) -> Position:
    """Check a checkpoint's files and read its position. CheckpointError when it is damaged."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(f"{checkpoint} is not a checkpoint of this version ({FORMAT})")
        for name, digest in state["sha256"].items():
            if _sha256(checkpoint / name) != digest:
                raise CheckpointError(
                    f"checkpoint {checkpoint} is damaged: {name} is truncated or altered; "
                    "delete this checkpoint folder to resume from the one before"
                )
        version, numbers, gauss = state["choices"]
        return Position(
            stage=state["stage"],
            step=state["step"],
            optimizer_steps=state["optimizer_steps"],
            cursor=state["cursor"],
            sampling=torch.tensor(list(base64.b64decode(state["sampling"])), dtype=torch.uint8),
            choices=(version, tuple(numbers), gauss),
            metric_lines=state["metric_lines"],
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged ({error}); delete this checkpoint folder to "
            "resume from the one before"
        ) from error


def load_weights(checkpoint: Path, model: Any) -> None:
    """Read the weights of a checkpoint into `model`."""
    try:
        load_model(model, str(checkpoint / "model.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the weights in {checkpoint} do not fit this model") from error


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Read the optimizer state of a checkpoint into `optimizer`."""
    fill_optimizer(optimizer, load_file(checkpoint / "optimizer.safetensors"))


def load_extra(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The further tensors of a checkpoint, by name."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return {f.stem: load_file(f) for f in files if f.stem not in ("model", "optimizer")}


def fill_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put what `optimizer_tensors` gave into an optimizer."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def choices_state(rng: random.Random) -> tuple[Any, ...]:
    return rng.getstate()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Moments and step counts, by parameter number."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{key}": torch.as_tensor(value).clone().contiguous()
        for number, values in state.items()
        for key, value in values.items()
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
