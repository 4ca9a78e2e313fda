"""GRPO advantages against hand-worked numbers and the pitfalls of method.md section 2."""

from __future__ import annotations

import statistics

import pytest

from tests.builders import make_group
from untwine.credit import credit_method
from untwine.credit.grpo import grpo
from untwine.errors import ConfigError


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
    with pytest.raises(ConfigError, match="must be 'std' or 'none'"):
        credit_method("grpo", {"normalise": "var"})(make_group([1.0, 0.0]))
