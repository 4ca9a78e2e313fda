"""The identity of an evaluation set changes with what is played, and with nothing else."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.builders import REF

from untwine.config import EnvConfig, make_recipe
from untwine.evaluate.identity import agent_changes, decoding_name, model_digest, set_identity

ENV = EnvConfig(name="rooms", max_steps=8)
REFS = [dataclasses.replace(REF, variation=v) for v in (0, 1, 2, 0)]


def digest(env: EnvConfig = ENV, **changes: Any) -> str:
    options = {"set_name": "L0", "refs": REFS, "decoding": "sampled", "seed": 0} | changes
    found: str = set_identity(env, **options)["digest"]
    return found


def test_the_decoding_has_a_name() -> None:
    assert decoding_name(False, None) == "sampled"
    assert decoding_name(False, 0.4) == "sampled at 0.4"
    assert decoding_name(True, 0.4) == "greedy"


def test_it_says_what_is_played() -> None:
    found = set_identity(ENV, "L0", REFS, decoding="greedy", seed=5)
    assert (found["episodes"], found["instances"], found["repetitions"]) == (4, 3, 2)
    assert (found["set"], found["decoding"], found["seed"]) == ("L0", "greedy", 5)
    assert found["max_steps"] == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"refs": REFS[:3]},
        {"refs": REFS[::-1]},
        {"set_name": "L1"},
        {"decoding": "greedy"},
        {"decoding": "sampled at 0.4"},
        {"env": EnvConfig(name="rooms", max_steps=9)},
        {"env": EnvConfig(name="rooms", max_steps=8, options={"rooms": 4})},
    ],
)
def test_another_examination_has_another_digest(changes: dict[str, Any]) -> None:
    assert digest(**changes) != digest()


def test_seed_and_workers_do_not_matter() -> None:
    other = EnvConfig(name="rooms", max_steps=8, workers=3, sessions=2, splits="mine")
    assert digest(other, seed=7) == digest()


@pytest.mark.parametrize(
    ("override", "decoding", "changes"),
    [
        ("prompt.tags=true", "sampled", {"prompt.tags": True}),
        ("policy.tiny.layers=1", "sampled", {"policy.tiny.layers": 1}),
        ("sampling.top_p=0.5", "greedy", {"sampling.top_p": 0.5}),
        ("sampling.temperature=0.5", "sampled", {"sampling.temperature": 0.5}),
        ("sampling.temperature=0.5", "greedy", {}),
        ("sampling.temperature=0.5", "sampled at 0.4", {}),
        ("sampling.constrained=false", "sampled", {}),  # as it was
        ("policy.threads=1", "sampled", {}),
        ("policy.device=cpu", "sampled", {}),
        ("policy.dtype=bfloat16", "sampled", {}),
        ("sampling.waves=1", "sampled", {}),
        ("env.max_steps=3", "sampled", {}),  # in the digest
        ("rl.groups=3", "sampled", {}),
    ],
)
def test_another_agent_is_told_by_what_was_overridden(
    override: str, decoding: str, changes: dict[str, Any]
) -> None:
    own, played = make_recipe({}), make_recipe({}, overrides=[override])
    assert agent_changes(own, played, decoding) == changes


def test_equal_weights_have_equal_digests(tmp_path: Path) -> None:
    assert model_digest(tmp_path) is None
    save_file({"w": np.arange(4.0)}, tmp_path / "model.safetensors")
    shutil.copytree(tmp_path, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert model_digest(tmp_path / "copy") == model_digest(tmp_path)
    save_file({"w": np.arange(4.0) + 1e-12}, tmp_path / "copy" / "model.safetensors")
    assert model_digest(tmp_path / "copy") != model_digest(tmp_path)
