"""Bad input to a whole run: said in one sentence before any work, or survived."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gcd.judge_server import mute, serving
from tests.gcd.test_training import judged, recipe
from tests.runs import rows
from untwine.envs.splits import FOLDER
from untwine.errors import EnvError
from untwine.progress import Display
from untwine.training.loop import train
from untwine.training.run_dir import run_info

QUIET = Display(quiet=True)


def splits_without(folder: Path, empty: str) -> str:
    """A split file of `rooms` like the default one, with one set empty."""
    tree = json.loads((FOLDER / "rooms-default.json").read_text(encoding="utf-8"))
    tree["sets"][empty] = {}
    file = folder / "mine.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("empty", "env", "message"),
    [
        (
            "train",
            {"tasks": []},
            "set 'train' of environment 'rooms' is empty, so there is nothing",
        ),
        ("L0", {"tasks": []}, "set 'L0' of environment 'rooms' is empty; leave it out of"),
        ("", {"tasks": ["fetsh"]}, "unknown task 'fetsh' of environment 'rooms'"),
        ("", {"train_set": "trian"}, "trian"),
    ],
)
def test_an_empty_or_unknown_set_leaves_no_run_behind(
    tmp_path: Path, empty: str, env: dict[str, Any], message: str
) -> None:
    splits = {"splits": splits_without(tmp_path, empty)} if empty else {}
    with pytest.raises(EnvError) as caught:
        train(recipe(1, env=env | splits), tmp_path / "run", QUIET)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_set_without_the_tasks_of_the_recipe_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match="it is in L2"):
        train(recipe(1, env={"held_out_tasks": ["fetch"]}), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_training_goes_on_with_a_judge_that_is_slow(tmp_path: Path) -> None:
    with serving(mute) as server:
        found = judged(tmp_path / "run", server.url, timeout_s=0.1)
    assert len(found) == 2
    for row in found:
        assert row["labels_judge"] == 0
        assert row["judge_failed"] >= 3
        assert row["judge_skipped"] > 0
        assert row["labels_rule"] > 0
    assert run_info(tmp_path / "run")["status"] == "finished"


def test_labels_of_one_class_only_train_the_policy_all_the_same(tmp_path: Path) -> None:
    """No step is ever called good, many are called flawed: there are no verdicts, and no crash, for
    every objective, and the penalty still works."""
    for name in ("generative/ce", "generative/rl", "pairwise", "head"):
        run = tmp_path / name.replace("/", "-")
        changes: dict[str, Any] = {
            "env": {"options": {"partial_scores": False}, "max_steps": 4},
            "cold_start": {"episodes": 0},
            "sampling": {"constrained": False, "max_new_tokens": 2},
            "credit": {"penalty": 0.3},
            "rl": {"drop_constant_groups": False},
        }
        train(recipe(1, gcd={"objective": name, "labels": ["rule"]}, **changes), run, QUIET)
        (found,) = rows(run)
        assert found["labels_rule"] > 0
        assert found["advantage_good"] is None
        assert found["advantage_flawed"] < 0
        assert found["verdicts"] == 0
        assert found["policy_tokens"] > 0
