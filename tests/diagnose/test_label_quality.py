"""Precision, recall and coverage, worked out by hand; and the command on a real run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.diagnose.test_truth_commands import RECIPE
from tests.gcd.judge_server import serving
from untwine.cli import main
from untwine.config import make_recipe
from untwine.diagnose.label_quality import Compared, find_label_quality, quality
from untwine.diagnose.recorded import read_recorded
from untwine.diagnose.truth_file import (
    Truth,
    TruthRow,
    checksum,
    read_truth,
    truth_path,
    write_truth,
)
from untwine.envs import registry
from untwine.episodes import write_groups
from untwine.errors import ConfigError
from untwine.evaluate.statistics import wilson_interval
from untwine.progress import Display
from untwine.records import Label
from untwine.training.loop import train

STEPS = [
    Compared("flawed", -0.5, 4.0, "flawed"),
    Compared("flawed", -0.2, 2.0, "good"),
    Compared("flawed", -0.9, 2.0, None),
    Compared("good", 0.7, 1.0, "good"),
    Compared("good", 0.9, 3.0, None),
    Compared("neutral", 0.1, 4.0, "flawed"),
    Compared("neutral", 0.0, 4.0, None),
]


def test_by_hand() -> None:
    found = quality(STEPS)
    assert found["coverage"]["value"] == pytest.approx(11 / 20)
    assert found["accuracy"]["value"] == pytest.approx(5 / 7)
    flawed, good = found["flawed"], found["good"]
    assert flawed["precision"]["value"] == pytest.approx(4 / 8)
    assert flawed["precision_decided"]["value"] == pytest.approx(1.0)
    assert flawed["recall"]["value"] == pytest.approx(4 / 8)
    assert good["precision"]["value"] == pytest.approx(1 / 3)
    assert good["recall"]["value"] == pytest.approx(1 / 4)
    assert found["counts"]["flawed"] == {"good": 1, "flawed": 1, "none": 1}
    assert found["counts"]["neutral"] == {"good": 0, "flawed": 1, "none": 1}
    # effective number of the two steps that are said to be flawed: 8^2 / (16 + 16) = 2
    assert flawed["precision"]["interval"] == pytest.approx(list(wilson_interval(1.0, 2)))


def test_worth_is_the_mean_advantage_of_all_steps_with_the_label() -> None:
    """Neutral steps included; in the interval groups are drawn anew, not steps."""
    worth = quality(STEPS)["worth"]
    assert worth["flawed_mean"]["value"] == pytest.approx((4 * -0.5 + 4 * 0.1) / 8)
    assert worth["good_mean"]["value"] == pytest.approx((2 * -0.2 + 1 * 0.7) / 3)
    assert worth["difference"]["value"] == pytest.approx(0.1 + 0.2)
    assert worth["flawed_mean"]["interval"] is None  # all of one group
    two = [Compared("neutral", -0.4, 1.0, "flawed", (k, 0)) for k in (0, 1) for _ in range(30)]
    low, high = quality([*two, Compared("good", 0.5, 60.0, "flawed", (1, 3))])["worth"][
        "flawed_mean"
    ]["interval"]
    assert (low, high) == pytest.approx((-0.4, 0.5))  # drawn three times: one group alone


def test_a_source_that_says_nothing() -> None:
    found = quality([Compared("good", 0.2, 1.0, None)])
    assert found["worth"] == {"flawed_mean": None, "good_mean": None, "difference": None}
    assert found["coverage"]["value"] == 0.0
    assert found["accuracy"] == {"value": None, "interval": None, "steps": 0}
    assert found["flawed"]["precision"]["value"] is None
    assert found["good"]["recall"]["value"] == 0.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that made its own truth by training with branch labels."""
    before = dict(registry._FAMILIES)
    registry.register_family("chain", "tests.diagnose.untwine_chain_env:FAMILY")
    path = tmp_path_factory.mktemp("quality") / "run"
    gcd = {
        "objective": "generative/ce",
        "labels": ["rule", "branch"],
        "branch": {"steps": 24, "branches": 32},
    }
    train(make_recipe({**RECIPE, "gcd": gcd}), path, Display(quiet=True))
    yield path
    registry._FAMILIES.clear()
    registry._FAMILIES.update(before)


def episodes(run: Path, iteration: int) -> Path:
    return run / "episodes" / f"iter-{iteration:06d}.jsonl.gz"


def weight(rows: list[TruthRow]) -> float:
    return sum(row.weight for row in rows)


