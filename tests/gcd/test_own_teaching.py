"""Label sources and objectives of one's own, named by their place."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.builders import make_group
from untwine.batch import completion_row
from untwine.cli import main
from untwine.config import GCDConfig, LossConfig, OptimizerConfig, PromptConfig
from untwine.envs.rooms import INFO
from untwine.episodes import read_groups, write_groups
from untwine.errors import CheckpointError, ConfigError
from untwine.gcd import sources
from untwine.gcd.labels import plain_source
from untwine.gcd.objectives import Exercise, Means, check_objective, make_objective
from untwine.gcd.sources import check_sources
from untwine.gcd.sources.branch import BranchSource
from untwine.policy.loading import Policy
from untwine.prompting.prompter import Prompter
from untwine.records import Label
from untwine.training.run_dir import episode_files
from untwine.training.update import Updater

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_teaching.py"
GOOD, FLAWED = Label("x", "good", "why", 0.5), Label("rule", "flawed", "why")
ANSWERS: dict[str, Any] = {
    "right": [[GOOD, None], (None, FLAWED, None)],
    "nothing": None,
    "one row": [[None, None]],
    "short": [[None], [None, None, None]],
    "words": [["good", None], [None] * 3],
    "verdict": [[Label("x", "bad", "why"), None], [None] * 3],  # type: ignore[arg-type]
    "doubt": [[Label("x", "good", "why", 0.0), None], [None] * 3],
    "sure": [[Label("x", "good", "why", "high"), None], [None] * 3],  # type: ignore[arg-type]
    "kind": [[Label("x", "good", None), None], [None] * 3],  # type: ignore[arg-type]
    "numpy": [[Label("x", "good", "why", np.float32(0.5)), None], [None] * 3],  # type: ignore[arg-type]
}


@pytest.fixture(autouse=True)
def _mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module `mine` in the current folder; path and modules are afterwards as they were."""
    code = "ANSWER = None\ndef source(group, info):\n    return ANSWER\nclass Nothing:\n"
    code += "    def __init__(self, means): pass\nNUMBER = 3\ndef maker(means):\n    return MADE\n"
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [m for m in sys.modules if m.partition(".")[0] in ("examples", "mine")]:
        del sys.modules[name]


def labelled(answer: str) -> list[list[Label | None]]:
    source = plain_source("mine:source")
    sys.modules["mine"].ANSWER = ANSWERS[answer]  # type: ignore[attr-defined]
    return source(make_group([1.0, 0.0], [2, 3]), INFO)


def test_labels_get_the_name_of_the_recipe() -> None:
    first = Label("mine:source", "good", "why", 0.5)
    second = Label("mine:source", "flawed", "why")
    assert labelled("right") == [[first, None], [None, second, None]]


def test_confidence_of_any_type_of_number_is_written(tmp_path: Path) -> None:
    group = make_group([1.0, 0.0], [2, 3])
    tables = [[(label,) if label else () for label in row] for row in labelled("numpy")]
    write_groups(tmp_path / "episodes.jsonl.gz", [group.with_labels(tables)])
    (read,) = read_groups(tmp_path / "episodes.jsonl.gz")
    assert read.episodes[0].steps[0].labels == (Label("mine:source", "good", "why", 0.5),)


