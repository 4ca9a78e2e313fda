"""`untwine diagnose truth` and `calibration` on a real run, from the command line."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.diagnose.untwine_chain_env import ChainEnv
from untwine.cli import main
from untwine.config import make_recipe
from untwine.credit import register_credit
from untwine.credit.grpo import grpo
from untwine.diagnose.recorded import read_recorded
from untwine.diagnose.truth_file import read_truth, truth_path
from untwine.envs import registry
from untwine.episodes import read_groups, write_groups
from untwine.errors import ConfigError
from untwine.progress import Display
from untwine.records import Group, Label
from untwine.report import report_numbers
from untwine.training.loop import train
from untwine.training.run_dir import RunDir, episode_files

RECIPE = {
    "name": "chain",
    "env": {"name": "chain", "max_steps": 4, "sessions": 16, "held_out_tasks": ["far"]},
    "policy": {
        "model": "tiny",
        "threads": 1,
        "tiny": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "vocab_size": 400},
    },
    "sampling": {"constrained": True},
    "rl": {"iterations": 2, "groups": 3, "group_size": 4, "optimizer": {"lr": 1.0e-2}},
    "evaluate": {"episodes": 0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run, made once; leave it as it is."""
    before = dict(registry._FAMILIES)
    registry.register_family("chain", "tests.diagnose.untwine_chain_env:FAMILY")
    path = tmp_path_factory.mktemp("chain") / "run"
    train(make_recipe(RECIPE), path, Display(quiet=True))
    yield path
    registry._FAMILIES.clear()
    registry._FAMILIES.update(before)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def diagnose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs the command; its exit code, output and error output."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["untwine", "diagnose", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        code = exit_info.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


def test_truth_then_calibration(copy: Path, diagnose: Any) -> None:
    arguments = ("truth", copy, "--steps", 12, "--branches", 16, "--json")
    code, out, err = diagnose(*arguments)
    assert code == 0, err
    found = json.loads(out)
    file = copy / "episodes" / "iter-000001.jsonl.gz"
    stored = read_truth(truth_path(copy, 1), file)
    assert found["iteration"] == 1
    assert [row["advantage"] for row in found["rows"]] == [r.advantage for r in stored.rows]
    assert len(stored.rows) == min(12, found["population"])
    assert found["mismatches"] == []
    assert found["policy_gap"] < 1e-3  # checkpoint 1 is the policy that played iteration 1
    assert found["flawed_by_chance"] == pytest.approx(0.025 * len(stored.rows))
    by_pair: dict[tuple[int, str, str], Any] = {}
    for row in stored.rows:
        assert row.weight == pytest.approx(found["population"] / len(stored.rows))
        assert row.low <= row.advantage <= row.high
        assert row.value is None or row.action_value is not None
        first = by_pair.setdefault((row.group, row.state_key, row.action), row)
        assert (first.advantage, first.n, first.q) == (row.advantage, row.n, row.q)
    assert diagnose(*arguments)[1] == out  # the same seed, the same answers
    code, out, err = diagnose("truth", copy, "--steps", 12, "--branches", 16)
    assert code == 0, err
    assert "by chance alone at most 0.3 would be" in " ".join(out.split())

    code, out, err = diagnose("calibration", copy, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["source"], result["iterations"]) == ("truth", [1])
    assert result["steps"] == len(stored.rows)
    measures = result["methods"]["grpo"]["all"]
    recipe = make_recipe(RECIPE)
    estimates = {}
    for group in read_recorded(file, recipe):
        for episode, row in zip(group.episodes, grpo(group), strict=True):
            estimates.update({(episode.id, t): a for t, a in enumerate(row)})
    own = [estimates[row.episode, row.step] for row in stored.rows]
    assert measures["mean_estimate"]["value"] == pytest.approx(math.fsum(own) / len(own))  # type: ignore[arg-type]
    advantages = [row.advantage for row in stored.rows]
    assert measures["mean_advantage"]["value"] == pytest.approx(
        math.fsum(advantages) / len(advantages)
    )
    parts = result["methods"]["grpo"]["by_position"]
    assert sum(part["steps"] for part in parts.values()) == len(own)
    code, out, err = diagnose("calibration", copy)
    assert code == 0, err
    assert "good minus flawed" in out


