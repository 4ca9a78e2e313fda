"""Episodes on disk: text as JSON lines, numbers as safetensors, side by side.

    iter-000012.jsonl.gz       one JSON object per episode, first a header line
    iter-000012.safetensors    token_ids i32, logprobs f32, advantages f64, kept i32,
                               allowed_counts i32, allowed_ids i32

Prompts repeat each other, so a step stores only what is new: `kept` is how many leading ids of its
prompt equal the previous step's prompt + action, and `token_ids` holds, step after step, the
remaining prompt ids followed by the action ids. An absent advantage is NaN. Reading gives back the
same records, bit for bit; the format is described in docs/episodes.md, also what other programs may
leave out of it.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from untwine.errors import CheckpointError
from untwine.records import Episode, Group, Label, Step, TaskRef

FORMAT = "untwine-episodes-2"
_NUMBERS = {"prompt_ids", "action_ids", "logprobs", "allowed", "advantage"}
_STEP_DEFAULTS: dict[str, Any] = {
    "observation": "",
    "thought": None,
    "tag": None,
    "invalid": None,
    "next_state_key": "",
    "feedback": "",
    "score": 0.0,
    "outcome": 0.0,
    "reward": 0.0,
    "done": False,
    "admissible": None,
    "labels": (),
}
_STEP_FIELDS = {f.name for f in dataclasses.fields(Step)} - _NUMBERS


def write_groups(path: Path, groups: Sequence[Group]) -> None:
    """Write groups to `path` (ends in .jsonl.gz) and its .safetensors neighbour.

    Both files are written whole or not at all.
    """
    tokens: list[int] = []
    logprobs: list[float] = []
    advantages: list[float] = []
    kept: list[int] = []
    allowed_counts: list[int] = []
    allowed_ids: list[int] = []
    lines = [json.dumps({"format": FORMAT, "groups": len(groups)})]
    for number, group in enumerate(groups):
        for episode in group.episodes:
            before: tuple[int, ...] = ()
            for step in episode.steps:
                same = _common_prefix(before, step.prompt_ids)
                kept.append(same)
                tokens += step.prompt_ids[same:] + step.action_ids
                logprobs += step.logprobs
                for ids in step.allowed or ((),) * len(step.action_ids):
                    allowed_counts.append(len(ids))
                    allowed_ids += ids
                advantages.append(math.nan if step.advantage is None else step.advantage)
                before = step.prompt_ids + step.action_ids
            lines.append(json.dumps(_episode_text(number, episode), ensure_ascii=False))
    arrays: dict[str, np.ndarray] = {
        "token_ids": np.array(tokens, dtype=np.int32),
        "logprobs": np.array(logprobs, dtype=np.float32),
        "advantages": np.array(advantages, dtype=np.float64),
        "kept": np.array(kept, dtype=np.int32),
        "allowed_counts": np.array(allowed_counts, dtype=np.int32),
        "allowed_ids": np.array(allowed_ids, dtype=np.int32),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = _numbers_path(path)
    scratch = numbers.with_suffix(".partial")
    save_file(arrays, scratch)
    scratch.replace(numbers)
    scratch = path.with_suffix(".partial")
    with gzip.GzipFile(scratch, "wb", compresslevel=5, mtime=0) as out:
        out.write(("\n".join(lines) + "\n").encode())
    scratch.replace(path)


def read_groups(path: Path) -> list[Group]:
    """The groups written to `path`, by this or another program.

    CheckpointError when a file is missing, damaged, or holds no log-probabilities.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            header, *rows = [json.loads(line) for line in lines]
        arrays = load_file(_numbers_path(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"episode file {error.filename or path} is missing") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"episode file {_numbers_path(path)} is damaged ({error}); delete it and {path.name}"
        ) from error
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"episode file {path} is damaged ({error}); delete it") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not an episode file of this version ({FORMAT})")
    try:
        reader = _Reader(arrays, rows)
        groups: list[list[Episode]] = [[] for _ in range(header["groups"])]
        for row in rows:
            groups[row["group"]].append(reader.episode(row))
        reader.check_end()
        return [Group(episodes[0].ref, tuple(episodes)) for episodes in groups if episodes]
    except KeyError as error:
        raise CheckpointError(
            f"episode file {path} has no {error}; docs/episodes.md says what it must hold"
        ) from error
    except (IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"episode file {path} cannot be read: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"episode file {path} {error}") from error


class _Reader:
    """Cuts the flat arrays back into steps."""

    def __init__(self, arrays: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        lengths = [step["action_len"] for row in rows for step in row["steps"]]
        if "logprobs" not in arrays or np.isnan(arrays["logprobs"]).any():
            raise CheckpointError(
                "holds no log-probabilities of its actions under the policy that played them; "
                "record them when sampling, or compute them with "
                "untwine.diagnose.log_probabilities"
            )
        self._tokens: list[int] = arrays["token_ids"].tolist()
        self._logprobs: list[float] = arrays["logprobs"].tolist()
        self._advantages = _list_of(arrays, "advantages", math.nan, len(lengths))
        self._kept = _list_of(arrays, "kept", 0, len(lengths))
        self._allowed_counts = _list_of(arrays, "allowed_counts", 0, sum(lengths))
        self._allowed = _list_of(arrays, "allowed_ids", 0, 0)
        self._token = self._logprob = self._step = self._choice = 0

    def check_end(self) -> None:
        """ValueError when the arrays hold more or fewer numbers than the steps speak of."""
        for name, used, values in (
            ("token_ids", self._token, self._tokens),
            ("logprobs", self._logprob, self._logprobs),
            ("advantages", self._step, self._advantages),
            ("kept", self._step, self._kept),
            ("allowed_counts", self._logprob, self._allowed_counts),
            ("allowed_ids", self._choice, self._allowed),
        ):
            if used != len(values):
                raise ValueError(f"its steps need {used} {name}, and it holds {len(values)}")

    def episode(self, row: dict[str, Any]) -> Episode:
        before: tuple[int, ...] = ()
        steps = []
        for t, text in enumerate(row["steps"]):
            prompt, action = text["prompt_len"], text["action_len"]
            same = self._kept[self._step]
            new = tuple(self._tokens[self._token : self._token + prompt - same + action])
            self._token += prompt - same + action
            ids = before[:same] + new
            advantage = self._advantages[self._step]
            self._step += 1
            steps.append(
                Step(
                    **_step_values(t, text),
                    prompt_ids=ids[:prompt],
                    action_ids=ids[prompt:],
                    logprobs=tuple(self._logprobs[self._logprob : self._logprob + action]),
                    allowed=self._allowed_sets(action),
                    advantage=None if math.isnan(advantage) else advantage,
                )
            )
            self._logprob += action
            before = ids
        outcome = row["outcome"]
        success = row.get("success", outcome >= 1.0)
        return Episode(
            id=row["id"],
            ref=TaskRef(**row["ref"]),
            goal=row.get("goal", ""),
            steps=tuple(steps),
            outcome=outcome,
            score=row.get("score", outcome),
            success=success,
            ended=row.get("ended", "success" if success else "limit"),
            told=tuple(row.get("told", ())),
        )

    def _allowed_sets(self, action: int) -> tuple[tuple[int, ...], ...] | None:
        counts = self._allowed_counts[self._logprob : self._logprob + action]
        if not any(counts):
            return None
        sets = []
        for count in counts:
            sets.append(tuple(self._allowed[self._choice : self._choice + count]))
            self._choice += count
        return tuple(sets)


def _episode_text(group: int, episode: Episode) -> dict[str, Any]:
    values = {f.name: getattr(episode, f.name) for f in dataclasses.fields(episode)}
    values["ref"] = dataclasses.asdict(episode.ref)
    values["steps"] = [_step_text(step) for step in episode.steps]
    return {"group": group, **values}


def _step_text(step: Step) -> dict[str, Any]:
    values = {
        f.name: getattr(step, f.name) for f in dataclasses.fields(step) if f.name not in _NUMBERS
    }
    values["labels"] = [dataclasses.asdict(label) for label in step.labels]
    return values | {"prompt_len": len(step.prompt_ids), "action_len": len(step.action_ids)}


def _list_of(arrays: dict[str, Any], name: str, absent: float, length: int) -> list[Any]:
    found = arrays[name].tolist() if name in arrays else [absent] * length
    return list(found)


def _step_values(t: int, text: dict[str, Any]) -> dict[str, Any]:
    """The fields of step `t` that are not numbers of tokens; unknown keys are passed over."""
    given = {key: value for key, value in text.items() if key in _STEP_FIELDS}
    needed = {"state_key": given["state_key"], "command": given["text"]}
    values = {"index": t, **needed, **_STEP_DEFAULTS, **given}
    if values["index"] != t:
        raise ValueError(f"a step at place {t} of its episode has index {values['index']}")
    values["labels"] = tuple(Label(**label) for label in values["labels"])
    values["admissible"] = _tuple_or_none(values["admissible"])
    return values


def _numbers_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".jsonl.gz") + ".safetensors")


def _tuple_or_none(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    if a == b[: len(a)]:  # the usual case of a growing chat
        return len(a)
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