def test_what_a_source_raises_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ANSWERS, "broken", (len(5) for _ in range(2)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has no len"):
        labelled("broken")


def test_a_registered_name_may_have_a_colon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAKERS", dict(sources._MAKERS))
    sources.register_source("critic:v2", BranchSource)
    check_sources(["critic:v2"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("nothing", "a row for each of 2 episodes"),
        ("one row", "a row for each of 2 episodes"),
        ("short", "a Label or None for each of its steps"),
        ("words", "'good' is neither a Label nor None"),
        ("verdict", "verdict='bad'.* is no verdict; it must be good or flawed"),
        ("doubt", "confidence=0.0.* is no verdict; .* with a confidence above 0"),
        ("sure", "confidence='high'.* is no verdict; .* with a confidence above 0"),
        ("kind", "kind=None.* is no verdict; .* of a kind in a word"),
    ],
)
def test_what_is_no_table_of_labels_is_said(answer: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"label source 'mine:source': .*{words}"):
        labelled(answer)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rul", "known are .*rule, and one of your own is named module:function.*'rule'"),
        ("mine:sauce", r"module 'mine' \(.*mine.py\) has no function 'sauce'"),
        ("mine:NUMBER", "has no function 'NUMBER'"),
        ("nowhere:source", "there is no module 'nowhere'"),
    ],
)
def test_a_source_that_is_not_there_is_said(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_sources([name])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("heed", "known are none, .*head.*, and one of your own is named module:maker.*'head'"),
        ("mine:Objective", "has no function 'Objective'"),
        ("nowhere:Objective", "there is no module 'nowhere'"),
    ],
)
def test_an_objective_that_is_not_there_is_said(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_objective(name)


def means_of(policy: Policy, **gcd: Any) -> Means:
    return Means(policy, Prompter(policy.chat, PromptConfig()), GCDConfig(**gcd))


def test_what_cannot_teach_is_no_objective(policy: Policy) -> None:
    with pytest.raises(ConfigError, match="'mine:Nothing' makes a Nothing; it must have a method"):
        make_objective("mine:Nothing", means_of(policy))


class Odd:
    """An objective that gives back what it is made with."""

    module = None

    def __init__(self, found: Any) -> None:
        self.found = found

    def exercise(self, *_: Any) -> Any:
        return self.found


def exercise_of(policy: Policy, found: Any) -> Exercise:
    check_objective("mine:maker")
    sys.modules["mine"].MADE = Odd(found)  # type: ignore[attr-defined]
    objective = make_objective("mine:maker", means_of(policy))
    assert objective is not None
    exercise = objective.exercise((), random.Random(0), torch.Generator())
    assert exercise is not None
    return exercise


def test_numbers_of_ones_own_have_names_of_their_own(policy: Policy) -> None:
    def loss(rows: Any) -> Any:
        return torch.ones(1), {"entropy": torch.tensor(2.0), "verdict_accuracy": 1}

    given: Any = {"verdicts": np.float32(3), "policy_tokens": torch.tensor(5.0)}
    exercise = exercise_of(policy, Exercise([], loss, given))
    assert exercise.counts == {"verdicts": 3.0, "objective_policy_tokens": 5.0}
    value, measures = exercise.loss([])
    assert value.shape == ()
    assert measures == {"objective_entropy": 2.0, "verdict_accuracy": 1.0}
    assert {type(x) for x in [*exercise.counts.values(), *measures.values()]} == {float}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (3, "`exercise` gave 3; it must give an Exercise or None"),
        (Exercise([], lambda _: (torch.ones(2), {})), r"gave tensor\(\[1., 1.\]\); .* one number"),
        (Exercise([], lambda _: torch.ones(())), "it must give a tensor and a dict of measures"),
        (Exercise([], lambda _: (torch.ones(()), {"x": "y"})), "must give a dict of numbers"),
        (Exercise([], lambda _: (torch.ones(()), {}), {"x": None}), "must give a dict of numbers"),
    ],
)
def test_what_cannot_be_trained_on_is_said(policy: Policy, found: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"gcd.objective 'mine:maker': .*{words}"):
        exercise_of(policy, found).loss([])


