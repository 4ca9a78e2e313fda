"""Whole small runs: every objective resumes bit for bit, and a broken judge does not stop one."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.gcd.judge_server import Handler, serving
from tests.gcd.test_judge import closed_port
from tests.runs import cold_start_of, in_one_and_in_two, rows, steady
from tests.training.test_resume import RECIPE
from untwine.config import Recipe, make_recipe
from untwine.episodes import read_groups
from untwine.errors import ConfigError
from untwine.gcd.objectives.reinforced import Reinforced
from untwine.progress import Display
from untwine.training.loop import train
from untwine.training.run_dir import episode_files, run_cost
from untwine.workshop import Workshop


def recipe(iterations: int, **changes: Any) -> Recipe:
    tree = json.loads(json.dumps(RECIPE))
    tree["cold_start"] = {"episodes": 6, "steps": 4, "batch_tokens": 256, "noise": 0.5}
    tree["evaluate"] = {"episodes": 2, "sets": ["L0"]}
    tree["rl"] |= {"iterations": iterations, "groups": 2, "epochs": 1}
    tree["loss"] = {}
    tree["sampling"] = {"constrained": True}
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value}
    return make_recipe(tree)


WAYS = {
    "head, held ratio, expert": {
        "objective": "head", "weight_of": "gradient", "labels": ["rule", "expert"],
        "min_confidence": 0.0,
    },
    "rl, own step": {"objective": "generative/rl", "step": "own", "replies": 4},
    "pairwise, branch": {
        "objective": "pairwise", "labels": ["rule", "branch"],
        "branch": {"steps": 6, "branches": 16},
    },
    "head, own step": {"objective": "head", "step": "own"},
    "pairwise rl, layers": {"objective": "pairwise/rl", "gradient": "layers"},
}  # fmt: skip


QUICK = ("head, held ratio, expert", "rl, own step")


@pytest.mark.parametrize(
    "way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_a_run_in_two_parts_is_the_run_in_one(tmp_path: Path, way: str) -> None:
    gcd = {"token_budget": 2048, **WAYS[way]}
    whole, parts = in_one_and_in_two(tmp_path, partial(recipe, gcd=gcd), 2)
    files = [r / "checkpoints" / "rl-000002" for r in (parts, whole)]
    assert [f.name for f in sorted(files[0].iterdir())] == [
        f.name for f in sorted(files[1].iterdir())
    ]
    for file in files[1].glob("*.safetensors"):
        mine = load_file(files[0] / file.name)
        for name, value in load_file(file).items():
            assert mine[name].tobytes() == value.tobytes(), (file.name, name)
    mine, other = rows(parts, "evaluate")[-1], rows(whole, "evaluate")[-1]
    assert steady([mine]) == steady([other])
    assert sum(r["verdicts"] for r in rows(whole)) > 0
    assert run_cost(whole) == {key: other[key] for key in ("cost_tokens", "cost_seconds")}
    assert mine["cost_tokens"]["gcd"] == sum(r.get("gcd_tokens", 0) for r in rows(whole))
    if "branch" in gcd.get("labels", []):
        for name in ("truth-iter-000000.jsonl", "truth-iter-000001.jsonl"):
            texts = [(r / "diagnose" / name).read_bytes() for r in (parts, whole)]
            assert texts[0] == texts[1]


def judged(run: Path, url: str, **judge: Any) -> list[dict[str, Any]]:
    gcd = {
        "objective": "generative/ce",
        "labels": ["rule", "judge"],
        "judge": {"url": url, "model": "m", "timeout_s": 5.0, "retries": 0, **judge},
    }
    train(recipe(2, gcd=gcd), run, Display(quiet=True))
    return rows(run)


def test_training_goes_on_without_its_judge(tmp_path: Path) -> None:
    found = judged(tmp_path / "down", closed_port())
    assert len(found) == 2
    for row in found:
        assert row["labels_judge"] == row["judge_answered"] == 0
        assert row["judge_failed"] >= 3
        assert row["judge_skipped"] > 0
        assert row["labels_rule"] > 0
    with serving(lambda handler, _: handler.say("As a language model, I like trains.")) as server:
        found = judged(tmp_path / "nonsense", server.url, questions=10)
        assert [r["judge_nonsense"] + r["judge_kept"] for r in found] == [10, 10]
        assert all(r["labels_judge"] == 0 for r in found)


def test_a_judge_labels_and_is_paid_for(tmp_path: Path) -> None:
    def moody(handler: Handler, body: dict[str, Any]) -> None:
        text = str(body["messages"][-1]["content"])
        handler.say("good" if "Action: go" in text else "bad")

    with serving(moody) as server:
        found = judged(tmp_path / "run", server.url, questions=20)
    assert all(row["labels_judge"] > 0 for row in found)
    labelled = [
        (step.command or "", label.verdict)
        for file in episode_files(tmp_path / "run")
        for group in read_groups(file)
        for episode in group.episodes
        for step in episode.steps
        for label in step.labels
        if label.source == "judge"
    ]
    assert len({verdict for _, verdict in labelled}) == 2
    assert all((v == "good") == command.startswith("go") for command, v in labelled)
    assert sum(r["label_tokens"] for r in found) == 10 * sum(r["judge_answered"] for r in found)
    assert all(r["judge_answered"] + r["judge_kept"] <= 20 for r in found)
    last = rows(tmp_path / "run", "evaluate")[-1]
    assert last["cost_tokens"]["labels"] == sum(r["label_tokens"] for r in found)


def test_labels_of_one_class_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # five steps are the shortest way there is, and without partial scores nothing else is progress
    changes: dict[str, Any] = {
        "env": {
            "options": {"partial_scores": False},
            "tasks": ["tidy"],
            "max_steps": 5,
            "held_out_tasks": ["unlock"],
        },
        "cold_start": {"episodes": 0},
    }
    train(
        recipe(2, gcd={"objective": "generative/ce", "labels": ["rule"]}, **changes),
        tmp_path / "run",
        Display(),
    )
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("nothing to learn from the labels of iteration 0: 0 distinct actions") == 1
    assert "both kinds are needed" in shown
    assert [row["verdicts"] for row in rows(tmp_path / "run")] == [0, 0]


@pytest.mark.parametrize(
    ("gcd", "message"),
    [
        ({"objective": "generativ/ce"}, "Did you mean 'generative/ce'"),
        ({"objective": "head", "labels": ["rulez"]}, "Did you mean 'rule'"),
        ({"objective": "head", "labels": []}, "needs labels"),
        ({"objective": "head", "labels": ["rule", "rule"]}, "names a source twice"),
        ({"norms_every": 3}, "set norms_every: 1 or weight_of: gradient"),
        ({"schedule": {"end": 0.0}}, "schedule: end: 0 is where a linear schedule ends"),
        ({"from_layer": 1}, "set gradient: layers"),
        ({"objective": "pairwise", "contrast": "similar"}, "contrast: similar is for"),
        ({"objective": "head", "rationale_tokens": 5}, "head samples none"),
        ({"weight": float("inf")}, "finite number"),
        ({"weight": float("nan")}, "gcd.weight"),
        ({"objective": "head", "labels": ["judge"]}, "there is none; set gcd.judge.url"),
        ({"objective": "head", "gradient": "lora"}, "needs adapters"),
    ],
)
def test_bad_settings_are_said(tmp_path: Path, gcd: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(recipe(1, gcd=gcd), tmp_path / "run", Display(quiet=True))


def test_the_weight_falls_with_the_tokens_that_are_used(tmp_path: Path) -> None:
    """The tenth of the iterations that a budget allows is the whole of the training; at weight 0
    nothing is asked, so that nothing is paid."""
    gcd = {
        "objective": "generative/ce", "weight": 0.5, "schedule": {"kind": "linear", "end": 0.0},
    }  # fmt: skip
    free = recipe(3, gcd=gcd)
    train(free, tmp_path / "free", Display(quiet=True))
    found = rows(tmp_path / "free")
    assert [row["gcd_weight"] for row in found] == [0.5, 0.25, 0.0]
    assert found[1]["verdicts"] > 0
    assert (found[2]["verdicts"], found[2].get("gcd_tokens", 0)) == (0, 0)
    first = found[0]["policy_tokens"] + found[0]["gcd_tokens"]
    short = recipe(30, gcd=gcd, rl={"token_budget": int(1.5 * first)})
    train(short, tmp_path / "short", Display(quiet=True))
    weights = [row["gcd_weight"] for row in rows(tmp_path / "short")]
    assert weights[0] == 0.5
    assert weights[1] == pytest.approx(0.5 * (1 - first / int(1.5 * first)))


@pytest.mark.parametrize(
    ("penalty", "dropped", "said"), [(0.3, True, 1), (0.0, True, 0), (0.3, False, 0)]
)
def test_credit_that_is_dropped_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], penalty: float, dropped: bool, said: int
) -> None:
    """Nobody succeeds who has learnt nothing, and some of the steps are flawed."""
    own = recipe(
        2, credit={"penalty": penalty}, cold_start={"episodes": 0},
        rl={"drop_constant_groups": dropped, "returns": "success"},
    )  # fmt: skip
    train(own, tmp_path / "run", Display())
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("though their steps differ in credit") == said


def test_free_labels_only_without_an_objective(tmp_path: Path) -> None:
    gcd = {"objective": "none", "labels": ["rule", "branch"]}
    train(recipe(1, gcd=gcd), tmp_path / "run", Display(quiet=True))
    (row,) = rows(tmp_path / "run")
    assert "labels_rule" in row
    assert "labels_branch" not in row


def test_each_step_of_the_cold_start_asks_as_many_good_as_flawed_and_none_twice() -> None:
    cold = {"episodes": 12, "steps": 1, "batch_tokens": 1600, "verdict_weight": 0.3}
    with Workshop(recipe(0, cold_start=cold), Display(quiet=True)) as workshop:
        critic = cold_start_of(workshop).critic
        assert critic is not None
        drawn = [critic.exercise((), random.Random(seed)) for seed in range(20)]
        decode = workshop.policy.tokenizer.decode
    for exercise in drawn:
        assert exercise is not None
        answers = Counter(decode(row.ids[row.targets]) for row in exercise.rows)
        assert answers["good"] == answers["bad"] > 0
        assert answers.total() == len(exercise.rows) == exercise.counts["verdicts"]
        assert len({row.ids.tobytes() for row in exercise.rows}) == len(exercise.rows)
        assert sum(row.weights.sum() for row in exercise.rows) == pytest.approx(1)
    assert len({exercise.rows[0].ids.tobytes() for exercise in drawn if exercise}) > 5


def test_a_cold_start_without_flawed_commands_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cold = {"episodes": 4, "steps": 1, "verdict_weight": 0.3, "noise": 0.0}
    train(recipe(0, cold_start=cold), tmp_path / "run", Display())
    shown = " ".join(capsys.readouterr().err.split())
    assert "no verdicts, since good and flawed commands are both needed" in shown
    assert "set cold_start.noise" in shown


def test_where_the_gradient_enters_is_checked_before_the_cold_start(tmp_path: Path) -> None:
    gcd = {"objective": "generative/ce", "gradient": "layers", "from_layer": 40}
    with pytest.raises(ConfigError, match=r"gcd\.from_layer is 40"):
        train(recipe(1, gcd=gcd), tmp_path / "run", Display(quiet=True))
    assert not rows(tmp_path / "run", "cold_start")


def test_a_judge_without_address_leaves_no_folder(tmp_path: Path) -> None:
    gcd = {"objective": "head", "labels": ["judge"], "judge": {"url": "nowhere", "model": "m"}}
    with pytest.raises(ConfigError, match="is no address"):
        train(recipe(1, gcd=gcd), tmp_path / "run", Display(quiet=True))
    assert not (tmp_path / "run").exists()


def test_sampling_verdicts_is_time_of_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of our own, on which it takes an hour."""
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-3
        return now[0]

    plain = Reinforced._replies

    def slow(*given: Any) -> Any:
        now[0] += 3600
        return plain(*given)

    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(Reinforced, "_replies", slow)
    gcd = {"objective": "generative/rl", "replies": 4}
    train(recipe(2, gcd=gcd), tmp_path / "run", Display(quiet=True))
    found = [row for row in rows(tmp_path / "run") if row["verdicts"]]
    assert found
    for row in found:
        assert row["seconds_gcd"] >= 3600
        assert row["seconds_policy"] < 3600 <= row["seconds_update"]