def test_command(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "untwine.gcd.labels:rule_labels"
    arguments = ["labels", run, "--sources", f"rule,group,expert,{own}", "--json"]
    monkeypatch.setattr(sys, "argv", ["untwine", "diagnose", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert not exit_info.value.code
    numbers = json.loads(capsys.readouterr().out)
    assert json.loads((run / "diagnose" / "labels.json").read_text()) == numbers
    assert numbers["iterations"] == [0, 1]
    assert set(numbers["sources"]) == {"rule", "group", "expert", own}
    assert numbers["sources"][own] == numbers["sources"]["rule"]
    truth = [row for k in (0, 1) for row in read_truth(truth_path(run, k), episodes(run, k)).rows]
    ruled = [row for row in truth if row.kind != "other"]  # the kind is that of the rule, if any
    flawed = [row for row in ruled if row.kind != "progress"]
    rule = numbers["sources"]["rule"]
    assert rule["coverage"]["value"] == pytest.approx(weight(ruled) / weight(truth))
    right = weight([row for row in flawed if row.label == "flawed"])
    assert rule["flawed"]["precision"]["value"] == pytest.approx(right / weight(flawed))
    mean = sum(row.weight * row.advantage for row in flawed) / weight(flawed)
    assert rule["worth"]["flawed_mean"]["value"] == pytest.approx(mean)
    assert numbers["sources"]["expert"]["coverage"]["value"] > 0.3
    for source in numbers["sources"].values():
        counts = source["counts"]
        assert sum(sum(row.values()) for row in counts.values()) == numbers["steps"]


def test_labels_are_those_that_training_would_have_used(run: Path) -> None:
    """`undo` has confidence .6, all other kinds of the rules 1."""

    def quality_at(least: float) -> dict[str, Any]:
        recipe = make_recipe({**RECIPE, "gcd": {"min_confidence": least}})
        found = find_label_quality(run, recipe, Display(quiet=True), sources=["rule", "group"])
        sources: dict[str, Any] = found["sources"]
        return sources

    loose, strict = quality_at(0.0), quality_at(0.7)
    truth = [row for k in (0, 1) for row in read_truth(truth_path(run, k), episodes(run, k)).rows]
    sure = weight([row for row in truth if row.kind not in ("other", "undo")])
    assert strict["rule"]["coverage"]["value"] == pytest.approx(sure / weight(truth))
    coverages = [s["group"]["coverage"]["value"] for s in (strict, loose)]
    assert coverages[0] < coverages[1]


def test_a_judge_is_asked_about_the_judged_steps_only(run: Path) -> None:
    with serving(lambda handler, _: handler.say("good")) as server:
        recipe = make_recipe(
            {**RECIPE, "gcd": {"judge": {"url": server.url, "model": "m", "questions": 1000}}}
        )
        found = find_label_quality(run, recipe, Display(quiet=True), sources=["judge"])
        asked = len(server.requests)
    judge = found["sources"]["judge"]
    assert judge["coverage"]["value"] == 1.0
    assert 0 < asked <= found["steps"]
    assert found["cost"]["judge_answered"] == asked
    good = [row for k in (0, 1) for row in read_truth(truth_path(run, k), episodes(run, k)).rows]
    right = weight([row for row in good if row.label == "good"])
    assert judge["good"]["precision"]["value"] == pytest.approx(right / weight(good))


def test_a_source_that_is_silent_for_an_iteration_covers_none_of_it(
    run: Path, tmp_path: Path
) -> None:
    """Labels on record in one of two iterations, as of a judge whose budget is spent."""
    partly = Path(shutil.copytree(run, tmp_path / "run"))
    recipe = make_recipe(RECIPE)
    groups = read_recorded(episodes(partly, 0), recipe)
    label = Label("judge", "good", "judge", 0.9)
    rows = [[[(*s.labels, label) for s in e.steps] for e in g.episodes] for g in groups]
    told = [group.with_labels(own) for group, own in zip(groups, rows, strict=True)]
    write_groups(episodes(partly, 0), told)
    truth = read_truth(truth_path(run, 0), episodes(run, 0))
    header = {**truth.header, "episodes_sha256": checksum(episodes(partly, 0))}
    write_truth(truth_path(partly, 0), Truth(header, truth.rows))
    found = find_label_quality(partly, recipe, Display(quiet=True))
    both = [read_truth(truth_path(run, k), episodes(run, k)).rows for k in (0, 1)]
    assert found["steps"] == sum(map(len, both))
    coverage = found["sources"]["judge"]["coverage"]
    assert coverage["value"] == pytest.approx(weight(both[0]) / weight([*both[0], *both[1]]))
    assert coverage["steps"] == found["steps"]


def test_branch_is_drawn_anew(run: Path) -> None:
    """It agrees with the truth, which it is drawn independently of, more often with more pairs."""

    def measured(branches: int) -> dict[str, Any]:
        gcd = {"branch": {"branches": branches, "delta": 0.05}}
        recipe = make_recipe({**RECIPE, "gcd": gcd})
        found = find_label_quality(run, recipe, Display(quiet=True), sources=["branch"])
        assert found["cost"]["branch_steps"] == found["steps"] == 48
        assert found["cost"]["branch_episodes"] > 0
        return found

    few, many = measured(4), measured(64)
    assert few["cost"]["branch_episodes"] < many["cost"]["branch_episodes"]
    few, many = few["sources"]["branch"], many["sources"]["branch"]
    assert few["coverage"]["value"] < many["coverage"]["value"]
    assert many["accuracy"]["value"] > 0.9
    for verdict in ("good", "flawed"):
        assert many[verdict]["recall"]["value"] > 0.5


def test_what_is_lacking_is_said(run: Path, tmp_path: Path) -> None:
    recipe, display = make_recipe(RECIPE), Display(quiet=True)
    bare = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(bare / "diagnose")
    with pytest.raises(ConfigError, match="train with branch in"):
        find_label_quality(bare, recipe, display)


def test_table(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["untwine", "diagnose", "labels", str(run)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert "precision flawed" in shown
    assert "good minus flawed" in shown
    assert "rule" in shown
