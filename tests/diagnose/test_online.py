"""Diagnosis during training: training does not notice it, and its numbers are right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from tests.diagnose.reference import gradients, gram_of
from tests.runs import rows, steady
from tests.test_cli import TINY
from tests.training.test_resume import contents
from untwine.config import Recipe, load_recipe
from untwine.diagnose.measure_calibration import calibrate_run
from untwine.diagnose.online import Findings, OnlineDiagnosis
from untwine.diagnose.probes import load_probes, probes_path
from untwine.diagnose.run_samples import RunSample, distinct_samples, draw_samples
from untwine.errors import CheckpointError, Interrupted
from untwine.progress import Display
from untwine.report.numbers import report_numbers
from untwine.training.loop import train
from untwine.workshop import Workshop

SAMPLES = 12
CHANGES = {
    "env": {**TINY["env"], "options": {"rooms": 4, "distractors": 0}, "variations": 3},
    "cold_start": {**TINY["cold_start"], "steps": 40, "optimizer": {"lr": 6.0e-3}},
    "rl": {"iterations": 3, "groups": 3, "group_size": 16, "optimizer": {"lr": 1.0e-3}},
    "sampling": {"constrained": True},
    "prompt": {"layout": "window", "history": 0},
    "evaluate": {"episodes": 0},
    "gcd": {"labels": ["rule"]},
}
PARTS = ("probe", "calibration", "miscal", "sign", "reinforced", "push", "cosine", "diagnose")


def trained(folder: Path, **diagnose: int) -> tuple[Path, str]:
    """A run of three iterations, and what the terminal showed."""
    file = folder / "recipe.yaml"
    folder.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump({**TINY, **CHANGES, "diagnose": diagnose}))
    console = Console(width=400)
    with console.capture() as shown:
        train(load_recipe(file), folder / "run", Display(console))
    return folder / "run", shown.get()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("watched")
    run, shown = trained(folder, every=2, probes=5, samples=SAMPLES)
    solved = [row["success_rate"] for row in rows(run)]
    assert all(0 < share < 1 for share in solved), solved  # else nothing pushes and nothing is told
    return run, shown


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("plain"))[0]


def without_findings(row: dict[str, object]) -> dict[str, object]:
    return {k: v for k, v in row.items() if not k.startswith(PARTS)}


def test_training_does_not_notice(watched: tuple[Path, str], plain: Path) -> None:
    run, _ = watched
    for name in ("model/model.safetensors", "checkpoints/rl-000003/optimizer.safetensors"):
        assert (run / name).read_bytes() == (plain / name).read_bytes(), name
    assert contents(run / "episodes") == contents(plain / "episodes")
    found = [without_findings(row) for row in steady(rows(run))]
    assert found == steady(rows(plain))
    assert not (plain / "diagnose").exists()


def test_every_second_iteration_is_diagnosed(watched: tuple[Path, str]) -> None:
    run, shown = watched
    assert set(contents(run / "diagnose")) == {
        "probes-iter-000000.json",
        "online-iter-000000.json",
        "online-iter-000002.json",
    }
    first, second, third = rows(run)
    assert without_findings(second) == second
    assert "seconds_diagnose" not in second
    for row in (first, third):
        assert 0 < row["diagnose_share"] < 1
        parts = [row[f"seconds_{x}"] for x in ("probes", "calibration", "coupling")]
        assert sum(parts) <= row["seconds_diagnose"]
        spent = [row[f"seconds_{x}"] for x in ("rollout", "update", "diagnose")]
        assert row["diagnose_share"] == pytest.approx(spent[2] / sum(spent), rel=0.05)
        assert f"{row['diagnose_share']:.0%} of the iteration" in shown
    assert shown.count("diagnosis: probes good ") == 2

    totals = report_numbers([run])["runs"][0]["totals"]
    assert totals["seconds_diagnose"] == first["seconds_diagnose"] + third["seconds_diagnose"]
    everything = sum(totals[f"seconds_{x}"] for x in ("rollout", "labels", "update", "diagnose"))
    assert totals["diagnose_share"] == pytest.approx(totals["seconds_diagnose"] / everything)


def test_probes_stay_the_same_and_move(watched: tuple[Path, str]) -> None:
    run, _ = watched
    chosen = load_probes(probes_path(run, 0))
    reports = [
        json.loads((run / "diagnose" / f"online-iter-00000{k}.json").read_text()) for k in (0, 2)
    ]
    kinds = [p.kind for p in chosen.probes]
    assert set(kinds) == {"good", "flawed", "unsampled"}
    assert max(map(kinds.count, kinds)) <= 5
    for row, report in zip((rows(run)[0], rows(run)[2]), reports, strict=True):
        listed = report["probes"]["probe_list"]
        assert [p["kind"] for p in listed] == kinds
        for kind in set(kinds):
            own = [p for p in listed if p["kind"] == kind]
            assert row[f"probe_logprob_{kind}"] == pytest.approx(
                sum(p["logprob"] for p in own) / len(own)
            )
            assert 0 < row[f"probe_{kind}"] <= row[f"probe_argmax_{kind}"] <= 1
            assert row[f"probe_rank_{kind}"] >= 1
        assert row["probe_tokens"] == chosen.tokens
    assert reports[0]["probes"]["kinds"] != reports[1]["probes"]["kinds"]


def test_calibration_is_that_of_the_command(watched: tuple[Path, str]) -> None:
    run, _ = watched
    recipe = load_recipe(run / "recipe.yaml")
    measured = 0
    for iteration in (0, 2):
        offline = calibrate_run(
            run, recipe, Display(quiet=True), iteration=iteration, labels="group"
        )
        expected = json.loads(json.dumps(offline["methods"]["grpo"]["all"]))
        report = json.loads((run / "diagnose" / f"online-iter-00000{iteration}.json").read_text())
        assert report["calibration"] == {"source": "group", **expected}
        row = rows(run)[iteration]
        for name, key in (("miscalibration",) * 2, ("calibration_flawed", "flawed_mean")):
            assert row[name] == (expected[key] and expected[key]["value"])  # None: nothing flawed
            measured += row[name] is not None
    assert measured


def first_iteration(run: Path, recipe: Recipe) -> tuple[Workshop, list[Any], list[RunSample]]:
    from untwine.episodes import read_groups

    workshop = Workshop(recipe, Display(quiet=True), run / "initial")
    groups = read_groups(run / "episodes" / "iter-000000.jsonl.gz")
    chosen = draw_samples(distinct_samples(groups, recipe.loss.mean), SAMPLES, recipe.seed)
    return workshop, groups, chosen


def test_coupling_agrees_with_separate_backward_passes(watched: tuple[Path, str]) -> None:
    run, _ = watched
    recipe = load_recipe(run / "recipe.yaml")
    workshop, groups, chosen = first_iteration(run, recipe)
    model = workshop.policy.model
    names = [n for n, _ in model.named_parameters()]
    K_NN = gram_of(gradients(model, [s.sample for s in chosen], names))
    weights_N = torch.tensor([s.weight for s in chosen], dtype=torch.float64)
    own_N = weights_N * K_NN.diagonal()
    population = len(distinct_samples(groups, recipe.loss.mean))
    coupled_N = (K_NN @ weights_N - own_N) * (population - 1) / (SAMPLES - 1)
    flawed_N = torch.tensor([s.verdict == "flawed" for s in chosen])
    row = rows(run)[0]
    assert row["reinforced"] == pytest.approx(
        float(((own_N + coupled_N)[flawed_N] > 0).double().mean())
    )
    rate = 0.01 / float((own_N + coupled_N).abs().max())
    assert row["push_self_flawed"] == pytest.approx(rate * float(own_N[flawed_N].mean()), rel=1e-3)
    assert row["push_coupled_flawed"] == pytest.approx(
        rate * float(coupled_N[flawed_N].mean()), rel=1e-3
    )
    norms_N = K_NN.diagonal().sqrt()
    pairs = [
        float(K_NN[i, j] / (norms_N[i] * norms_N[j]))
        for i in range(SAMPLES)
        for j in range(i)
        if flawed_N[i] and flawed_N[j] and norms_N[i] and norms_N[j]
    ]
    assert row["cosine_flawed_flawed"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-4)


def measured(
    run: Path, folder: Path, check: Any = lambda: None, groups: Any = None, iteration: int = 0
) -> Findings:
    """One diagnosis of recorded groups, into another folder; nothing of the model may change."""
    recipe = load_recipe(run / "recipe.yaml")
    workshop, recorded, _ = first_iteration(run, recipe)
    model = workshop.policy.model
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)

    def state() -> Any:
        return (
            [(p.detach().clone(), p.grad.clone(), p.requires_grad) for p in model.parameters()],
            [module.training for module in model.modules()],
            [sorted(vars(module)) for module in model.modules()],
            torch.get_rng_state(),
            np.random.get_state()[1],
            random.getstate(),
        )

    before = state()
    try:
        return OnlineDiagnosis(recipe, folder, workshop.collector).measure(
            recorded if groups is None else groups, iteration, 4096, check
        )
    finally:
        same = zip(flat(before), flat(state()), strict=True)
        assert all(np.array_equal(a, b) for a, b in same)


def flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [x for item in value for x in flat(item)]
    return [value]


def test_nothing_is_left_behind(watched: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = watched
    found = measured(run, tmp_path)
    assert found.notes == []
    assert contents(tmp_path / "diagnose") == {
        name: text for name, text in contents(run / "diagnose").items() if "000000" in name
    }
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        measured(run, tmp_path / "stopped", stop)


def test_what_cannot_be_measured_is_left_out_with_a_note(
    watched: tuple[Path, str], tmp_path: Path
) -> None:
    run, _ = watched
    _, groups, _ = first_iteration(run, load_recipe(run / "recipe.yaml"))
    untrained = [g.with_advantages([[None] * e.length for e in g.episodes]) for g in groups]
    found = measured(run, tmp_path, groups=untrained)
    assert [note.partition(":")[0] for note in found.notes] == [
        "calibration left out",
        "coupling left out",
    ]
    assert found.lines(10.0)[1:] == found.notes
    assert "probe_flawed" in found.values
    report = json.loads((tmp_path / "diagnose" / "online-iter-000000.json").read_text())
    assert "two" in report["coupling"]["left_out"]


def test_a_damaged_probe_file_is_refused(watched: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = watched
    (tmp_path / "diagnose").mkdir()
    (tmp_path / "diagnose" / "probes-iter-000000.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is damaged .* delete it"):
        measured(run, tmp_path)


def test_parts_can_be_left_out_and_a_gpu_may_be_full(
    watched: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = watched

    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("untwine.diagnose.online.gram", full)
    (note,) = measured(run, tmp_path).notes
    assert note.endswith("lower diagnose.samples")
    recipe = load_recipe(run / "recipe.yaml", ["diagnose.probes=0", "diagnose.samples=0"])
    workshop, groups, _ = first_iteration(run, recipe)
    found = OnlineDiagnosis(recipe, tmp_path / "less", workshop.collector).measure(
        groups, 0, 4096, lambda: None
    )
    assert set(found.numbers) == {"calibration"}
