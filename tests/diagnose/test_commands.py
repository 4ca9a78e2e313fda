"""`untwine diagnose coupling` and `separation` on a small finished run."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.diagnose.reference import gradients, gram_of, relative_error
from tests.test_cli import TINY, assert_refused
from untwine.cli import main
from untwine.config import load_recipe
from untwine.diagnose.analysis import parted
from untwine.diagnose.recorded import episode_file, load_recorded_policy, read_recorded
from untwine.diagnose.run_samples import (
    RunSample,
    distinct_samples,
    draw_samples,
    labelled_samples,
)
from untwine.diagnose.separation import separations
from untwine.episodes import read_groups
from untwine.gcd.labels import agreed_verdict
from untwine.policy.loading import load_policy
from untwine.progress import Display
from untwine.report import build_report, report_numbers
from untwine.theory.regions import read_points
from untwine.training.checkpoint import load_weights
from untwine.training.loop import train
from untwine.training.run_dir import run_recipe


def trained_run(folder: Path, **changes: Any) -> Path:
    """A run of three iterations of a policy that solves some of its episodes."""
    recipe = {
        **TINY,
        "env": {**TINY["env"], "options": {"rooms": 4, "distractors": 0}, "variations": 3},
        "prompt": {"layout": "window", "history": 0},
        "cold_start": {**TINY["cold_start"], "steps": 100, "optimizer": {"lr": 6.0e-3}},
        "rl": {"iterations": 3, "groups": 3, "group_size": 8, "optimizer": {"lr": 1.0e-3}},
        "evaluate": {"episodes": 0},
        "checkpoint": {"keep": 2},
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(folder / "recipe.yaml"), folder / "run", Display(quiet=True))
    return folder / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("finished"))


def test_coupling_of_the_last_iteration(untwine, finished: Path) -> None:  # type: ignore[no-untyped-def]
    result = untwine("coupling", finished, "--samples", 12, "--json")
    assert result.code == 0, result.err
    numbers = json.loads(result.out)
    assert json.loads((finished / "diagnose" / "coupling.json").read_text()) == numbers
    assert numbers["iteration"] == 2
    assert numbers["policy"].endswith("checkpoints/rl-000002")
    assert numbers["drift"]["largest"] < 1e-4  # this is the policy that sampled them
    assert numbers["honesty"]["correlation"] > 0.99
    assert numbers["mean_push"]["batches"] == 2

    recipe = load_recipe(finished / "recipe.yaml")
    policy = load_policy(
        recipe.policy.model_copy(update={"model": str(finished / "model")}), tuple, 0
    )
    load_weights(finished / "checkpoints" / "rl-000002", policy.model)
    groups = read_groups(finished / "episodes" / "iter-000002.jsonl.gz")
    chosen = draw_samples(distinct_samples(groups, "token"), 12, 0)
    names = [n for n, _ in policy.model.named_parameters()]
    reference = gram_of(gradients(policy.model, [s.sample for s in chosen], names))
    tensors = load_file(finished / "diagnose" / "coupling.safetensors")
    assert relative_error(tensors["K_NN"], reference) < 1e-5

    rows = numbers["sample_list"]
    assert [r["weight"] for r in rows] == pytest.approx([s.weight for s in chosen])
    weights = torch.tensor([s.weight for s in chosen], dtype=torch.float64)
    scale = (numbers["distinct"] - 1) / (len(chosen) - 1)
    own = weights * reference.diagonal()
    coupled = scale * (reference @ weights - own)
    ratio = 0.01 / (own + coupled).abs().max()
    assert [r["own"] for r in rows] == pytest.approx((ratio * own).tolist(), abs=1e-6)
    assert [r["coupled"] for r in rows] == pytest.approx((ratio * coupled).tolist(), abs=1e-6)
    for offender in numbers["offenders"]:
        assert offender["delta"] > 0
        assert offender["prompt"] == policy.tokenizer.decode(
            chosen[offender["sample"]].sample.prompt_ids
        )


def test_coupling_in_float64(untwine, finished: Path) -> None:  # type: ignore[no-untyped-def]
    """Digits of separate backward passes in float64, of whatever the command measures."""
    options = ("--samples", 8, "--batches", 1, "--dtype", "float64", "--json")
    result = untwine("coupling", finished, *options, "--metric", "adam")
    assert result.code == 0, result.err
    assert json.loads(result.out)["honesty"]["correlation"] > 0.99
    result = untwine("coupling", finished, *options)
    assert result.code == 0, result.err
    numbers = json.loads(result.out)
    assert numbers["dtype"] == "float64"
    assert numbers["honesty"]["correlation"] > 0.99
    assert numbers["mean_push"]["batches"] == 1
    recipe = load_recipe(finished / "recipe.yaml")
    policy = load_policy(
        recipe.policy.model_copy(update={"model": str(finished / "model")}), tuple, 0
    )
    load_weights(finished / "checkpoints" / "rl-000002", policy.model)
    groups = read_groups(finished / "episodes" / "iter-000002.jsonl.gz")
    chosen = draw_samples(distinct_samples(groups, "token"), 8, 0)
    names = [n for n, _ in policy.model.named_parameters()]
    reference = gram_of(gradients(policy.model, [s.sample for s in chosen], names))
    tensors = load_file(finished / "diagnose" / "coupling.safetensors")
    assert relative_error(tensors["K_NN"], reference) < 1e-10


def test_points_for_the_region_plot(  # type: ignore[no-untyped-def]
    untwine, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies over the plot of the theory, from separate backward passes."""
    assert untwine("coupling", finished, "--samples", 12, "--batches", 0).code == 0
    recipe = load_recipe(finished / "recipe.yaml")
    policy = load_policy(
        recipe.policy.model_copy(update={"model": str(finished / "model")}), tuple, 0
    )
    load_weights(finished / "checkpoints" / "rl-000002", policy.model)
    groups = read_groups(finished / "episodes/iter-000002.jsonl.gz")
    trained = [s for g in groups for e in g.episodes for s in e.steps if s.advantage is not None]
    tokens = sum(len(step.action_ids) for step in trained)
    everyone = distinct_samples(groups, "token")
    chosen = draw_samples(everyone, 12, 0)
    scale = (len(everyone) - 1) / (len(chosen) - 1)
    names = [n for n, _ in policy.model.named_parameters()]
    reference = gram_of(gradients(policy.model, [s.sample for s in chosen], names))
    points = read_points(finished)
    rows = json.loads((finished / "diagnose/coupling.json").read_text())["sample_list"]
    flawed = [i for i, row in enumerate(rows) if row["verdict"] == "flawed"]
    assert len(points) == len(flawed) > 0
    for point, i in zip(points, flawed, strict=True):
        pushed = visits = 0.0
        for j, other in enumerate(chosen):
            if (other.task, other.step.state_key) != (chosen[i].task, chosen[i].step.state_key):
                pushed += float(reference[i, j]) * other.weight * scale
        for other in everyone:
            if (other.task, other.step.state_key) == (chosen[i].task, chosen[i].step.state_key):
                visits += other.count / tokens
        q = math.exp(rows[i]["logprob"])
        assert point.q == pytest.approx(q)
        assert point.label == rows[i]["kind"]
        assert point.push == pytest.approx(
            pushed * (1 - q) / (float(reference[i, i]) * visits), rel=1e-3, abs=1e-6
        )
    arguments = ["--points", finished, "--out", tmp_path, "--starts", 4, "--horizon", 50]
    monkeypatch.setattr(sys, "argv", ["untwine", "theory", "regions", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert not exit_info.value.code
    assert (tmp_path / "regions.svg").is_file()


def test_other_credit_changes_the_same_samples(untwine, finished: Path) -> None:  # type: ignore[no-untyped-def]
    """Of the Gram that was kept, with the weights of the samples by hand."""
    assert untwine("coupling", finished, "--iteration", 1, "--batches", 0).code == 0
    numbers = json.loads((finished / "diagnose" / "coupling.json").read_text())
    samples = read_samples(finished, 1)
    assert [s.weight for s in samples] == [row["weight"] for row in numbers["sample_list"]]
    K_NN = load_file(finished / "diagnose" / "coupling.safetensors")["K_NN"]
    good, flawed = (
        torch.tensor([s.verdict == verdict for s in samples]) for verdict in ("good", "flawed")
    )
    prompts = [s.sample.prompt_ids for s in samples]
    steps = [
        step
        for group in read_groups(finished / "episodes" / "iter-000001.jsonl.gz")
        for episode in group.episodes
        for step in episode.steps
        if step.advantage is not None
    ]
    tokens = sum(len(step.action_ids) for step in steps)
    said: dict[tuple[Any, ...], float] = defaultdict(float)
    for step in steps:
        sign = {"good": 1, "flawed": -1}.get(str(agreed_verdict(step)), 0)
        said[step.prompt_ids, step.action_ids] += sign / tokens
    alone = torch.tensor(
        [said[s.step.prompt_ids, s.step.action_ids] for s in samples], dtype=torch.float64
    )
    trained = torch.tensor([s.weight for s in samples], dtype=torch.float64)
    for name, weights in (("as trained", trained), ("labels alone", alone)):
        expected = parted(K_NN, weights, good, flawed, prompts)
        assert numbers["credits"][name]["good"] == pytest.approx(expected.good)
        assert numbers["credits"][name]["flawed"] == pytest.approx(expected.flawed)
    assert set(numbers["credits"]) == {"as trained", "penalty of 0.3", "veto", "labels alone"}


def read_samples(run: Path, iteration: int) -> list[RunSample]:
    groups = read_groups(run / "episodes" / f"iter-{iteration:06d}.jsonl.gz")
    return draw_samples(distinct_samples(groups, "token"), 128, 0)


def test_coupling_with_the_metric_of_adam_and_a_subset(untwine, finished: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = ["--metric", "adam", "--parameters", "*mlp*", "--samples", "10", "--batches", "0"]
    result = untwine("coupling", finished, *arguments, "--no-recompute")
    assert result.code == 0, result.err
    shown = " ".join(result.out.split())
    assert "adam metric" in shown
    assert "honesty check, predicted against measured change: correlation" in shown
    assert "mean cosine coupling" in shown
    numbers = json.loads((finished / "diagnose" / "coupling.json").read_text())
    assert numbers["parameters"] == 3
    assert numbers["mean_push"] is None
    assert numbers["honesty"]["correlation"] > 0.99


def test_an_iteration_whose_policy_is_gone(untwine, finished: Path) -> None:  # type: ignore[no-untyped-def]
    numbers = json.loads(
        untwine("coupling", finished, "--iteration", 1, "--samples", 8, "--json").out
    )
    assert numbers["policy"].endswith("/model")
    assert numbers["drift"]["largest"] > 1e-4
    muon = untwine("coupling", finished, "rl.optimizer.name=muon", "--metric", "adam")
    assert_refused(muon, 2, "needs a run trained with AdamW")
    result = untwine("coupling", finished, "--iteration", 1, "--metric", "adam")
    assert_refused(result, 5, "needs the checkpoint", "checkpoint.keep")
    first = json.loads(untwine("coupling", finished, "--iteration", 0, "--json").out)
    assert first["policy"].endswith("/initial")
    assert first["drift"]["largest"] < 1e-4


def test_choices_among_admissible_commands(untwine, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Recorded log-probabilities are over the allowed ids, and so are those of the Gram."""
    run = trained_run(
        tmp_path,
        cold_start={**TINY["cold_start"], "steps": 5},
        sampling={"max_new_tokens": 6, "constrained": True},
    )
    result = untwine("coupling", run, "--samples", 16, "--batches", 1, "--json")
    assert result.code == 0, result.err
    numbers = json.loads(result.out)
    assert numbers["drift"]["largest"] < 1e-4
    assert numbers["honesty"]["correlation"] > 0.99
    groups = read_groups(run / "episodes" / "iter-000002.jsonl.gz")
    sets = [s.sample.allowed for s in distinct_samples(groups, "token")]
    assert all(sets)
    assert any(len(ids) == 1 for allowed in sets for ids in allowed or ())


def test_adapters_of_a_run_are_what_the_gram_is_over(  # type: ignore[no-untyped-def]
    untwine, finished: Path, tmp_path: Path
) -> None:
    policy = {"model": str(finished / "model"), "threads": 1, "lora": {"rank": 4}}
    run = trained_run(tmp_path, policy=policy, cold_start={"episodes": 0})
    arguments = ["--samples", 8, "--batches", 0, "--json"]
    result = untwine("coupling", run, *arguments)
    assert result.code == 0, result.err
    numbers = json.loads(result.out)
    assert numbers["parameters"] == 2 * 7  # A and B of seven linear layers
    assert numbers["drift"]["largest"] < 1e-4
    assert numbers["honesty"]["correlation"] > 0.99
    merged = json.loads(untwine("coupling", run, "--checkpoint", run / "model", *arguments).out)
    assert merged["parameters"] == 11  # all of them: a saved model has its adapters merged


def test_a_named_checkpoint(untwine, finished: Path) -> None:  # type: ignore[no-untyped-def]
    arguments = ["--iteration", 1, "--samples", 6, "--batches", 0, "--json"]
    named = json.loads(untwine("coupling", finished, *arguments, "--checkpoint", "rl-000002").out)
    assert named["policy"].endswith("checkpoints/rl-000002")
    folder = finished / "model"
    other = json.loads(untwine("coupling", finished, *arguments, "--checkpoint", folder).out)
    assert other["policy"] == str(folder)
    assert other["drift"] != named["drift"]


def test_separation(untwine, finished: Path) -> None:  # type: ignore[no-untyped-def]
    result = untwine("separation", finished, "--json")
    assert result.code == 0, result.err
    numbers = json.loads(result.out)
    assert [row["layer"] for row in numbers["layers"]] == [0, 1]
    assert numbers["samples"] == len(numbers["sample_list"])
    assert 0 < numbers["flawed"] < numbers["samples"]
    recipe = run_recipe(finished)
    iteration, file = episode_file(finished, None)
    policy = load_recorded_policy(finished, recipe, iteration, "", or_last=True).policy
    groups = read_recorded(file, recipe)
    chosen = draw_samples(labelled_samples(groups), numbers["samples"], numbers["seed"])
    assert numbers["flawed"] == sum(s.verdict == "flawed" for s in chosen)
    states = []
    with torch.no_grad():
        for s in chosen:  # each alone, with transformers' own way through the model
            ids = torch.tensor([[*s.sample.prompt_ids, *s.sample.action_ids]])
            every = policy.model(input_ids=ids, output_hidden_states=True).hidden_states
            states.append(torch.stack([x[0, -len(s.sample.action_ids) :].mean(0) for x in every]))
    flawed = torch.tensor([s.verdict == "flawed" for s in chosen])
    tasks = [s.task for s in chosen]
    wanted = separations(torch.stack(states, 1), flawed, tasks, metric="cosine", seed=0)
    for row, own in zip(numbers["layers"], wanted, strict=True):
        assert row["margin"] == pytest.approx(own.margin, rel=1e-3)
        assert row["balanced"] == pytest.approx(own.balanced, abs=0.02)
        assert row["silhouette"] == pytest.approx(own.silhouette, abs=1e-4)
    maps = load_file(finished / "diagnose" / "separation.safetensors")["maps_SN2"]
    assert maps.shape == (2, numbers["samples"], 2)
    result = untwine("separation", finished, "--pool", "last", "--distance", "euclidean")
    assert "separation of good and flawed actions" in result.out


def test_bad_input_is_refused_and_nothing_is_overwritten(  # type: ignore[no-untyped-def]
    untwine, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("diagnose"))
    assert_refused(untwine("coupling", tmp_path), 5, "no run directory")
    assert_refused(untwine("coupling", run, "--iteration", 7), 5, "iteration 7", "0, 1, 2")
    kept = ("keeps no checkpoint rl-000099", "rl-000002, rl-000003")
    assert_refused(untwine("coupling", run, "--checkpoint", "rl-000099"), 5, *kept)
    assert_refused(untwine("coupling", run, "--metric", "adamw"), 2, "--metric", "adam")
    assert_refused(untwine("coupling", run, "--parameters", "*lora*"), 2, "'*lora*'")
    assert_refused(untwine("separation", run, "--pool", "first"), 2, "--pool", "mean")
    assert_refused(untwine("separation", run, "--distance", "l1"), 2, "--distance", "cosine")
    other = tmp_path / "other"
    recipe = {**TINY["policy"]["tiny"], "vocab_size": 300}  # type: ignore[index, dict-item]
    tiny = load_recipe(run / "recipe.yaml").policy.model_copy()
    from untwine.config import TinyConfig

    small = load_policy(
        tiny.model_copy(update={"model": "tiny", "tiny": TinyConfig(**recipe)}),
        lambda: ["go to kitchen"] * 4,
    )
    small.save(other)
    assert_refused(
        untwine("coupling", run, "--checkpoint", other), 1, "recorded with another model"
    )
    (run / "checkpoints" / "rl-000002" / "model.safetensors").write_bytes(b"torn")
    assert_refused(untwine("coupling", run), 5, "damaged")
    shutil.rmtree(run / "episodes")
    assert_refused(untwine("coupling", run), 5, "no episodes yet")
    assert not (run / "diagnose").exists()


def test_the_report_shows_what_was_measured(  # type: ignore[no-untyped-def]
    untwine, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for command in (
        ("coupling", run, "--samples", 12, "--batches", 0),
        ("separation", run, "--samples", 40),
        ("calibration", run, "--labels", "rule"),
    ):
        result = untwine(*command)
        assert result.code == 0, result.err
    found = report_numbers([run])["runs"][0]["microscope"]
    assert found["problems"] == []
    assert [gap["topic"] for gap in found["missing"]] == ["truth", "labels", "judging"]
    gram_NN = load_file(run / "diagnose" / "coupling.safetensors")["K_NN"]
    right = gram_NN[3, 1] / (gram_NN[3, 3] * gram_NN[1, 1]).sqrt()
    assert found["coupling"]["cosine_rows"][3][1] == pytest.approx(float(right), abs=1e-4)
    html = build_report([run], tmp_path / "r.html").read_text("utf-8")
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', html)
    assert embedded
    pushed = [
        step
        for episode in json.loads(embedded.group(1))["episodes"]
        for step in episode["steps"]
        if "push" in step
    ]
    assert len(pushed) == sum(sample["count"] for sample in found["coupling"]["sample_list"])
