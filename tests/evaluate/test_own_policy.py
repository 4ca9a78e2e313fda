"""`untwine evaluate` with the policy of a run: which one is played, and what is kept of it."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from untwine.cli import main
from untwine.compare.numbers import compare_runs
from untwine.config import Recipe, make_recipe
from untwine.errors import CheckpointError, ConfigError, EnvError
from untwine.evaluate.command import evaluate_run
from untwine.evaluate.protocol import evaluation_refs, examine_set
from untwine.progress import Display
from untwine.training.checkpoint import Position, choices_state, save_checkpoint
from untwine.training.run_dir import RunDir, metric_rows, run_cost, run_info, run_recipe
from untwine.workshop import Workshop

TREE: dict[str, Any] = {
    "env": {"name": "rooms", "tasks": ["fetch"], "max_steps": 5, "sessions": 4},
    "policy": {"threads": 1, "tiny": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2}},
    "evaluate": {"sets": ["L0"], "episodes": 3},
    "rl": {"iterations": 1},
}
QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with a checkpoint; no training was needed for it."""
    run = tmp_path_factory.mktemp("made") / "run"
    recipe = make_recipe(TREE)
    generator = torch.Generator().manual_seed(0)
    with Workshop(recipe, QUIET) as workshop:
        for name in ("initial", "model"):
            workshop.policy.save(run / name)
        model = workshop.policy.model
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        choices = choices_state(random.Random(0))
        position = Position("rl", 1, 1, 1, generator.get_state(), choices, 1)
        save_checkpoint(run / "checkpoints", model, optimizer, position, keep=2)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    (run / "run.json").write_text('{"status": "finished", "iterations": 1}')
    (run / "metrics.jsonl").write_text('{"stage": "rl", "step": 0, "policy_tokens": 10}\n')
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def play(run: Path, *overrides: str, model: str = "", **changes: Any) -> list[dict[str, Any]]:
    recipe: Recipe = run_recipe(run, overrides)
    options = {"sets": recipe.evaluate.sets, "episodes": recipe.evaluate.episodes} | changes
    return evaluate_run(run, recipe, display=QUIET, model=model, **options)


def recorded(run: Path) -> list[dict[str, Any]]:
    file = run / "evaluations.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_set_is_played_as_it_is_to_be(run: Path) -> None:
    """Greedily, or at the temperature of evaluations: what is recorded is what is done."""
    recipe = run_recipe(run)
    cold = {**recipe.evaluate.model_dump(), "temperature": 1e-7}
    frozen = make_recipe({**recipe.model_dump(), "evaluate": cold})
    with Workshop(recipe, Display(quiet=True), run / "model") as workshop:
        refs = evaluation_refs(recipe.env, "L0", 6)

        def texts(own: Recipe, greedy: bool, seed: int = 0) -> list[list[str]]:
            groups, _ = examine_set(workshop.collector, own, "L0", refs, seed, greedy=greedy)
            return [[s.text for s in e.steps] for g in groups for e in g.episodes]

        greedy = texts(recipe, True)
        assert texts(frozen, False) == greedy == texts(recipe, True, 1)
        assert texts(recipe, False) != greedy
        assert texts(recipe, False) != texts(recipe, False, 1)


def test_overrides_of_the_agent_are_recorded_and_not_compared(run: Path) -> None:
    (row,) = play(run, "sampling.constrained=true", "sampling.waves=1")
    (kept,) = recorded(run)
    assert row["overrides"] == kept["overrides"] == {"sampling.constrained": True}
    with pytest.raises(
        CheckpointError, match=r"1 of another agent \(overrides of sampling\.constrained"
    ):
        compare_runs([run])
    (plain,) = play(run, "policy.threads=1", "evaluate.episodes=3")
    assert "overrides" not in plain
    assert plain["identity"]["digest"] == row["identity"]["digest"]
    mean = compare_runs([run])["sets"][0]["arms"][0]["mean"]
    assert mean == pytest.approx(plain["success_rate"])
    play(run, "sampling.constrained=true")
    assert compare_runs([run])["sets"][0]["arms"][0]["mean"] == mean


@pytest.mark.parametrize("text", ['{"status": "running"}', '{"status": "interrupted"}', '{"sta'])
def test_an_unfinished_run_has_no_policy_of_its_own(run: Path, text: str) -> None:
    (run / "run.json").write_text(text)
    newest = run / "checkpoints" / "rl-000001"
    with pytest.raises(CheckpointError, match=r"is not finished \(its status is") as error:
        play(run)
    assert f"`untwine train --resume {run}`" in str(error.value)
    assert f"`--model {newest}`" in str(error.value)
    assert str(error.value).count(". ") == 0  # one sentence
    shutil.rmtree(newest)
    with pytest.raises(CheckpointError, match=r"--resume .*`$"):
        play(run)
    assert not recorded(run)


