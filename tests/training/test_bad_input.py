"""Bad input to a whole run: said in one sentence before any work, or survived."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.gcd.judge_server import mute, serving
from tests.gcd.test_training import judged, recipe
from tests.runs import rows
from tests.training.test_resume import RECIPE
from untwine.envs.pool import EnvPool
from untwine.envs.rooms import INFO
from untwine.envs.splits import FOLDER
from untwine.errors import CheckpointError, ConfigError, EnvError, UntwineError
from untwine.progress import Display
from untwine.report import report_numbers
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


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"prompt": {"max_tokens": 30}},
            r"has \d+ tokens but only 30 fit; raise prompt\.max_tokens \(now 30\)$",
        ),
        (
            {"sampling": {"max_new_tokens": 5000, "constrained": False}},
            r"but only 0 fit; lower sampling\.max_new_tokens \(now 5000\) to 40\d\d or less, or "
            r"use a model with more than 4096 positions$",
        ),
        (
            {"policy": {"tiny": {**RECIPE["policy"]["tiny"], "positions": 40}}},
            r"but only 34 fit; use a model with more than 40 positions$",
        ),
        (
            {
                "prompt": {"max_tokens": 30},
                "sampling": {"max_new_tokens": 4090, "constrained": False},
            },
            r"but only 6 fit; raise prompt\.max_tokens \(now 30\) and lower .* to 40\d\d or less",
        ),
    ],
)
def test_a_prompt_without_room_is_said_before_the_cold_start(
    tmp_path: Path, changes: dict[str, Any], advice: str
) -> None:
    room = {"sampling": {"max_new_tokens": 6, "constrained": False}} | changes
    with pytest.raises(UntwineError, match=advice) as caught:
        train(recipe(1, **room), tmp_path / "run", QUIET)
    assert str(caught.value).startswith("the first prompt of rooms/fetch/")
    assert not rows(tmp_path / "run", "cold_start")
    train(recipe(1, cold_start={"episodes": 0}), tmp_path / "run", QUIET)  # nothing in the way


def test_wrong_options_of_the_credit_method_leave_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^credit\.options\.eps: .* \(got 'abc'\)"):
        train(recipe(1, credit={"options": {"eps": "abc"}}), tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_what_fails_after_the_cold_start_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def broken(*_: object, **__: object) -> None:
        raise EnvError("the environment is gone")

    with monkeypatch.context() as patch:
        patch.setattr("untwine.training.loop.rollout_measures", broken)
        with pytest.raises(EnvError) as caught:
            train(recipe(1), run, QUIET)
    assert str(caught.value) == (
        "the environment is gone; what was trained before is saved, go on with "
        f"`untwine train --resume {run} KEY=VALUE`"
    )
    before = rows(run, "cold_start")
    train(recipe(1), run, QUIET, resume=True)
    assert rows(run, "cold_start") == before
    assert len(rows(run)) == 1


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


def test_a_run_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"no run can be written to .*choose another --run"):
        train(recipe(1), tmp_path / "file" / "run", Display(quiet=True))


def test_an_environment_without_expert_is_not_asked_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = dataclasses.replace(INFO, has_expert=False)
    monkeypatch.setattr(EnvPool, "info", property(lambda _: none))
    with pytest.raises(EnvError, match="has no expert, so there is nothing to imitate; set"):
        train(recipe(1), tmp_path / "run", Display(quiet=True))


def test_iterations_without_spread_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One episode a group has nothing to be compared with."""
    alone = {"group_size": 1, "drop_constant_groups": True}
    own = recipe(2, rl=alone, gcd={"objective": "none"})
    train(own, tmp_path / "run", Display())
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("nothing to learn: in each of the 2 groups of iteration 0") == 1
    (run,) = report_numbers([tmp_path / "run"])["runs"]
    assert "nothing was trained" in run["first_look"][2]
    assert "rose" not in run["first_look"][1]
