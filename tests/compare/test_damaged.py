"""Damaged run folders: a note and the others are compared, or one sentence; never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.compare.finished_runs import row, write_arm, write_run
from untwine.compare.numbers import compare_runs
from untwine.compare.runs import read_sweep
from untwine.config import make_recipe
from untwine.errors import CheckpointError
from untwine.evaluate.identity import model_digest
from untwine.evaluate.recorded import record_evaluation
from untwine.sweep.command import _report
from untwine.sweep.crew import Job
from untwine.sweep.worker import is_finished

Change = Callable[[dict[str, Any]], Any]
NAN = float("nan")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return write_arm(tmp_path, [0.4, 0.6, 0.5])


def seeds_and_notes(runs: list[Path]) -> tuple[list[int], str]:
    numbers = compare_runs(runs)
    json.dumps(numbers, allow_nan=False)
    return numbers["arms"][0]["seeds"], " ".join(numbers["notes"])


def alter(run: Path, change: Change) -> None:
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for one in rows:
        if one["stage"] == "evaluate":
            change(one)
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.pop("by_task"), "by_task is not an object"),
        (lambda r: r.update(by_task={}), "by_task is empty"),
        (lambda r: r.pop("success_rate"), "success_rate is not a number"),
        (lambda r: r.pop("set"), "set is not str"),
        (lambda r: r["identity"].pop("digest"), "identity.digest is not str"),
        (lambda r: r["identity"].pop("decoding"), "identity.decoding is not str"),
        (lambda r: r["identity"].pop("episodes"), "identity.episodes is not a number"),
        (lambda r: r.update(identity="x"), "identity is not an object"),
        (lambda r: r.update(success_rate=NAN), "success_rate is not a number from 0 to 1"),
        (lambda r: r.update(success_rate=37.0), "success_rate is not a number from 0 to 1"),
        (
            lambda r: r["by_task"]["a"].update(success_rate=-1),
            "a.success_rate is not a number from",
        ),
        (lambda r: r.update(outcome_mean=10**400), "outcome_mean is not a number"),
        (lambda r: r["by_task"]["a"].update(success_rate=NAN), "a.success_rate is not a number"),
        (lambda r: r["by_task"]["a"].update(outcome_mean=None), "a.outcome_mean is not a number"),
        (lambda r: r["by_task"].update(a=3), "by_task.a is not an object"),
    ],
)
def test_damaged_rows_are_left_out_and_named(runs: list[Path], change: Change, words: str) -> None:
    alter(runs[1], change)
    seeds, notes = seeds_and_notes(runs)
    assert seeds == [0, 2]
    assert words in notes
    assert f"make one with `untwine evaluate {runs[1]}`" in notes


def test_parts_that_are_only_told_may_lack(runs: list[Path]) -> None:
    for run in runs[:2]:
        alter(run, lambda r: (r["identity"].pop("options"), r.pop("flawed_rate")))
    assert seeds_and_notes(runs) == ([0, 1, 2], "")


def test_a_result_that_lacks_a_task_is_left_out(runs: list[Path]) -> None:
    alter(runs[1], lambda r: r["by_task"].pop("b"))
    seeds, notes = seeds_and_notes(runs)
    assert seeds == [0, 2]
    assert "it lacks b; make it anew" in notes
    record_evaluation(runs[1], row({"a": 0.9, "b": 0.9}))
    seeds, notes = seeds_and_notes(runs)
    assert seeds == [0, 1, 2]
    assert "it lacks b" in notes


def test_one_broken_recipe_does_not_stop_the_others(runs: list[Path], tmp_path: Path) -> None:
    for text in (b"name: [", b"env: {nme: rooms}\n", b"\xff\xfe", b"- 1\n"):
        (runs[1] / "recipe.yaml").write_bytes(text)
        seeds, notes = seeds_and_notes(runs)
        assert seeds == [0, 2]
        assert f"{runs[1]}: left out, since" in notes
    with pytest.raises(CheckpointError, match=r"nothing to compare\. .*seed-1: left out"):
        compare_runs([runs[1]])
    entries = [{"folder": run.name, "arm": "A", "seed": k} for k, run in enumerate(runs)]
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": entries}))
    assert compare_runs([tmp_path])["arms"][0]["seeds"] == [0, 2]


def test_the_recipe_of_the_run_that_made_a_model_may_be_broken(tmp_path: Path) -> None:
    cold = write_run(tmp_path / "cold", [row({"a": 0.5})], iterations=0)
    policy = {"model": str(cold / "model")}
    run = write_run(tmp_path / "run", [row({"a": 0.5})], policy=policy)
    other = write_run(tmp_path / "other", [row({"a": 0.5})], seed=1)
    (cold / "recipe.yaml").write_text("name: [")
    seeds, notes = seeds_and_notes([run, other])
    assert seeds == [1]
    assert f"{run}: left out, since {cold}" in notes


def test_a_run_whose_model_is_its_own_is_compared(tmp_path: Path) -> None:
    own = {"model": str(tmp_path / "run" / "model")}
    run = write_run(tmp_path / "run", [row({"a": 0.5})], policy=own)
    assert seeds_and_notes([run]) == ([0], "")


@pytest.mark.parametrize("text", [b"[]", b'{"status"', b'"x"', b"\xff"])
def test_a_damaged_run_json_is_named(runs: list[Path], text: bytes) -> None:
    (runs[1] / "run.json").write_bytes(text)
    seeds, notes = seeds_and_notes(runs)
    assert seeds == [0, 2]
    assert "its run.json is missing or damaged, continue it with `untwine train" in notes


def test_a_sweep_takes_a_torn_run_up_again_and_tells_what_it_can(runs: list[Path]) -> None:
    job = Job("GRPO, seed 1", make_recipe({}), runs[1])
    (runs[1] / "run.json").write_text('{"status"')
    assert not is_finished(runs[1])
    for change in (lambda r: r.pop("set"), lambda r: r.update(success_rate="high")):
        alter(runs[1], change)
    said: list[str] = []
    crew = SimpleNamespace(finished=[job], failed={})
    _report(job, crew, 3, SimpleNamespace(line=said.append))  # type: ignore[arg-type]
    assert said == ["finished GRPO, seed 1 (1 of 3): success not evaluated"]


def test_a_number_of_iterations_that_is_none_is_read_from_the_recipe(runs: list[Path]) -> None:
    (runs[1] / "run.json").write_text('{"status": "finished", "iterations": "two"}')
    assert seeds_and_notes(runs) == ([0, 1, 2], "")


def test_a_folder_in_the_place_of_a_file_holds_no_evaluations(runs: list[Path]) -> None:
    (runs[0] / "evaluations.jsonl").mkdir()
    assert seeds_and_notes(runs)[0] == [0, 1, 2]


def test_a_run_without_the_weights_it_began_with_is_in_no_pair(runs: list[Path]) -> None:
    (runs[1] / "initial" / "model.safetensors").unlink()
    seeds, notes = seeds_and_notes(runs)
    assert seeds == [0, 1, 2]
    assert f"seed 1 ({runs[1]}): the weights it began with are missing" in notes


def test_recorded_evaluations_that_are_damaged(runs: list[Path]) -> None:
    weights = model_digest(runs[1] / "model")
    torn = json.dumps({"weights": weights, "set": "L0", "identity": {"decoding": "sampled"}})
    lines = [b"\xff\xfe", b"[1]", b"[" * 100_000, b'{"weights": 3}', torn.encode(), b'{"set": "L']
    (runs[1] / "evaluations.jsonl").write_bytes(b"\n".join(lines))
    seeds, notes = seeds_and_notes(runs)
    assert seeds == [0, 1, 2]
    assert "evaluations left out: 1 damaged (identity.digest is not str)" in notes
    record_evaluation(runs[1], row({"a": 0.9, "b": 0.9}))  # a new line, after half of one
    arm = compare_runs([runs[1]])["sets"][0]["arms"][0]
    assert arm["mean"] == pytest.approx(0.9)


def test_another_agent_does_not_pass_for_that_of_the_run(runs: list[Path], tmp_path: Path) -> None:
    """`untwine evaluate RUN prompt.tags=true` has the same digest as without."""
    better = row({"a": 0.9, "b": 0.9}) | {"overrides": {"prompt.tags": True}}
    record_evaluation(runs[1], better)
    assert compare_runs([runs[1]])["sets"][0]["arms"][0]["mean"] == pytest.approx(0.55)
    assert "left out: 1 of another agent (overrides of prompt.tags)" in seeds_and_notes(runs)[1]
    bare = write_run(tmp_path / "bare", [], seed=7, start=7)
    record_evaluation(bare, better)
    seeds, notes = seeds_and_notes([*runs, bare])
    assert seeds == [0, 1, 2]
    assert "(1 of another agent (overrides of prompt.tags)), make one with" in notes


def test_what_makes_an_evaluation_is_said_with_what_the_recipe_leaves_open(tmp_path: Path) -> None:
    (tmp_path / "rest").mkdir()
    write_arm(tmp_path / "rest", [0.5])
    silent = write_run(tmp_path / "run", [], seed=1, evaluate={"sets": [], "episodes": 0})
    notes = " ".join(compare_runs([tmp_path / "rest", silent])["notes"])
    assert f"`untwine evaluate {silent} --sets L0,L1 --episodes N`" in notes


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"[]",
        b"\xff\xff",
        b"[" * 100_000,
        b'{"runs": {}}',
        b'{"runs": [3]}',
        b'{"runs": [{"folder": 3, "arm": "x", "seed": 0}]}',
        b'{"runs": [{"folder": "a", "arm": null, "seed": 0}]}',
        b'{"runs": [{"folder": "a", "arm": ["x"], "seed": 0}]}',
        b'{"runs": [{"folder": "a", "arm": "x", "seed": "many"}]}',
    ],
)
def test_odd_sweep_files_are_damaged(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "sweep.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"sweep\.json is damaged \(.*start the sweep again"):
        read_sweep(tmp_path)
