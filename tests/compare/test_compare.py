"""Comparisons of finished runs: grouping, pairs, refusals, and numbers worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.compare.finished_runs import row, write_arm, write_run
from untwine.compare.numbers import compare_runs
from untwine.compare.runs import find_runs
from untwine.errors import CheckpointError, ConfigError
from untwine.evaluate.recorded import record_evaluation

GCD = {"gcd": {"objective": "generative/ce"}}
VALUES = [0.4, 0.6, 0.5, 0.7]


@pytest.fixture
def two_arms(tmp_path: Path) -> list[Path]:
    """Four seeds of each; GCD is better by .1 on the same cold starts."""
    return [
        *write_arm(tmp_path / "grpo", VALUES),
        *write_arm(tmp_path / "gcd", VALUES, shift=0.1, **GCD),
    ]


def by_label(rows: list[dict[str, Any]], label: str) -> dict[str, Any]:
    (found,) = [r for r in rows if r["label"] == label]
    return found


def test_runs_are_grouped_by_what_differs(two_arms: list[Path]) -> None:
    labels = ["gcd.objective=none", "gcd.objective=generative/ce"]
    arms = find_runs(two_arms).arms
    assert list(arms) == labels
    assert [[run.seed for run in runs] for runs in arms.values()] == [[0, 1, 2, 3]] * 2
    assert list(find_runs([two_arms[0].parent.parent]).arms) == sorted(labels)  # gcd/ first


def test_names_are_labels_where_they_tell_arms_apart(tmp_path: Path) -> None:
    runs = write_arm(tmp_path / "a", VALUES[:2], name="plain")
    runs += write_arm(tmp_path / "b", VALUES[:2], name="with GCD", **GCD)
    assert list(find_runs(runs).arms) == ["plain", "with GCD"]


def test_where_and_how_the_work_is_done_makes_no_arm(tmp_path: Path) -> None:
    kept = {"checkpoint": {"keep": 5}, "policy": {"threads": 3}, "evaluate": {"episodes": 9}}
    runs = write_arm(tmp_path / "a", [0.5], env={"name": "rooms", "workers": 2}, **kept)
    runs += write_arm(tmp_path / "b", [0.6], first=1)
    assert [len(own) for own in find_runs(runs).arms.values()] == [2]


def test_a_model_of_another_run_stands_for_its_recipe(tmp_path: Path) -> None:
    """Cold starts of two seeds are alike; one of another length is not."""
    runs = []
    for seed, steps in ((0, 50), (1, 50), (2, 90)):
        cold = {"cold_start": {"steps": steps}, "seed": seed}
        write_run(tmp_path / f"cold-{seed}", [row({"a": 0.5})], iterations=0, **cold)
        policy = {"model": str(tmp_path / f"cold-{seed}" / "model")}
        run = tmp_path / f"run-{seed}"
        runs.append(write_run(run, [row({"a": 0.5})], seed=seed, policy=policy))
    assert [len(own) for own in find_runs(runs).arms.values()] == [2, 1]


def test_models_of_other_runs_are_told_apart_in_few_words(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "plain", [row({"a": 0.5})])]
    for steps in (50, 90):
        cold = tmp_path / f"cold-{steps}"
        write_run(cold, [row({"a": 0.5})], iterations=0, cold_start={"steps": steps})
        policy = {"model": str(cold / "model")}
        runs.append(write_run(tmp_path / f"from-{steps}", [row({"a": 0.5})], policy=policy))
    assert list(find_runs(runs[:2]).arms) == ["policy.model=tiny", "policy.model=another run's"]
    made = "policy.model=another run's, policy.model.cold_start.steps="
    assert list(find_runs(runs).arms) == ["policy.model=tiny", f"{made}50", f"{made}90"]


def test_numbers_worked_by_hand(two_arms: list[Path]) -> None:
    numbers = compare_runs(two_arms)
    (entry,) = numbers["sets"]
    plain = by_label(entry["arms"], "gcd.objective=none")
    # sorted: .3 .4 .4 .5 .5 .6 .6 .7, two cut from each end
    assert plain["iqm"] == pytest.approx((0.4 + 0.5 + 0.5 + 0.6) / 4)
    assert plain["mean"] == pytest.approx(0.5)
    assert plain["iqm_interval"][0] < 0.5 < plain["iqm_interval"][1]
    assert set(plain["profile"]) == {"values", "interval", "interval_by_task"}
    assert plain["profile"]["values"][0] == 1.0
    assert plain["profile"]["values"][25] == pytest.approx(3 / 8)  # above .5: .6 .6 .7
    assert plain["repeated_rate"] == pytest.approx(0.2)
    (against,) = entry["against"]
    # task a: .4 .5 .6 .7 against .5 .6 .7 .8, of 16 pairs 10 are won and 3 tie; b is alike
    assert against["probability"] == pytest.approx((10 + 1.5) / 16)
    paired = against["paired"]
    assert paired["pairs"] == 4
    assert paired["mean"] == pytest.approx(0.1)
    assert paired["deviation"] == pytest.approx(0.0, abs=1e-12)
    assert paired["interval"] == pytest.approx([0.1, 0.1])
    assert paired["p_value"] == pytest.approx(2 / 16)
    arm = by_label(numbers["arms"], "gcd.objective=none")
    assert (arm["tokens"], arm["seconds"]) == (30, 6)
    assert (arm["overhead_tokens"], arm["overhead_seconds"]) == (10, 0)
    json.dumps(numbers, allow_nan=False)


def test_score_and_baseline_are_chosen(two_arms: list[Path]) -> None:
    label = "gcd.objective=generative/ce"
    numbers = compare_runs(two_arms, measure="score", baseline=label)
    (against,) = numbers["sets"][0]["against"]
    assert against["label"] == "gcd.objective=none"
    assert against["paired"]["mean"] == pytest.approx(-0.05)
    with pytest.raises(ConfigError, match=r"no arm 'gdc'; the arms are"):
        compare_runs(two_arms, baseline="gdc")
    with pytest.raises(ConfigError, match="success or score"):
        compare_runs(two_arms, measure="luck")


def test_pairs_need_seed_and_cold_start(tmp_path: Path) -> None:
    plain = write_arm(tmp_path / "grpo", VALUES)
    other = [
        write_run(tmp_path / f"gcd-{seed}", [row({"a": 0.9, "b": 0.9})], start=start, seed=seed,
                  **GCD)
        for seed, start in ((0, 0), (1, 7), (9, 3))
    ]  # fmt: skip
    numbers = compare_runs([*plain, *other])
    paired = numbers["sets"][0]["against"][0]["paired"]
    assert (paired["pairs"], paired["seeds"]) == (1, [0])
    assert paired["interval"] is None
    assert "gcd.objective=none lacks seed 9." in numbers["notes"]
    assert "gcd.objective=generative/ce lacks seeds 2, 3." in numbers["notes"]
    alone = compare_runs([*plain, other[1]])["sets"][0]["against"][0]
    assert alone["paired"] is None
    assert alone["probability_interval"] is None


def test_one_run_has_no_interval(tmp_path: Path) -> None:
    numbers = compare_runs(write_arm(tmp_path, [0.5]))
    (arm,) = numbers["sets"][0]["arms"]
    assert (arm["iqm"], arm["iqm_interval"], arm["profile"]["interval"]) == (0.45, None, None)
    assert arm["profile"]["interval_by_task"] is None


def test_intervals_by_task_are_those_of_the_paper(two_arms: list[Path]) -> None:
    """Where the tasks of a run share its luck, they pretend to know more; with one task both kinds
    are the same."""
    (entry,) = compare_runs(two_arms)["sets"]
    (against,) = entry["against"]
    whole, by_task = against["probability_interval"], against["probability_interval_by_task"]
    assert whole[0] < by_task[0] < against["probability"] < by_task[1] < whole[1]
    bands = entry["arms"][0]["profile"]
    widths = [
        sum(high - low for low, high in zip(*bands[key], strict=True))
        for key in ("interval", "interval_by_task")
    ]
    assert 0 < widths[1] < widths[0]


def test_intervals_of_one_task_are_the_same_by_run_and_by_task(tmp_path: Path) -> None:
    for arm, shift, recipe in (("a", 0.0, {}), ("b", 0.1, GCD)):
        for seed, value in enumerate(VALUES):
            rows = [row({"a": value + shift})]
            write_run(tmp_path / arm / f"seed-{seed}", rows, start=seed, seed=seed, **recipe)
    (entry,) = compare_runs([tmp_path])["sets"]
    (against,) = entry["against"]
    assert against["probability_interval"] == against["probability_interval_by_task"]
    for own in entry["arms"]:
        assert own["profile"]["interval"] == own["profile"]["interval_by_task"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"episodes": 16}, r"differ in episodes \(8 and 16\)"),
        ({"success": {"a": 0.5, "c": 0.5}}, "differ in the instances that were played"),
    ],
)
def test_unlike_evaluation_sets_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    success = {"a": 0.5, "b": 0.4}
    runs = [
        write_run(tmp_path / "one", [row(success)]),
        write_run(tmp_path / "two", [row(**({"success": success} | changes))], seed=1, **GCD),
    ]
    with pytest.raises(ConfigError, match="evaluation sets differ.*one and .*two " + words) as e:
        compare_runs(runs)
    assert "untwine evaluate RUN --sets L0" in str(e.value)
    assert str(e.value).count(". ") == 0  # one sentence


def test_a_set_in_common_is_found_among_several(tmp_path: Path) -> None:
    """One run was examined longer afterwards: both are compared on what both have."""
    runs = write_arm(tmp_path, [0.4, 0.6])
    record_evaluation(runs[0], row({"a": 0.9, "b": 0.9}, episodes=80))
    (entry,) = compare_runs(runs)["sets"]
    assert entry["identity"]["episodes"] == 8
    assert entry["arms"][0]["mean"] == pytest.approx(0.45)
    record_evaluation(runs[1], row({"a": 0.7, "b": 0.7}, episodes=80, seed=3))
    (entry,) = compare_runs(runs)["sets"]
    assert entry["identity"]["episodes"] == 80
    assert entry["arms"][0]["mean"] == pytest.approx(0.8)


def test_later_evaluations_count_until_the_run_goes_on(tmp_path: Path) -> None:
    (run,) = write_arm(tmp_path, [0.5])
    record_evaluation(run, row({"a": 0.9, "b": 0.9}))
    assert compare_runs([run])["sets"][0]["arms"][0]["mean"] == pytest.approx(0.9)
    with (run / "evaluations.jsonl").open("a") as stream:
        stream.write('{"set": "L0", "wei')  # killed while it was written
    assert compare_runs([run])["sets"][0]["arms"][0]["mean"] == pytest.approx(0.9)
    (run / "model" / "model.safetensors").write_bytes(b"trained further")
    assert compare_runs([run])["sets"][0]["arms"][0]["mean"] == pytest.approx(0.45)


def test_sets_and_decodings_are_kept_apart(tmp_path: Path) -> None:
    success = {"a": 0.5}
    rows = [row(success), row(success, name="L1")]
    one = write_run(tmp_path / "one", rows)
    two = write_run(tmp_path / "two", rows[:1], seed=1)
    for run in (one, two):
        record_evaluation(run, row(success, greedy=True))
    assert [e["title"] for e in compare_runs([one])["sets"]] == ["L0", "L1", "L0, greedy"]
    numbers = compare_runs([one, two])
    assert [e["title"] for e in numbers["sets"]] == ["L0", "L0, greedy"]
    assert any("L1 sampled: left out" in note and "two" in note for note in numbers["notes"])
    with pytest.raises(ConfigError, match="no evaluation set in common"):
        compare_runs([one, two], sets=["L1"])
    with pytest.raises(ConfigError, match=r"no run was evaluated on L2; they were on L0, L1"):
        compare_runs([one, two], sets=["L2"])


def test_unfit_runs_are_named_and_left_out(tmp_path: Path) -> None:
    runs = write_arm(tmp_path, [0.4, 0.6])
    success = {"a": 0.5, "b": 0.4}
    running = write_run(tmp_path / "running", [row(success)], status="running", seed=5)
    empty = write_run(tmp_path / "empty", [], seed=6)
    old = write_run(tmp_path / "old", [{k: v for k, v in row(success).items() if k != "identity"}])
    twin = write_run(tmp_path / "twin", [row(success)], start=1, seed=1)
    numbers = compare_runs([*runs, running, empty, old, twin, runs[0]])
    assert numbers["arms"][0]["seeds"] == [0, 1]
    notes = " ".join(numbers["notes"])
    assert f"untwine train --resume {running}" in notes
    assert f"(none), make one with `untwine evaluate {empty}`" in notes
    assert "(1 of an older version), make one with" in notes
    assert "twin has arm, seed and cold start of" in notes
    with pytest.raises(CheckpointError, match=r"nothing to compare\. .*not finished"):
        compare_runs([running])


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, words in (("nowhere", "does not exist"), ("file", "is a file"),
                        ("empty", "holds no run")):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            compare_runs([tmp_path / name])
    with pytest.raises(CheckpointError, match="nothing to compare"):
        compare_runs([])
    (tmp_path / "empty" / "sweep.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        compare_runs([tmp_path / "empty"])


def a_sweep(folder: Path, arm: str, runs: list[Path]) -> Path:
    entries = [
        {"folder": str(run.relative_to(folder)), "arm": arm, "seed": seed}
        for seed, run in enumerate(runs)
    ]
    (folder / "sweep.json").write_text(json.dumps({"runs": entries}))
    return folder


def test_one_name_of_two_ways_to_train_is_two_arms(tmp_path: Path) -> None:
    """From two sweeps, and within one whose file says so."""
    one = a_sweep(tmp_path / "x", "grpo", write_arm(tmp_path / "x", [0.1, 0.2]))
    other = write_arm(tmp_path / "y", [0.7, 0.8], rl={"epochs": 2, "iterations": 2})
    found = find_runs([one, a_sweep(tmp_path / "y", "grpo", other)])
    assert {arm: len(runs) for arm, runs in found.arms.items()} == {
        "grpo (rl.epochs=1)": 2, "grpo (rl.epochs=2)": 2,
    }  # fmt: skip
    assert "grpo stands for runs with different recipes" in found.notes[0]
    assert "compared apart, by rl.epochs" in found.notes[0]
    mixed = a_sweep(tmp_path, "a", [tmp_path / "x" / "seed-0", tmp_path / "y" / "seed-1"])
    assert sorted(find_runs([mixed]).arms) == ["a (rl.epochs=1)", "a (rl.epochs=2)"]


def test_arms_of_a_sweep_stay_whole_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipes name the cold starts as seen from where the sweep was begun."""
    for seed in range(2):
        kept = {"seed": seed, "name": f"cold start, seed {seed}", "start": seed}
        write_run(tmp_path / f"s/cold/base/seed-{seed}", [row({"a": 0.3})], iterations=0, **kept)
        for arm, lr in (("a", 1e-3), ("b", 1e-4)):
            write_run(
                tmp_path / f"s/arms/{arm}/seed-{seed}", [row({"a": 0.5})], seed=seed, start=seed,
                name=f"{arm}, seed {seed}", policy={"model": f"s/cold/base/seed-{seed}/model"},
                rl={"iterations": 2, "optimizer": {"lr": lr}},
            )  # fmt: skip
    for place in (tmp_path, Path("/")):
        monkeypatch.chdir(place)
        found = find_runs([tmp_path / "s" / "arms"])
        assert {arm: len(runs) for arm, runs in found.arms.items()} == {"a": 2, "b": 2}
    (tmp_path / "s" / "cold").rename(tmp_path / "gone")
    assert [len(runs) for runs in find_runs([tmp_path / "s" / "arms"]).arms.values()] == [2, 2]


def test_a_sweep_names_its_arms_and_what_is_missing(tmp_path: Path) -> None:
    write_run(tmp_path / "cold" / "seed-0", [row({"a": 0.3, "b": 0.3})], iterations=0)
    write_arm(tmp_path / "arms", [0.5])
    entries = [("cold/seed-0", "cold start", 0), ("arms/seed-0", "GRPO", 0)]
    entries.append(("arms/seed-1", "GRPO", 1))
    runs = [{"folder": folder, "arm": arm, "seed": seed} for folder, arm, seed in entries]
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    numbers = compare_runs([tmp_path])
    assert [arm["label"] for arm in numbers["arms"]] == ["GRPO", "cold start"]
    assert numbers["baseline"] == "GRPO"
    assert "GRPO, seed 1: not begun." in numbers["notes"]
    assert not [note for note in numbers["notes"] if "lacks" in note]  # planned with fewer seeds
    paired = numbers["sets"][0]["against"][0]["paired"]
    assert paired["mean"] == pytest.approx(0.3 - 0.45)
