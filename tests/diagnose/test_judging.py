"""What judging does to acting: against real steps on the weights, and by the command."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gcd.test_training import recipe
from tests.training.test_resume import RECIPE
from untwine.config import Recipe
from untwine.diagnose.judging import JudgingOptions, measure_judging, verdict_lesson
from untwine.diagnose.recorded import load_recorded_policy, read_recorded
from untwine.diagnose.run_samples import distinct_samples
from untwine.diagnose.scoring import log_probabilities, weighted_gradient
from untwine.errors import UntwineError
from untwine.gcd.objectives import Means, make_objective
from untwine.policy.loading import Policy
from untwine.progress import Display
from untwine.prompting.prompter import Prompter
from untwine.records import Group
from untwine.training.loop import train
from untwine.training.run_dir import episode_files, run_recipe

GCD = {"objective": "generative/ce", "labels": ["rule"], "token_budget": 512}
QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("judging") / "run"
    train(recipe(2, gcd=GCD, rl={"groups": 8}), run, QUIET)
    return run


def opened(run: Path, **gcd: Any) -> tuple[Policy, Recipe, list[Group]]:
    found = run_recipe(run, [f"gcd.{key}={json.dumps(value)}" for key, value in gcd.items()])
    policy = load_recorded_policy(run, found, 0).policy
    return policy, found, read_recorded(episode_files(run)[0], found)


def verdict_loss(policy: Policy, config: Recipe, groups: list[Group]) -> float:
    prompter = Prompter(policy.chat, config.prompt)
    objective = make_objective(config.gcd.objective, Means(policy, prompter, config.gcd))
    assert objective is not None
    episodes = [episode for group in groups for episode in group.episodes]
    exercise = objective.exercise(episodes, random.Random(config.seed), torch.Generator())
    assert exercise is not None
    return float(exercise.loss(exercise.rows)[0].detach())


@pytest.mark.parametrize("microbatch", [64, 100_000])
def test_changes_are_those_of_small_real_steps(trained: Path, microbatch: int) -> None:
    """A step along each gradient, both of the policy gradient's length, and log pi before and after
    it; in units of the root mean square of what the policy's does."""
    policy, config, groups = opened(trained)
    rl = config.rl.model_copy(update={"microbatch_tokens": microbatch})
    config = config.model_copy(update={"rl": rl})
    chosen = distinct_samples(groups, config.loss.mean)
    samples = [s.sample for s in chosen]
    acting = weighted_gradient(policy.model, samples, [s.weight for s in chosen])
    acting = {name: value.clone() for name, value in acting.items()}
    verdict = verdict_lesson(policy, config, groups).direction
    length = torch.cat([g.flatten() for g in acting.values()]).norm()
    moved = []
    for direction in (acting, verdict):
        size = torch.cat([g.flatten() for g in direction.values()]).norm()
        stepped, _, _ = opened(trained)
        before = log_probabilities(stepped.model, samples)
        with torch.no_grad():
            for name, p in stepped.model.named_parameters():
                if name in direction:
                    p += 1e-3 * length / size * direction[name]
        moved.append(log_probabilities(stepped.model, samples) - before)
    unit = moved[0].square().mean().sqrt()
    found = measure_judging(policy, config, groups, JudgingOptions(draws=2), QUIET)
    for name, change in zip(("policy", "verdict"), moved, strict=True):
        means = {}
        for kind in ("good", "flawed"):
            own = torch.tensor([s.verdict == kind for s in chosen])
            means[kind] = float(change[own].mean() / unit)
            assert found[name][kind] == pytest.approx(means[kind], abs=0.02)
        assert found[name]["difference"] == pytest.approx(means["good"] - means["flawed"], abs=0.03)
    assert len(found["permuted"]) == 2
    assert found["permuted"][0] != found["verdict"]
    assert found["permuted"][0] != found["permuted"][1]
    inner = sum(float((acting[n] * verdict[n]).sum()) for n in verdict)
    sizes = torch.cat([g.flatten() for g in verdict.values()]).norm() * length
    assert found["cosine"] == pytest.approx(inner / float(sizes), abs=1e-4)
    assert found["norm_ratio"] == pytest.approx(float(sizes / length**2), rel=1e-4)


def test_the_direction_is_downhill(trained: Path) -> None:
    policy, config, groups = opened(trained)
    direction = verdict_lesson(policy, config, groups).direction
    before = verdict_loss(policy, config, groups)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if name in direction:
                p += 0.01 * direction[name]
    assert verdict_loss(policy, config, groups) < before


def test_weights_that_stay_closed_do_not_move(tmp_path: Path) -> None:
    tiny = {**RECIPE["policy"]["tiny"], "layers": 2}
    train(recipe(1, gcd=GCD, policy={"tiny": tiny}), tmp_path / "run", QUIET)
    policy, config, groups = opened(tmp_path / "run", gradient="layers", from_layer=1)
    everything = verdict_lesson(*opened(tmp_path / "run")).direction
    some = verdict_lesson(policy, config, groups).direction
    assert some.keys() < everything.keys()
    assert not any("layers.0." in name for name in some)


def test_a_head_that_begins_at_nothing_moves_nothing(trained: Path) -> None:
    policy, config, groups = opened(trained, objective="head", token_budget=20000)
    found = measure_judging(policy, config, groups, JudgingOptions(draws=0), QUIET)
    assert found["verdict"] == {"good": 0.0, "flawed": 0.0, "difference": 0.0}
    assert found["cosine"] is None
    assert found["permuted"] == []


def test_a_run_without_gcd_is_asked_about_verdicts(tmp_path: Path) -> None:
    train(recipe(1, gcd={"objective": "none", "labels": ["rule"]}), tmp_path / "run", QUIET)
    policy, config, groups = opened(tmp_path / "run")
    found = measure_judging(policy, config, groups, JudgingOptions(draws=0), QUIET)
    assert found["objective"] == "generative/ce"
    assert found["questions"] > 0
    bare = [g.with_labels([[()] * e.length for e in g.episodes]) for g in groups]
    with pytest.raises(UntwineError, match="no trained step of this iteration is labelled good"):
        measure_judging(policy, config, bare, JudgingOptions(draws=0), QUIET)
    flat = [g.with_advantages([[0.0] * e.length for e in g.episodes]) for g in groups]
    with pytest.raises(UntwineError, match="the policy has no gradient here"):
        measure_judging(policy, config, flat, JudgingOptions(draws=0), QUIET)


def test_the_command(untwine, trained: Path) -> None:  # type: ignore[no-untyped-def]
    result = untwine("judging", trained, "--iteration", "0", "--draws", "3", "--json")
    assert result.code == 0, result.err
    numbers = json.loads(result.out)
    assert json.loads((trained / "diagnose" / "judging.json").read_text()) == numbers
    policy, config, groups = opened(trained)
    again = measure_judging(policy, config, groups, JudgingOptions(draws=3), QUIET)
    assert numbers["verdict"] == pytest.approx(again["verdict"])
    result = untwine("judging", trained, "gcd.objective=generative/rl")
    assert result.code == 0, result.err
    assert "what one step changes in log pi of commands" in result.out
    assert "(generative/rl)" in result.out
    assert "labels permuted" in result.out
    result = untwine("judging", trained, "gcd.objective=pairs")
    assert result.code == 2
    assert "unknown gcd.objective 'pairs'" in result.err


def test_a_run_of_another_program_is_refused(untwine, trained: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(trained / "episodes", tmp_path / "episodes")
    result = untwine("judging", tmp_path)
    assert result.code == 5
    assert "was recorded by another program" in result.err
    assert "Traceback" not in result.err
