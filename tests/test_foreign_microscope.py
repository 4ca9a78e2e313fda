"""The microscope on a model and a world from elsewhere: example, commands, the page about it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.diagnose.reference import gradients, gram_of
from tests.test_cli import Result, assert_refused
from untwine.cli import main
from untwine.diagnose.run_samples import distinct_samples
from untwine.episodes import read_groups

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "diagnose" / "your-own-runs.md"
Call = Callable[..., Result]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = ROOT / "examples" / "foreign_microscope.py"
    spec = importlib.util.spec_from_file_location("foreign_microscope", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["foreign_microscope"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the example writes, and what it says."""
    folder = tmp_path_factory.mktemp("foreign")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        example.main(["--out", str(folder)])
    return folder, said.getvalue()


def test_too_few_branches_are_said(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(["--out", str(tmp_path), "--branches", "2", "--iterations", "1"])
    shown = capsys.readouterr().out
    assert "separation needs" in shown
    assert "raise --branches" in shown


@pytest.fixture
def untwine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["untwine", "diagnose", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return Result(int(exit_info.value.code or 0), captured.out, captured.err)

    return call


def test_the_example_finds_what_is_known_of_its_world(
    example: ModuleType, recorded: tuple[Path, str]
) -> None:
    folder, said = recorded
    found = re.search(r"predicted against measured change: correlation ([\d.]+)", said)
    assert found
    assert float(found[1]) > 0.95
    assert "separation:" in said
    verdicts = {
        (step.observation.endswith("a pit ahead"), step.text): step.labels[0].verdict
        for group in read_groups(folder / "episodes/iter-000003.jsonl.gz")
        for episode in group.episodes
        for step in episode.steps
        if step.labels
    }
    assert verdicts[True, "jump"] == "good"  # the only way over a pit
    assert verdicts[True, "walk"] == "flawed"  # walks into it


def test_truth_of_the_example_against_its_rules(example: ModuleType) -> None:
    """At the last doorway, with one action left, Q and V can be written down."""
    agent, luck = example.Agent(0), random.Random(0)
    hall = example.HALLS.index((False, False, False, False))
    place = example.Place(hall, doorway=3, left=1)
    moves = [[[example.Move(place, c, place)] for c in ("walk", "jump")]]
    found = example.true_advantages(agent, moves, 512, luck)
    walk, jump = (agent.probability(place.text, c) for c in ("walk", "jump"))
    value = walk * 1.0 + jump * (0.5 * 1.0 + 0.5 * 0.75) + (1 - walk - jump) * 0.75
    for command, action_value in (("walk", 1.0), ("jump", 0.875)):
        one = found[place.key, command]
        assert one.low <= action_value - value <= one.high
        assert one.action_value == pytest.approx(action_value, abs=0.05)


def test_calibration_of_a_foreign_folder(untwine: Call, recorded: tuple[Path, str]) -> None:
    folder, said = recorded
    result = untwine("calibration", folder, "--labels", "branch", "--iteration", 3, "--json")
    assert result.code == 0, result.err
    numbers = json.loads(result.out)
    assert set(numbers["methods"]) >= {"recorded", "grpo"}
    ours, theirs = (numbers["methods"][n]["all"] for n in ("grpo", "recorded"))
    assert theirs["flawed"] == numbers["flawed"] > 0
    # the example's advantages are those of GRPO, written by other hands
    assert theirs["flawed_mean"]["value"] == pytest.approx(ours["flawed_mean"]["value"], abs=1e-4)
    assert f"calibration: {numbers['flawed']} of" in said
    rules = json.loads(untwine("calibration", folder, "--labels", "rule", "--json").out)
    assert rules["flawed"] > 0


def test_coupling_of_a_foreign_folder(untwine: Call, recorded: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = recorded
    result = untwine("coupling", folder, "--samples", 500, "loss.mean=step", "--json")
    assert result.code == 0, result.err
    numbers = json.loads(result.out)
    assert numbers["drift"]["largest"] < 1e-4
    assert numbers["honesty"]["correlation"] > 0.95
    assert numbers["mean_push"]["batches"] == 3
    assert numbers["policy"] == str(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    groups = read_groups(folder / "episodes/iter-000003.jsonl.gz")
    samples = [s.sample for s in distinct_samples(groups, "step")]
    reference = gram_of(gradients(model, samples, [n for n, _ in model.named_parameters()]))
    found = torch.tensor([row["own"] / row["weight"] for row in numbers["sample_list"]])
    ratio = found / reference.diagonal()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)


def test_separation_of_a_foreign_folder(untwine: Call, recorded: tuple[Path, str]) -> None:
    folder, _ = recorded
    result = untwine("separation", folder, "--json")
    assert result.code == 0, result.err
    assert [row["layer"] for row in json.loads(result.out)["layers"]] == [0, 1, 2]


def test_blocks_of_the_page_run(
    recorded: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(recorded[0], tmp_path / "my-run")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(code) == 6
    exec("\n".join(code), {})
    printed = capsys.readouterr().out
    assert "flawed steps: {'value':" in printed
    assert re.search(r"predicted against measured: (1\.000|0\.99\d)", printed)
    assert re.search(r"A\* \+0\.\d+ in .*: good", printed)
    assert re.search(r"A\* -0\.\d+ in .*: flawed", printed)
    (group,) = read_groups(tmp_path / "written/episodes/iter-000000.jsonl.gz")
    assert group.episodes[0].steps[0].action_ids == (8, 9)


def test_what_a_foreign_folder_cannot_give(
    untwine: Call, recorded: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded[0], run, ignore=shutil.ignore_patterns("diagnose"))
    assert_refused(untwine("truth", run), 5, "another program", "true_advantages")
    assert_refused(untwine("coupling", run, "--metric", "adam"), 5, "needs the checkpoint")
    assert_refused(untwine("coupling", run, "loss.maen=step"), 2, "loss.mean")
    assert_refused(untwine("calibration", run), 2, "no truth", "--labels")
    shutil.rmtree(run / "model")
    assert_refused(untwine("coupling", run), 5, "model")
    (run / "episodes/iter-000000.jsonl.gz").rename(run / "episodes/iter-last.jsonl.gz")
    assert_refused(untwine("coupling", run), 5, "no iteration number")
    shutil.rmtree(run / "episodes")
    assert_refused(untwine("coupling", run), 5, "no run directory")
    assert not (run / "diagnose").exists()


def test_episodes_without_logprobs_are_refused(
    untwine: Call, recorded: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(recorded[0], run, ignore=shutil.ignore_patterns("diagnose"))
    file = run / "episodes/iter-000003.safetensors"
    arrays = load_file(file)
    save_file({n: a for n, a in arrays.items() if n != "logprobs"}, file)
    for command in ("coupling", "separation"):
        assert_refused(untwine(command, run), 5, "no log-probabilities")
    save_file({**arrays, "logprobs": arrays["logprobs"][1:]}, file)
    assert_refused(untwine("coupling", run), 5, "logprobs")
    assert not (run / "diagnose").exists()
