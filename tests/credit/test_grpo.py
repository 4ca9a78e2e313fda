"""GRPO advantages against hand-worked numbers and the pitfalls of method.md section 2."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.builders import make_group
from untwine import credit
from untwine.credit import credit_method
from untwine.credit.grpo import grpo
from untwine.errors import ConfigError
from untwine.records import Group


def test_hand_worked() -> None:
    # returns 1, 0, 0, 0: mean 1/4, unbiased variance 1/4, deviation 1/2
    rows = grpo(make_group([1, 0, 0, 0]))
    assert [row[0] for row in rows] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)


def test_statistics_see_each_episode_once_whatever_its_length() -> None:
    short = grpo(make_group([1.0, 0.0, 0.5], lengths=[1, 1, 1]))
    long = grpo(make_group([1.0, 0.0, 0.5], lengths=[1, 9, 4]))
    assert [row[0] for row in short] == [row[0] for row in long]
    assert [len(row) for row in long] == [1, 9, 4]
    assert all(len(set(row)) == 1 for row in long)


def test_without_std_it_is_the_distance_to_the_mean() -> None:
    rows = grpo(make_group([0.2, 0.9, 0.4]), normalise="none")
    assert [row[0] for row in rows] == pytest.approx([-0.3, 0.4, -0.1])


def test_agrees_with_the_standard_library_on_random_returns() -> None:
    returns = [0.31, 0.02, 0.77, 1.0, 0.5, 0.0, 0.99, 0.13]
    rows = grpo(make_group(returns))
    mean, deviation = statistics.mean(returns), statistics.stdev(returns)
    assert [row[0] for row in rows] == pytest.approx(
        [(r - mean) / (deviation + 1e-6) for r in returns]
    )


def test_a_single_episode_has_no_baseline() -> None:
    assert grpo(make_group([1.0])) == [[0.0, 0.0]]


def test_a_constant_group_gets_zero() -> None:
    assert all(a == 0 for row in grpo(make_group([0.5] * 4)) for a in row)


def test_registry_names_the_nearest() -> None:
    group = credit_method("grpo", {"normalise": "none"})(make_group([1.0, 0.0]))
    assert group.episodes[0].steps[0].advantage == 0.5
    with pytest.raises(ConfigError, match="Did you mean 'grpo'"):
        credit_method("grp0", {})
    with pytest.raises(ConfigError, match="Did you mean 'normalise'"):
        credit_method("grpo", {"normalize": "std"})


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("grpo", {"normalise": "var"}, r"normalise: .*'std' or 'none' \(got 'var'\)"),
        ("grpo", {"eps": "abc"}, r"eps: .* valid number.* \(got 'abc'\)"),
        ("grpo", {"eps": 0}, r"eps: .* greater than 0 \(got 0\)"),
        ("grpo", {"eps": float("nan")}, r"eps: .*(finite|greater)"),
        ("rlvmr", {"eps": 0.0}, r"eps: .* greater than 0"),
        ("rlvmr", {"normalise": "var"}, r"normalise: .*'std' or 'none'"),
        ("rlvmr", {"weight": "abc"}, r"weight: .* valid number.* \(got 'abc'\)"),
        ("rlvmr", {"weight": float("inf")}, r"weight: .* finite number \(got inf\)"),
        ("rlvmr", {"refusal": None}, r"refusal: .* valid number \(got None\)"),
    ],
)
def test_values_of_options_are_checked_before_there_is_a_group(
    method: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^credit\.options\.{words}") as caught:
        credit_method(method, options)
    assert "\n" not in str(caught.value)


def test_a_method_is_found_by_its_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credit_of_mine.py").write_text(
        "def twice(group, scale: float = 2.0):\n"
        "    return [[scale * r] * e.length for r, e in zip(group.returns_G, group.episodes)]\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "credit_unfinished.py").write_text("def twice(group:\n")
    group = make_group([1.0, 0.5])
    found = credit_method("credit_of_mine:twice", {"scale": 3})(group)
    assert [e.steps[0].advantage for e in found.episodes] == [3.0, 1.5]
    for name, words in {
        "credit_of_mine:thrice": "has no function 'thrice'",
        "credit_of_theirs:twice": "there is no module 'credit_of_theirs'.*PYTHONPATH",
        "credit_unfinished:twice": "failed with SyntaxError",
        ":twice": "not of the form module:attribute",
        "credit_of_mine:": "not of the form module:attribute",
        "credit_of_mine:number": "has no function 'number'",
    }.items():
        with pytest.raises(ConfigError, match=words) as caught:
            credit_method(name, {})
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"options\.scale: .*number"):
        credit_method("credit_of_mine:twice", {"scale": "much"})
    with pytest.raises(ConfigError, match="has no option 'scales'"):
        credit_method("credit_of_mine:twice", {"scales": 1})


def test_options_are_numbers_however_yaml_wrote_them() -> None:
    """YAML reads 1e-1 as a text; other keys of a recipe take it, and so do options."""
    group = make_group([1.0, 0.0])
    assert credit_method("grpo", {"eps": "1e-1"})(group) == credit_method("grpo", {"eps": 0.1})(
        group
    )


def test_a_method_from_outside_is_held_to_its_own_signature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mine(group: Group, scale: int = 1, mark=None) -> list[list[float | None]]:  # type: ignore[no-untyped-def]
        return [[float(scale)] * episode.length for episode in group.episodes]

    def theirs(group: Unknown, scale: int = 1) -> list[list[float | None]]:  # type: ignore[name-defined]  # noqa: F821
        return mine(group, scale)

    monkeypatch.setattr(credit, "_METHODS", {})
    credit.register_credit("mine", mine)
    credit.register_credit("theirs", theirs)
    group = make_group([1.0])
    found = credit_method("mine", {"scale": "3", "mark": "anything"})(group)
    assert found == credit_method("theirs", {"scale": 3})(group)
    assert found.episodes[0].steps[0].advantage == 3.0
    with pytest.raises(ConfigError, match=r"credit\.options\.scale: .*integer"):
        credit_method("mine", {"scale": 1.5})
