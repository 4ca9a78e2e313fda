"""What comparisons need, in whole small runs: a budget of tokens, a penalty, shuffled labels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.gcd.test_training import recipe
from tests.runs import rows, steady
from untwine.batch import policy_rows
from untwine.compare.runs import find_runs
from untwine.episodes import read_groups
from untwine.errors import ConfigError
from untwine.gcd.labels import agreed_verdict
from untwine.policy.lora import without_lora
from untwine.progress import Display
from untwine.training.loop import train
from untwine.training.measures import Measures, averaged
from untwine.training.run_dir import episode_files, run_info

QUIET = Display(quiet=True)
GCD = {"objective": "generative/ce", "labels": ["rule"], "token_budget": 512}


def weights(run: Path) -> dict[str, bytes]:
    found = load_file(run / "model" / "model.safetensors")
    return {name: value.tobytes() for name, value in found.items()}


def test_iterations_end_with_the_one_that_reaches_the_budget(tmp_path: Path) -> None:
    train(recipe(3, gcd=GCD), tmp_path / "free", QUIET)
    spent = [r["policy_tokens"] + r.get("gcd_tokens", 0) for r in rows(tmp_path / "free")]
    assert spent[0] > 0
    assert spent[1] > 0
    for budget, done in ((spent[0], 1), (spent[0] + 1, 2)):
        run = tmp_path / str(budget)
        train(recipe(3, gcd=GCD, rl={"token_budget": budget}), run, QUIET)
        assert [r["step"] for r in rows(run)] == list(range(done))
        assert rows(run, "evaluate")[-1]["step"] == done
        assert run_info(run)["iterations"] == done
        assert steady(rows(run)) == steady(rows(tmp_path / "free")[:done])
        (found,) = find_runs([run]).runs
        assert [key[0] for key in found.results] == ["L0"]
        train(recipe(3, gcd=GCD, rl={"token_budget": budget}), run, QUIET, resume=True)
        assert len(rows(run)) == done


def test_epochs_and_minibatches(tmp_path: Path) -> None:
    """Every group in every epoch once, in as many steps as there are minibatches."""
    rl = {"epochs": 3, "minibatches": 2, "drop_constant_groups": False, "groups": 4}
    train(recipe(1, gcd={"objective": "none"}, rl=rl), tmp_path / "run", QUIET)
    (found,) = rows(tmp_path / "run")
    assert found["optimizer_steps"] == 6
    groups = list(read_groups(episode_files(tmp_path / "run")[0]))
    own = [sum(row.length for row in policy_rows([group], "token")) for group in groups]
    assert found["policy_tokens"] == 3 * sum(own)
    assert found["update_tokens"] < found["policy_tokens"]


def test_only_iterations_keep_a_copy_for_the_penalty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def copied(model: Any) -> Any:
        made.append(len(rows(tmp_path / "run", "cold_start")))
        return without_lora(model)

    monkeypatch.setattr("untwine.training.update.without_lora", copied)
    settings = recipe(1, gcd={"objective": "none"}, loss={"kl": 0.1})
    train(settings, tmp_path / "run", QUIET)
    assert made == [settings.cold_start.steps]


def test_numbers_of_several_steps() -> None:
    """Tokens, questions and seconds are summed, ratios are the largest, all else is a mean."""
    first, second = Measures(), Measures()
    first.add(gcd_tokens=3, verdicts=2, seconds_gcd=1.0, policy_loss=1.0, out_of_memory=1)
    second.add(gcd_tokens=5, verdicts=4, seconds_gcd=2.0, policy_loss=2.0)
    first.top(ratio_max=1.5)
    second.top(ratio_max=1.2)
    assert averaged([first, second]) == {
        "gcd_tokens": 8, "verdicts": 6, "seconds_gcd": 3.0, "policy_loss": 1.5,
        "out_of_memory": 1, "ratio_max": 1.5,
    }  # fmt: skip


def test_credit_by_labels_alone_asks_for_them(tmp_path: Path) -> None:
    gcd = {"objective": "none", "labels": ["expert"], "min_confidence": 0.0}
    train(recipe(1, gcd=gcd, credit={"name": "labels"}), tmp_path / "run", QUIET)
    groups = read_groups(episode_files(tmp_path / "run")[0])
    trained = [g for g in groups if len({e.outcome for e in g.episodes}) > 1]
    steps = [s for g in trained for e in g.episodes for s in e.steps]
    value = {"good": 1.0, "flawed": -1.0, None: 0.0}
    assert [s.advantage for s in steps] == [value[agreed_verdict(s)] for s in steps]
    assert {s.advantage for s in steps} >= {-1.0, 1.0}


def test_a_credit_method_of_ones_own_gets_the_labels_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "def method(group):\n    return [[len(s.labels) for s in e.steps] for e in group.episodes]"
    )
    (tmp_path / "untwine_counting.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    gcd = {"objective": "none", "labels": ["expert"], "min_confidence": 0.0}
    train(recipe(1, gcd=gcd, credit={"name": "untwine_counting:method"}), tmp_path / "run", QUIET)
    steps = [
        step
        for group in read_groups(episode_files(tmp_path / "run")[0])
        for episode in group.episodes
        for step in episode.steps
        if step.advantage is not None
    ]
    assert {step.advantage for step in steps} == {0.0, 1.0}
    assert all(step.advantage == len(step.labels) for step in steps)


@pytest.mark.parametrize("credit", [{"penalty": 0.3}, {"veto": ["flawed"]}])
def test_penalty_and_veto_need_labels(tmp_path: Path, credit: dict[str, Any]) -> None:
    none = {"objective": "none", "labels": []}
    with pytest.raises(ConfigError, match=r"goes by labels; name a source in gcd\.labels"):
        train(recipe(1, credit=credit, gcd=none), tmp_path / "run", QUIET)
    assert not list(tmp_path.iterdir())


def test_a_share_of_no_gradient_teaches_nothing_and_costs_nothing(tmp_path: Path) -> None:
    """Where all groups are constant, held GCD neither steps nor asks."""
    held = {**GCD, "weight_of": "gradient", "weight": 0.3}
    (tmp_path / "untwine_nothing.py").write_text(
        "def method(group):\n    return [[None] * e.length for e in group.episodes]"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        credit = {"name": "untwine_nothing:method"}
        train(recipe(2, gcd=held, credit=credit), tmp_path / "run", QUIET)
    finally:
        sys.path.remove(str(tmp_path))
    assert [row["optimizer_steps"] for row in rows(tmp_path / "run")] == [0, 0]
    assert not any(row.get("gcd_tokens") or row["verdicts"] for row in rows(tmp_path / "run"))
    begun = load_file(tmp_path / "run" / "initial" / "model.safetensors")
    assert {name: value.tobytes() for name, value in begun.items()} == weights(tmp_path / "run")


def test_credit_by_labels_needs_some(tmp_path: Path) -> None:
    credit = {"name": "labels", "options": {"sources": ["expert"]}}
    with pytest.raises(ConfigError, match=r"sources names expert, which gcd\.labels does not"):
        train(recipe(1, credit=credit, gcd={"labels": ["rule"]}), tmp_path / "a", QUIET)
    taught = {"labels": ["rule", "expert"], "taught": ["rule"]}
    with pytest.raises(ConfigError, match=r"sources names expert, which gcd\.taught does not"):
        train(recipe(1, credit=credit, gcd=taught), tmp_path / "c", QUIET)
    none = {"objective": "none", "labels": []}
    with pytest.raises(ConfigError, match=r"goes by labels; name a source in gcd\.labels"):
        train(recipe(1, credit={"name": "labels"}, gcd=none), tmp_path / "b", QUIET)
    assert not list(tmp_path.iterdir())


def test_the_penalty_is_on_record_at_flawed_steps(tmp_path: Path) -> None:
    plain, punished = tmp_path / "plain", tmp_path / "punished"
    none = {"objective": "none", "labels": ["expert"], "min_confidence": 0.0}
    rl = {"drop_constant_groups": False}
    train(recipe(1, gcd=none, rl=rl), plain, QUIET)
    train(recipe(1, gcd=none, rl=rl, credit={"penalty": 0.5}), punished, QUIET)
    without, with_it = (
        [s for g in read_groups(episode_files(r)[0]) for e in g.episodes for s in e.steps]
        for r in (plain, punished)
    )
    assert not any(s.labels for s in without)  # costly labels are only asked for when used
    flawed = [agreed_verdict(s) == "flawed" for s in with_it]
    assert any(flawed)
    for a, b, taken in zip(without, with_it, flawed, strict=True):
        assert a.advantage is not None
        assert b.advantage == a.advantage - (0.5 if taken else 0.0)


def test_no_recorded_advantage_contradicts_its_labels(tmp_path: Path) -> None:
    plain, vetoed = tmp_path / "plain", tmp_path / "vetoed"
    none = {"objective": "none", "labels": ["expert"], "min_confidence": 0.0}
    train(recipe(1, gcd=none), plain, QUIET)
    train(recipe(1, gcd=none, credit={"veto": ["flawed", "good"]}), vetoed, QUIET)
    without, with_it = (
        [s for g in read_groups(episode_files(r)[0]) for e in g.episodes for s in e.steps]
        for r in (plain, vetoed)
    )
    changed = {"flawed": 0, "good": 0}
    for a, b in zip(without, with_it, strict=True):
        verdict = agreed_verdict(b)
        if a.advantage is None or verdict is None:
            assert a.advantage == b.advantage
            continue
        assert b.advantage == (min if verdict == "flawed" else max)(a.advantage, 0.0)
        changed[verdict] += b.advantage != a.advantage
    assert min(changed.values()) > 0


def test_shuffled_labels_change_the_questions_only(tmp_path: Path) -> None:
    whole, parts, honest = (tmp_path / name for name in ("whole", "parts", "honest"))
    wrong = {**GCD, "shuffle_labels": True}
    train(recipe(2, gcd=wrong), whole, QUIET)
    train(recipe(1, gcd=wrong), parts, QUIET)
    train(recipe(2, gcd=wrong), parts, QUIET, resume=True)
    train(recipe(1, gcd=GCD), honest, QUIET)
    assert weights(parts) == weights(whole)
    first = [
        [s.labels for g in read_groups(episode_files(r)[0]) for e in g.episodes for s in e.steps]
        for r in (whole, honest)
    ]
    assert first[0] == first[1]
    ours, theirs = rows(whole)[0], rows(honest)[0]
    assert ours["verdicts"] > 0
    assert ours["flawed_rate"] == theirs["flawed_rate"]
    assert ours["gcd_loss"] != theirs["gcd_loss"]


def test_sources_that_are_recorded_only_teach_nothing(tmp_path: Path) -> None:
    both = {**GCD, "labels": ["rule", "group"]}
    settings = {"alone": GCD, "taught": {**both, "taught": ["rule"]}, "both": both}
    for name, gcd in settings.items():
        train(recipe(2, gcd=gcd, credit={"penalty": 0.3}), tmp_path / name, QUIET)
    assert weights(tmp_path / "taught") == weights(tmp_path / "alone")
    assert weights(tmp_path / "both") != weights(tmp_path / "alone")
    sources = {
        label.source
        for group in read_groups(episode_files(tmp_path / "taught")[0])
        for episode in group.episodes
        for step in episode.steps
        for label in step.labels
    }
    assert sources == {"rule", "group"}
    with pytest.raises(ConfigError, match="taught names group, which labels does not"):
        recipe(1, gcd={**GCD, "taught": ["group"]})
