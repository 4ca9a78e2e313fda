"""What the diagnose commands write into RUN/diagnose/: every file whole, or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def results_folder(run: Path) -> Path:
    return run / "diagnose"


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a scratch file, and put it in the place of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{target.name}.partial")
    write(scratch)
    scratch.replace(target)


def write_text(target: Path, text: str) -> None:
    write_whole(target, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def save_results(
    run: Path, name: str, numbers: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Path:
    """Write NAME.safetensors and NAME.json; the path of the latter."""
    folder = results_folder(run)
    plain = {n: t.contiguous() for n, t in tensors.items()}
    write_whole(folder / f"{name}.safetensors", lambda scratch: save_file(plain, scratch))
    write_text(folder / f"{name}.json", to_json(numbers))
    return folder / f"{name}.json"


def to_json(numbers: Mapping[str, Any]) -> str:
    """JSON without NaN: what is not a number becomes null."""
    return json.dumps(_finite(numbers), indent=1, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
