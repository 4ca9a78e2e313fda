"""Scripts that ask what judging and credit do to acting: against real steps, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.builders import REF, make_episode, make_step
from tests.gcd.test_training import recipe
from tests.studies.test_gcd_analysis import script
from untwine.config import CreditConfig
from untwine.diagnose.run_samples import distinct_samples
from untwine.diagnose.scoring import log_probabilities
from untwine.errors import CheckpointError
from untwine.progress import Display
from untwine.records import Group, Label
from untwine.training.loop import train

GCD = {"objective": "generative/ce", "labels": ["rule"], "taught": ["rule"], "token_budget": 512}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("mechanism") / "run"
    train(recipe(4, gcd=GCD), run, Display(quiet=True))
    return run


def test_a_policy_that_only_judges(trained: Path) -> None:
    judge_only = script("judge_only")
    lesson = judge_only.Lesson.of(trained, 40)
    course = judge_only.course(lesson, [1, 5])
    assert len(course) == 3
    assert course[0] == judge_only.measure(lesson, lesson.policy())
    assert course[1] != course[0]
    policy = lesson.policy()
    found = judge_only.over_runs([course, course])
    change = found["log pi good"]["changes"][1]["mean"]
    assert change == pytest.approx(course[2]["log pi good"] - course[0]["log pi good"])
    logprobs = log_probabilities(policy.model, [s.sample for s in lesson.samples])
    good = [
        float(lp) for lp, s in zip(logprobs, lesson.samples, strict=True) if s.verdict == "good"
    ]
    assert course[0]["log pi good"] == pytest.approx(sum(good) / len(good), abs=1e-4)
    assert "after 5 steps" in judge_only.table(found, [1, 5])
    json.dumps(found)


def test_a_run_without_questions_is_refused(tmp_path: Path) -> None:
    train(recipe(4, gcd={"objective": "none"}), tmp_path / "run", Display(quiet=True))
    judge_only = script("judge_only")
    lesson = judge_only.Lesson.of(tmp_path / "run", 10)
    with pytest.raises(CheckpointError, match="has no GCD; choose another arm"):
        next(lesson.exercises(lesson.policy(), slice(None)))


def test_what_taking_credit_out_is_predicted_to_do() -> None:
    """Two flawed steps are punished, a good one is rewarded, with weight 1/2 per step: without the
    reward, the probe loses what the good step gave it, in units of its own 1/2 K_00."""
    cause = script("cause")
    invalid, good = Label("rule", "flawed", "invalid"), Label("rule", "good", "progress")
    lost = make_step(0, command="focus on a", action=(4,), labels=(invalid,), advantage=-1.0)
    won = make_step(0, command="focus on b", action=(5,), labels=(good,), advantage=1.0)
    group = Group(REF, (make_episode(0.0, [lost], id="x"), make_episode(1.0, [won], id="y")))
    samples = distinct_samples([group], "step")
    assert [cause.is_probe(s, "focus") for s in samples] == [True, False]
    assert not cause.is_probe(samples[0], "go")
    K_NN = torch.tensor([[2.0, 0.5], [0.5, 3.0]], dtype=torch.float64)
    batch = cause.Batch([group], "step", samples, K_NN, torch.tensor([True, False]))
    config = recipe(1).model_copy(
        update={
            "credit": CreditConfig(
                name="studies.gcd.without:without",
                options={"credit": "rewarded", "word": "focus", "verdict": "good"},
            )
        }
    )
    credit = cause.credit_of(config)
    assert batch.change(credit) == pytest.approx(-0.5 * 0.5 / (0.5 * 2.0))
    vetoed = config.model_copy(update={"credit": CreditConfig(veto=["flawed"])})
    assert batch.change(cause.credit_of(vetoed)) == 0.0
    assert cause.credit_of(recipe(1)) is None


def test_arms_with_credit_of_labels() -> None:
    """An untrained step stays one; -.3 before the veto, which then caps at 0 what is left."""
    cause = script("cause")
    flawed, good = Label("rule", "flawed", "invalid"), Label("rule", "good", "progress")
    steps = [
        make_step(0, labels=(flawed,), advantage=1.0),
        make_step(1, labels=(flawed,), advantage=-1.0),
        make_step(2, labels=(good,), advantage=-1.0),
        make_step(3, labels=(good,), advantage=None),
    ]
    group = Group(REF, (make_episode(1.0, steps, id="a"),))

    def credited(**credit: object) -> list[float | None]:
        config = recipe(1).model_copy(update={"credit": CreditConfig(**credit)})
        (episode,) = cause.credit_of(config)(group).episodes
        return [step.advantage for step in episode.steps]

    assert credited(veto=["flawed", "good"], penalty=0.3) == [0.0, -1.3, 0.0, None]
    assert credited(name="studies.gcd.without:rules_only") == [-1.0, -1.0, 1.0, None]


def test_directions_by_hand() -> None:
    """Two prompts, one command right in the first and wrong in the second."""
    directions, cause = script("directions"), script("cause")
    labels = [Label("rule", "good", "progress"), Label("rule", "flawed", "invalid")]
    steps = [
        make_step(t, command="focus on ant", labels=(label,), advantage=1.0, prompt=(t, 7))
        for t, label in enumerate(labels)
    ]
    group = Group(REF, (make_episode(1.0, steps, id="a"),))
    samples = distinct_samples([group], "step")
    K_NN = torch.tensor([[4.0, 1.0], [1.0, 9.0]], dtype=torch.float64)
    batch = cause.Batch([group], "step", samples, K_NN, torch.tensor([False, True]))
    share = 1 / (1 + 2.718281828 ** (samples[0].recorded_logprob - samples[1].recorded_logprob))
    assert directions.same_command(batch).tolist() == pytest.approx([share, -share])
    assert directions.same_command(batch, level=True).tolist() == pytest.approx([1 / 2, -1 / 3])


def test_arms_are_confirmed_by_their_intervals(tmp_path: Path) -> None:
    cause = script("cause")
    arm = cause._arm("wrong.a", [(0, -1.0, -0.5), (1, -2.0, -0.7), (2, -1.5, -0.6)])
    assert (arm.predicted, arm.verdict) == (-1.5, "confirmed")
    other = cause._arm("wrong.b", [(0, -1.0, 0.5), (1, -2.0, 0.7), (2, -1.5, 0.6)])
    assert other.verdict == "refuted"
    unclear = cause._arm("wrong.c", [(0, 1.0, -0.5), (1, 2.0, 0.7), (2, 1.5, 0.6)])
    assert unclear.verdict == "undecided"
    assert cause.agreement([arm]) == pytest.approx(1.0)
    assert cause.agreement([arm, other]) == pytest.approx(0.0)
    cause.draw([arm, other], tmp_path / "c.svg")
    assert "measured after training" in (tmp_path / "c.svg").read_text()
    assert "| wrong.a | 3 | -1.50 | -0.600 [" in cause.table([arm])
