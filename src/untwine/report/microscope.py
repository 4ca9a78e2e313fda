"""What the diagnose commands left in RUN/diagnose/, checked and ready for a page or for JSON.

A file that is missing is answered with the command that makes it, one that cannot be read with a
sentence; neither stops a report.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from untwine.credit import AS_TRAINED
from untwine.errors import UntwineError
from untwine.report.key_numbers import key_numbers
from untwine.report.run_data import Row, RunData
from untwine.report.shape import each, maybe, shaped, share

TOPICS = ("truth", "labels", "calibration", "coupling", "judging", "separation")
_TRUTH_FILE = re.compile(r"truth-iter-(\d+)\.jsonl")
_VERDICTS = ("good", "flawed")

_TRUTH_HEAD = {
    "steps": int,
    "labels": each({"steps": int, "share": float}),
    "flawed_by_chance": float,
    "unclear": int,
    "steps_left_out": int,
    "mismatches": [object],
    "policy_gap": maybe(float),
    "settings": maybe({"error": share}),
    "branches_played": int,
    "env_steps": int,
}
_SHARE = {"value": maybe(float), "interval": maybe([float]), "steps": int}
_QUALITY = {"precision": _SHARE, "precision_decided": _SHARE, "recall": _SHARE}
_MEAN = maybe({"value": float, "interval": maybe([float])})
_MEANS = {"flawed_mean": _MEAN, "good_mean": _MEAN, "difference": _MEAN}
_SOURCE = {
    **{"coverage": _SHARE, "accuracy": _SHARE, "flawed": _QUALITY, "good": _QUALITY},
    "worth": maybe(_MEANS),
}
_LABELS = {"iterations": [int], "steps": int, "asked": [str], "sources": each(_SOURCE)}
_MEASURES = {
    "steps": int,
    "flawed": int,
    "good": int,
    **_MEANS,
    "by_episode": _MEANS,
    "mean_estimate": _MEAN,
    "mean_advantage": _MEAN,
    "miscalibration": _MEAN,
    "sign_agreement": maybe(float),
    "rank_correlation": maybe(float),
    "variance": maybe(float),
}
_CALIBRATION = {
    "source": str,
    "note": str,
    "iterations": [int],
    "steps": int,
    "flawed": int,
    "good": int,
    "flawed_by_chance": maybe(float),
    "methods": each(
        {
            "not_applicable": maybe(str),
            "without_estimate": maybe(int),
            "all": maybe(_MEASURES),
            "by_kind": maybe(each(_MEASURES)),
            "by_position": maybe(each(_MEASURES)),
            "lemma": maybe(each(float)),
        }
    ),
}
_STEP = {
    "task": str,
    "episode": str,
    "step": int,
    "state_key": str,
    "command": maybe(str),
    "text": str,
    "verdict": maybe(str),
    "kind": maybe(str),
    "weight": float,
    "count": int,
}
_RATES = each(
    {
        "flawed": int,
        "reinforced": int,
        "share": maybe(float),
        "null": maybe(float),
        "interval": maybe([float]),
        "p_value": maybe(float),
    }
)
_CHANGE = {"good": float, "flawed": float, "difference": float}
_LIFT = {"relation": str, "credit": str, "verdict": maybe(str), "mean": float}
_PROMPTED = {**_STEP, "sample": int, "probability": float, "prompt": str}
_COUPLING = {
    "iteration": int,
    "policy": str,
    "metric": str,
    "steps": int,
    "distinct": int,
    "samples": int,
    "drift": {"mean": maybe(float), "largest": maybe(float)},
    "head_correlation": maybe(float),
    "largest_change": float,
    "reinforced": each(_RATES),
    "lifts": maybe(each({"targets": int, "own": float, "delta": float, "sources": [_LIFT]})),
    "credits": maybe(each(_CHANGE)),
    "honesty": maybe(
        {
            "correlation": maybe(float),
            "slope": maybe(float),
            "predicted": [float],
            "measured": [float],
        }
    ),
    "mean_push": maybe({"batches": int, "signal_share": maybe(float), "rates": _RATES}),
    "cosines": [
        {"kind": str, "relation": str, "pairs": int, "mean": maybe(float), "counts": [int]}
    ],
    "offenders": [
        {
            **_PROMPTED,
            "delta": float,
            "own": float,
            "coupled": float,
            "pushers": [{**_PROMPTED, "push": float, "cosine": maybe(float)}],
        }
    ],
    "sample_list": [{**_STEP, "logprob": float, "own": float, "coupled": float, "delta": float}],
}
_JUDGING = {
    "iteration": int,
    "objective": str,
    "distinct": int,
    "samples": int,
    "good": int,
    "flawed": int,
    "questions": int,
    "right_verdicts": maybe(float),
    "norm_ratio": float,
    "cosine": maybe(float),
    "policy": _CHANGE,
    "verdict": _CHANGE,
    "permuted": [_CHANGE],
}
_SEPARATION = {
    "iteration": int,
    "policy": str,
    "distinct": int,
    "samples": int,
    "flawed": int,
    "tasks": int,
    "pool": str,
    "metric": str,
    "layers": [
        {
            "layer": int,
            "accuracy": maybe(float),
            "balanced": maybe(float),
            "majority": float,
            "silhouette": maybe(float),
            "silhouette_shuffled": maybe(float),
            "margin": maybe(float),
            "margin_shuffled": maybe(float),
            "variance_shown": [maybe(float)],
        }
    ],
    "sample_list": [
        {
            "task": str,
            "episode": str,
            "step": int,
            "command": maybe(str),
            "verdict": maybe(str),
            "kind": maybe(str),
        }
    ],
}


def read_microscope(run: RunData, method: str) -> dict[str, Any]:
    """All that was measured on a run.

    method  the credit method that the run trained with; its numbers stand for the run, where no
            penalty or veto changed what it gave

    Keys: one per topic (None, or for truth an empty list, where nothing is there), `key_numbers`
    (see key_numbers.py), `missing` (topic and the command that measures it), `problems`.
    """
    problems: list[str] = []
    folder = run.path / "diagnose"
    found: dict[str, Any] = {
        "truth": _truths(run, folder, problems),
        "labels": _read(folder, "labels", partial(_numbers, "labels", _LABELS), problems),
        "calibration": _read(
            folder, "calibration", partial(_numbers, "calibration", _CALIBRATION), problems
        ),
        "coupling": _read(folder, "coupling", _coupling, problems),
        "judging": _read(folder, "judging", partial(_numbers, "judging", _JUDGING), problems),
        "separation": _read(folder, "separation", _separation, problems),
    }
    if found["calibration"] and AS_TRAINED in found["calibration"]["methods"]:
        method = AS_TRAINED
    where = shlex.quote(str(run.path))
    missing = [
        {"topic": topic, "command": f"untwine diagnose {topic} {where}"}
        for topic in TOPICS
        if not found[topic]
    ]
    return {
        **found,
        "method": method,
        "key_numbers": key_numbers(found, method),
        "missing": missing,
        "problems": problems,
    }


def _truths(run: RunData, folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Every truth file, by iteration."""
    files = sorted(folder.glob("truth-iter-*.jsonl")) if folder.is_dir() else []
    episodes = dict(run.episodes)
    found = []
    for file in files:
        match = _TRUTH_FILE.fullmatch(file.name)
        iteration = int(match.group(1)) if match else -1
        if iteration not in episodes:
            problems.append(f"{file.name} judges episodes that are not there; it was left out.")
            continue
        try:
            found.append(_truth(iteration, file, episodes[iteration]))
        except (UntwineError, ValueError) as error:
            problems.append(f"{file.name} was left out: {error}.")
    return found