@pytest.mark.parametrize(("share", "objective"), [(0.25, "generative/ce"), (0.5, "pairwise")])
def test_cold_start_holds_the_stated_ratio(tmp_path: Path, share: float, objective: str) -> None:
    cold = {
        "episodes": 12, "steps": 3, "batch_tokens": 2048, "verdict_weight": 0.3,
        "verdict_share": share, "objective": objective,
    }  # fmt: skip
    train(recipe(0, cold_start=cold), tmp_path / "run", Display(quiet=True))
    found = rows(tmp_path / "run", "cold_start")
    imitation = sum(row["imitation_tokens"] for row in found)
    verdicts = sum(row["gcd_tokens"] for row in found)
    assert verdicts / imitation == pytest.approx(share, rel=0.2)  # rows are whole


def test_verdicts_that_drown_the_policy_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for weight, drowned in ((1e3, 1), (1e-3, 0)):
        gcd = {"objective": "generative/ce", "labels": ["rule"], "weight": weight}
        run = tmp_path / f"run-{drowned}"
        train(recipe(12, gcd=gcd, checkpoint={"every": 12}), run, Display())
        shown = " ".join(capsys.readouterr().err.split())
        assert shown.count("times that of the policy") == drowned
        # every tenth of two optimizer steps an iteration
        assert {row["step"] for row in rows(run) if "grad_norm_gcd" in row} == {0, 5, 10}
        ratios = [row["gcd_ratio"] for row in rows(run) if row.get("gcd_ratio")]
        assert ratios
        assert all((ratio > 3) == bool(drowned) for ratio in ratios)