def bad_row(**values: Any) -> Any:
    return dataclasses.replace(completion_row([5, 9], [30, 17, 8], 1.0), **values)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1, 2], r"is \[1, 2\]; it must be a Row, as untwine.batch.completion_row makes it"),
        (bad_row(ids=[5, 9, 30]), r"has ids \[5, 9, 30\]; they must be an array of integers"),
        (bad_row(targets=np.array([2.0])), "has targets .*; they must be an array of integers"),
        (bad_row(targets=np.array([0, 3])), r"has targets \[0, 3\]; .* between 1 and 4, the last"),
        (bad_row(targets=np.array([3, 5])), r"has targets \[3, 5\]; .* between 1 and 4, the last"),
        (bad_row(targets=np.array([], dtype=int)), r"has targets \[\]; there must be some"),
        (bad_row(weights=np.ones(2)), r"has weights array\(.*; .* one for each of 3 targets"),
        (bad_row(advantages=None), "has advantages None; .* one for each of 3 targets"),
        (bad_row(old_logprobs=np.array([0, np.nan, 0])), "has old_logprobs .*nan.* must be finite"),
        (
            bad_row(choices=np.ones((2, 4), int)),
            r"has choices of shape \(2, 4\); it must be \(3, C",
        ),
        (bad_row(choices=[[1], [2], [3]]), r"has choices of shape \(\); it must be \(3, C"),
        (
            bad_row(choices=np.array([[30], [16], [-1]])),
            "has a target 17 that is not among its choices",
        ),
        (
            bad_row(choices=np.array([[30, 10**6], [17, 1], [8, 8]])),
            "has the token id 1000000; the",
        ),
        (bad_row(ids=np.array([5, -1, 30, 17, 8])), "has the token id -1; the model has ids 0 to"),
        (completion_row([5] * 5000, [1], 1.0), "has 5001 tokens, but the model has positions for"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_said(policy: Policy, row: Any, words: str) -> None:
    good = completion_row([5, 9], [30, 17, 8], 1.0)
    narrow = dataclasses.replace(good, choices=np.array([[30, 2], [-1, -1], [8, -1]]))
    exercise_of(policy, Exercise([good, narrow], lambda _: (torch.zeros(()), {})))
    with pytest.raises(ConfigError, match=f"'mine:maker': row 2 of its exercise {words}"):
        exercise_of(policy, Exercise([good, narrow, row], lambda _: (torch.zeros(()), {})))
    with pytest.raises(ConfigError, match="its `rows` gave 3; it must give a list of Rows"):
        exercise_of(policy, Exercise(3, lambda _: (torch.zeros(()), {})))  # type: ignore[arg-type]


def updater(policy: Policy, module: torch.nn.Module | None = None) -> Updater:
    gcd = GCDConfig(weight_of="gradient")
    return Updater(
        policy, OptimizerConfig(), LossConfig(), temperature=1.0, microbatch_tokens=99, gcd=gcd,
        module=module,
    )  # fmt: skip


def test_weights_of_another_objective_are_refused(policy: Policy) -> None:
    first, same = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    held = updater(policy, first).extra_state()
    updater(policy, same).load_extra_state(held)
    assert torch.equal(same.weight, first.weight)
    for other in (None, torch.nn.Linear(4, 1), torch.nn.LayerNorm(3)):
        with pytest.raises(CheckpointError, match="holds weights of another objective; resume"):
            updater(policy, other).load_extra_state(held)


def test_a_loss_that_depends_on_nothing_teaches_nothing(policy: Policy) -> None:
    row = completion_row([5, 9], [30, 17, 8], 1.0)
    row = dataclasses.replace(row, advantages=row.advantages + 1)
    exercise = exercise_of(policy, Exercise([row], lambda _: (torch.zeros(()), {})))
    measures = updater(policy).step([row], exercise, 0.5).values
    assert measures["grad_norm_gcd"] == 0.0
    assert measures["grad_norm_policy"] > 0.0


# ---- the example


def test_the_page_shows_the_example() -> None:
    page = (ROOT / "docs" / "methods" / "gcd.md").read_text()
    section = page.partition("## Labels and objectives of your own")[2].partition("\n## ")[0]
    (shown,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert shown == EXAMPLE.read_text().partition('"""\n\n')[2]


def test_the_example_imitates_what_is_good(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss against plain forward passes, in two parts."""
    monkeypatch.syspath_prepend(str(ROOT))
    group = make_group([1.0, 0.0], [2, 3])
    group = group.with_labels([[(GOOD,), ()], [(GOOD,), (FLAWED,), (GOOD,)]])
    objective = make_objective("examples.own_teaching:Imitation", means_of(policy))
    assert objective is not None
    exercise = objective.exercise(group.episodes, random.Random(0), torch.Generator())
    assert exercise is not None
    assert exercise.counts == {"verdicts": 3}
    parts = [exercise.loss(exercise.rows[:1]), exercise.loss(exercise.rows[1:])]
    good = [group.episodes[0].steps[0], group.episodes[1].steps[0], group.episodes[1].steps[2]]
    expected = 0.0
    for step in good:
        ids, n = torch.tensor([[*step.prompt_ids, *step.action_ids]]), len(step.action_ids)
        with torch.no_grad():
            logprobs = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        said = logprobs[-n - 1 : -1].gather(-1, torch.tensor(step.action_ids)[:, None])
        expected -= said.mean().item() / 3
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(expected, rel=1e-5)
    assert sum(x["objective_good_logprob"] for _, x in parts) == pytest.approx(-expected, rel=1e-5)
    small = make_objective("examples.own_teaching:Imitation", means_of(policy, token_budget=1))
    assert small is not None
    assert small.exercise(group.episodes, random.Random(0), torch.Generator()) is None


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    side = "examples.own_teaching:side"
    arguments = [
        "cold_start.steps=12", "cold_start.episodes=20", "rl.iterations=2", "evaluate.episodes=0",
        f"gcd.labels=[{side}]", "gcd.objective=examples.own_teaching:Imitation",
    ]  # fmt: skip
    run = ["examples/own_environment.yaml", *arguments, "--run", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["untwine", "train", *run])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").open()]
    taught = [row for row in rows if row["stage"] == "rl" and row["verdicts"]]
    assert taught
    assert all(row["gcd_loss"] == pytest.approx(-row["objective_good_logprob"]) for row in taught)
    groups = read_groups(episode_files(tmp_path / "run")[0])
    said = {x for g in groups for e in g.episodes for s in e.steps for x in s.labels}
    assert {label.source for label in said} == {side}
    assert {label.verdict for label in said} == {"good", "flawed"}