def _truth(iteration: int, file: Path, episodes: Path) -> dict[str, Any]:
    from untwine.diagnose.truth_file import read_truth

    truth = read_truth(file, episodes).numbers()
    row = {
        "group": int, "episode": str, "step": int, "ref": str, "state_key": str, "action": str,
        "kind": str, "position": str, "weight": float, "shared": int, "q": float,
        "value": maybe(float), "action_value": maybe(float), "advantage": float, "low": float,
        "high": float, "n": int, "label": str, "clear": bool, "action_value_low": maybe(float),
        "action_value_high": maybe(float), "value_low": maybe(float), "value_high": maybe(float),
    }  # fmt: skip
    shape = {**_TRUTH_HEAD, "rows": [row]}
    return {"iteration": iteration, **shaped(truth, shape)}


Reader = Callable[[Path], dict[str, Any]]


def _read(folder: Path, name: str, reader: Reader, problems: list[str]) -> dict[str, Any] | None:
    file = folder / f"{name}.json"
    try:
        return reader(file) if file.is_file() else None
    except (OSError, ValueError, KeyError, IndexError, RecursionError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        problems.append(f"diagnose/{file.name} was left out: {why[:200]}.")
        return None


def _json(file: Path, name: str) -> Any:
    numbers = json.loads(file.read_text(encoding="utf-8"))
    form = f"untwine-{name}-1"
    if not isinstance(numbers, Mapping) or numbers.get("format") != form:
        raise ValueError(f"its format is not {form}")
    return numbers


def _numbers(name: str, shape: Mapping[str, Any], file: Path) -> dict[str, Any]:
    found: dict[str, Any] = shaped(_json(file, name), shape)
    return found


def _coupling(file: Path) -> dict[str, Any]:
    """coupling.json with `cosine_rows`: cosine coupling of every sample with those up to itself."""
    numbers = _numbers("coupling", _COUPLING, file)
    n = len(numbers["sample_list"])
    for key in ("predicted", "measured") if numbers["honesty"] else ():
        if len(numbers["honesty"][key]) != n:
            raise ValueError("its honesty check is of other samples")
    gram_NN = _array(file, "K_NN", (n, n))
    if gram_NN is None:
        return {**numbers, "cosine_rows": None, "order": None}
    norms_N = np.sqrt(np.maximum(np.diagonal(gram_NN), 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines_NN = gram_NN / np.outer(norms_N, norms_N)
    rows = [
        [round(float(c), 4) if np.isfinite(c) else None for c in cosines_NN[i, : i + 1]]
        for i in range(n)
    ]
    return {**numbers, "cosine_rows": rows, "order": block_order(numbers["sample_list"])}


def block_order(samples: Sequence[Row]) -> list[int]:
    """Numbers of the samples so that alike ones lie side by side: by verdict, task, state."""

    def place(i: int) -> tuple[int, str, str, str]:
        sample = samples[i]
        verdict = sample["verdict"]
        rank = _VERDICTS.index(verdict) if verdict in _VERDICTS else len(_VERDICTS)
        return rank, sample["task"], sample["state_key"], sample["text"]

    return sorted(range(len(samples)), key=place)


def _separation(file: Path) -> dict[str, Any]:
    """separation.json with `maps`: for each layer the (x, y) of every sample."""
    numbers = _numbers("separation", _SEPARATION, file)
    shape = (len(numbers["layers"]), len(numbers["sample_list"]), 2)
    maps_SN2 = _array(file, "maps_SN2", shape)
    if maps_SN2 is None:
        return {**numbers, "maps": None}
    return {**numbers, "maps": np.nan_to_num(maps_SN2).astype(float).round(5).tolist()}


def _array(file: Path, name: str, shape: tuple[int, ...]) -> Any:
    """One tensor of the safetensors file beside `file`, as float64; None where it is missing."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    beside = file.with_suffix(".safetensors")
    if not beside.is_file():
        return None
    try:
        found = load_file(beside)[name].astype(np.float64)
    except SafetensorError as error:
        raise ValueError(f"{beside.name} is damaged") from error
    if found.shape != shape:
        raise ValueError(f"{beside.name} holds arrays of other samples")
    return found
