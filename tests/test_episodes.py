"""Episode files of other programs: what may be missing, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from untwine.episodes import read_groups
from untwine.errors import CheckpointError

EPISODE: dict[str, Any] = {
    "group": 0,
    "id": "a",
    "ref": {"env": "other", "task": "t", "variation": 3},
    "outcome": 0.5,
    "steps": [
        {"state_key": "s", "text": "go", "prompt_len": 2, "action_len": 1},
        {"state_key": "t", "text": "stop", "prompt_len": 1, "action_len": 2, "mine": "unknown"},
    ],
}
ARRAYS: dict[str, np.ndarray] = {
    "token_ids": np.array([5, 6, 7, 8, 9, 4], dtype=np.int32),
    "logprobs": np.array([-1.0, -0.5, -0.25], dtype=np.float32),
}


def written(folder: Path, episode: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    path = folder / "iter-000000.jsonl.gz"
    lines = [{"format": "untwine-episodes-2", "groups": 1}, episode]
    path.write_bytes(gzip.compress("".join(json.dumps(x) + "\n" for x in lines).encode()))
    save_file(arrays, folder / "iter-000000.safetensors")
    return path


def test_the_least_that_a_file_must_hold(tmp_path: Path) -> None:
    (group,) = read_groups(written(tmp_path, EPISODE, ARRAYS))
    (episode,) = group.episodes
    assert (episode.score, episode.success, episode.ended) == (0.5, False, "limit")
    first, second = episode.steps
    assert (first.prompt_ids, first.action_ids, first.logprobs) == ((5, 6), (7,), (-1.0,))
    assert (second.prompt_ids, second.action_ids) == ((8,), (9, 4))
    assert second.logprobs == (-0.5, -0.25)
    assert (second.index, second.command, second.invalid, second.labels) == (1, "stop", None, ())
    assert second.advantage is None
    assert second.allowed is None


@pytest.mark.parametrize(
    ("change", "arrays", "words"),
    [
        ({"outcome": None}, {}, "cannot be read"),
        ({"ref": {"env": "other"}}, {}, "cannot be read"),
        ({"group": 4}, {}, "cannot be read"),
        ({"steps": [{"text": "go", "prompt_len": 2, "action_len": 1}]}, {}, "has no"),
        ({"steps": [{**EPISODE["steps"][0], "index": 3}]}, {}, "has index 3"),
        ({}, {"logprobs": np.array([-1.0, np.nan, -1.0], dtype=np.float32)}, "no log-prob"),
        ({}, {"token_ids": np.arange(9, dtype=np.int32)}, "need 6 token_ids, and it holds 9"),
        ({}, {"advantages": np.zeros(3)}, "need 2 advantages, and it holds 3"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, change: dict[str, Any], arrays: dict[str, np.ndarray], words: str
) -> None:
    path = written(tmp_path, {**EPISODE, **change}, {**ARRAYS, **arrays})
    with pytest.raises(CheckpointError, match=words):
        read_groups(path)