def test_a_checkpoint_is_played_as_it_says(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those of the checkpoint; shape and tokenizer those of the run."""
    (run / "run.json").write_text('{"status": "interrupted"}')
    from untwine.evaluate import command

    seen: list[Any] = []

    def watched(policy: Any, *rest: Any) -> Any:
        seen.append(policy.model)
        return make(policy, *rest)

    make: Callable[..., Any] = command.make_collector
    monkeypatch.setattr(command, "make_collector", watched)
    checkpoint = str(run / "checkpoints" / "rl-000001")
    (row,) = play(run, model=checkpoint)
    play(run, model=str(run / "model"))
    assert row["policy"] == checkpoint
    newer, older = (model.get_input_embeddings().weight for model in seen)
    assert torch.equal(newer, 1.5 * older)
    assert not recorded(run)


def test_nothing_to_play_is_refused(run: Path) -> None:
    for model in ("", "random"):
        with pytest.raises(ConfigError, match=r"evaluate\.sets is empty.*--sets L0,L1"):
            play(run, "evaluate.sets=[]", model=model)
        with pytest.raises(ConfigError, match=r"evaluate\.episodes is 0.*--episodes N"):
            play(run, "evaluate.episodes=0", model=model)
        with pytest.raises(EnvError, match=r"unknown task 'fecth'.*Did you mean 'fetch'\?"):
            play(run, "env.tasks=[fecth]", model=model)


DAMAGED = [
    b"[1]",
    b"\xff\xfejunk",
    b"[" * 100_000,
    b"{}",
    b'{"stage": "rl"}',
    b'{"stage": "rl", "step": 1, "policy_tokens": "many", "gcd_tokens": NaN}',
    b'{"stage": "rl", "st',
]


def test_damaged_metrics_cost_no_evaluation(run: Path) -> None:
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write(b"\n".join(DAMAGED))
    (row,) = play(run)
    assert row["cost_tokens"] == {"policy": 10}
    assert [one["cost_tokens"] for one in recorded(run)] == [{"policy": 10}]
    (run / "metrics.jsonl").unlink()
    play(run)
    assert [one["cost_tokens"] for one in recorded(run)] == [{"policy": 10}, {}]


def test_what_cannot_be_read_of_a_run_is_left_out(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(b"\n".join([*DAMAGED, b'{"stage": "rl", "step": 7}']))
    assert [row["step"] for row in metric_rows(run, "rl")] == [1, 7]
    assert run_cost(run) == {"cost_tokens": {}, "cost_seconds": {}}
    for text in (b"[]", b'{"status"', b"\xff", b"[" * 100_000):
        (run / "run.json").write_bytes(text)
        assert run_info(run) == {}


def test_a_run_goes_on_after_damaged_lines_and_keeps_them(run: Path) -> None:
    lines = [*DAMAGED, b'{"stage": "rl", "step": 7, "policy_tokens": 5}']
    (run / "metrics.jsonl").write_bytes(b"\n".join([*lines, b'{"stage": "rl", "step": 8}']))
    found = RunDir.resume(run, run_recipe(run), len(lines), 1)
    assert found.metric_lines == len(lines)
    assert found.cost()["cost_tokens"] == {"policy": 5}
    found.close("finished")
    assert (run / "metrics.jsonl").read_bytes().splitlines() == lines
    (run / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"has lost its metrics\.jsonl; put it back"):
        RunDir.resume(run, run_recipe(run), 0, 1)


def test_as_many_episodes_as_the_recipe_says(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that `untwine compare` takes it beside the evaluations of other runs."""

    def untwine(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["untwine", *arguments])
        with pytest.raises(SystemExit):
            main()
        return " ".join(capsys.readouterr().out.split())

    assert json.loads(untwine("evaluate", str(run), "--json"))[0]["episodes"] == 3
    assert (
        json.loads(untwine("evaluate", str(run), "--json", "--episodes", "2"))[0]["episodes"] == 2
    )
    assert [row["episodes"] for row in recorded(run)] == [3, 2]
    untwine("evaluate", str(run), "--seed", "5")
    own = run_recipe(run).seed
    assert [row["identity"]["seed"] for row in recorded(run)] == [own, own, 5]
    assert "evaluate.episodes" in untwine("evaluate", "--help")