def test_strata_and_single_steps(copy: Path, diagnose: Any) -> None:
    code, out, err = diagnose(
        "truth", copy, "--iteration", 0, "--steps", 9, "--branches", 4, "--stratified", "position",
        "--no-pooled", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["iteration"] == 0
    assert {row["shared"] for row in found["rows"]} == {1}
    for position in ("early", "middle", "late"):
        own = [row["weight"] for row in found["rows"] if row["position"] == position]
        assert len(set(own)) == 1
    assert sum(row["weight"] for row in found["rows"]) == pytest.approx(found["population"])


def test_calibration_by_labels_and_of_new_methods(
    copy: Path, diagnose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from untwine import credit

    def fussy(group: Group) -> list[list[float | None]]:
        raise ConfigError("this run has no critic")

    def constant(group: Group) -> list[list[float | None]]:
        return [[1.0] * e.length for e in group.episodes]

    monkeypatch.setattr(credit, "_METHODS", dict(credit._METHODS))
    register_credit("fussy", fussy)
    register_credit("constant", constant)
    code, out, err = diagnose("calibration", copy, "--labels", "rule", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["flawed"] > 0
    assert "`rule` labels" in result["note"]
    assert result["methods"]["fussy"]["not_applicable"] == "this run has no critic"
    assert result["methods"]["constant"]["all"]["miscalibration"]["value"] == 1.0
    assert result["methods"]["grpo"]["all"]["rank_correlation"] is None
    assert result["methods"]["grpo"]["lemma"] is None
    assert set(result["methods"]["grpo"]["by_kind"]) <= {"no_effect", "repeat", "fatal", "progress",
                                                        "undo"}  # fmt: skip
    code, out, _ = diagnose("calibration", copy, "--labels", "rule")
    assert "fussy: not applicable, this run has no critic" in out


def test_calibration_of_what_a_run_trains_with(
    copy: Path, diagnose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method named by its place, and what a veto makes of its advantages."""
    (tmp_path / "untwine_ones.py").write_text(
        "def method(group):\n    return [[1.0] * e.length for e in group.episodes]"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "untwine_ones:method"
    code, out, err = diagnose(
        "calibration",
        copy,
        f"credit.name={name}",
        "credit.veto=[flawed]",
        "--labels",
        "rule",
        "--json",
    )
    assert code == 0, err
    methods = json.loads(out)["methods"]
    assert list(methods)[-2:] == [name, "as trained"]
    assert methods[name]["all"]["flawed_mean"]["value"] == 1.0
    assert methods["as trained"]["options"] == {"penalty": 0.0, "veto": ["flawed"]}
    assert methods["as trained"]["all"]["flawed_mean"]["value"] == 0.0
    assert methods["as trained"]["all"]["good_mean"]["value"] == 1.0
    assert report_numbers([copy])["runs"][0]["microscope"]["method"] == "as trained"


def test_labels_of_a_source_of_ones_own(
    copy: Path, diagnose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked anew by its place, but taken from the record where something is there."""
    (tmp_path / "untwine_said.py").write_text(
        "from untwine.records import Label\n"
        "def labels(group, info):\n"
        "    kinds = {True: 'good', False: 'flawed'}\n"
        "    return [[Label('', kinds[s.index > 0], 'late') for s in e.steps]\n"
        "            for e in group.episodes]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = diagnose("calibration", copy, "--labels", "untwine_said:labels", "--json")
    assert code == 0, err
    asked = json.loads(out)
    groups = [group for file in episode_files(copy) for group in read_groups(file)]
    lengths = [episode.length for group in groups for episode in group.episodes]
    assert (asked["flawed"], asked["good"]) == (len(lengths), sum(lengths) - len(lengths))
    code, _, err = diagnose("calibration", copy, "--labels", "gpt-4:v1")
    assert code == 2
    assert "not of the form module:attribute" in err
    first = Label("gpt-4:v1", "flawed", "late")
    for file in episode_files(copy):
        write_groups(file, [_labelled(group, first) for group in read_groups(file)])
    code, out, err = diagnose("calibration", copy, "--labels", "gpt-4:v1", "--json")
    assert code == 0, err
    assert (json.loads(out)["flawed"], json.loads(out)["good"]) == (len(lengths), 0)


def _labelled(group: Group, first: Label) -> Group:
    """The first step of every episode has this label."""
    return group.with_labels(
        [[(first,) if s.index == 0 else () for s in e.steps] for e in group.episodes]
    )


def test_an_environment_that_drifts_is_reported_not_hidden(
    copy: Path, diagnose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChainEnv, "resets", 10**6)
    options = 'env.options={"drifts": "state"}'
    code, out, err = diagnose("truth", copy, options, "--steps", 6, "--branches", 4, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["rows"] == []
    assert found["steps_left_out"] == 6
    assert len(found["mismatches"]) == found["replayed_episodes"] > 0
    code, out, _ = diagnose("truth", copy, options, "--steps", 6, "--branches", 4)
    assert "episodes could not be repeated" in " ".join(out.split())
    assert "6 steps left out" in " ".join(out.split())
    code, _, err = diagnose("calibration", copy)
    assert code == 2
    assert "hold no step" in err


def test_resuming_takes_back_the_truth_about_episodes_it_takes_back(copy: Path) -> None:
    for k in (0, 1):
        path = truth_path(copy, k)
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    RunDir.resume(copy, make_recipe(RECIPE), 0, 1).close("finished")
    assert [truth_path(copy, k).exists() for k in (0, 1)] == [True, False]


def test_bad_input_is_one_sentence(copy: Path, diagnose: Any, tmp_path: Path) -> None:
    code, _, err = diagnose("calibration", copy)
    assert code == 2
    assert "--labels group" in err
    code, _, err = diagnose("calibration", copy, "--labels", "judge")
    assert code == 2
    assert "'judge'" in err
    code, _, err = diagnose("truth", copy, "--iteration", 7)
    assert code == 5
    assert "no episodes of iteration 7; it has 0, 1" in " ".join(err.split())
    code, _, err = diagnose("truth", tmp_path / "nothing")
    assert code == 5
    code, _, err = diagnose("truth", copy, "--steps", 1, "--stratified", "position")
    assert code == 2
    assert "raise --steps" in err
    for folder in (copy / "checkpoints").iterdir():
        shutil.rmtree(folder)
    code, _, err = diagnose("truth", copy, "--iteration", 1)
    assert code == 5
    assert "--checkpoint" in err
    code, out, err = diagnose(
        "truth", copy, "--iteration", 1, "--checkpoint", copy / "initial", "--steps", 4,
        "--branches", 2, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["policy_gap"] > 1e-3
    shutil.rmtree(copy / "episodes")
    code, _, err = diagnose("truth", copy)
    assert code == 5
    assert "holds no episodes" in err
