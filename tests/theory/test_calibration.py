"""One state: closed forms by hand and by enumeration, samples against them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.theory.enumeration import advantages, groups
from untwine.theory.advantage import NORMALISERS, Normaliser
from untwine.theory.calibration import (
    GRADED_EXAMPLE,
    Bandit,
    flawed_advantage_graded,
    grid,
    sample_group_advantage,
    study,
)


def test_closed_forms_by_hand() -> None:
    bandit = Bandit(success=0.6, rate=0.25, risk=0.4)
    assert bandit.value == pytest.approx(0.5)
    assert bandit.advantage == pytest.approx(-0.3)
    assert bandit.contribution == pytest.approx(-0.075)
    assert bandit.group_advantage(4, "none") == pytest.approx(-0.225)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("bandit", [Bandit(0.6, 0.25, 0.4), Bandit(1.0, 0.9, 0.2)])
def test_group_advantage_against_all_groups(
    bandit: Bandit, size: int, normaliser: Normaliser
) -> None:
    p, q, r = bandit.success, bandit.rate, bandit.risk
    # outcomes: flawed and failed, flawed and solved, sound and failed, sound and solved
    chances = [q * (1 - p + r), q * (p - r), (1 - q) * (1 - p), (1 - q) * p]
    total = sum(
        chance * sum(a for a, pick in zip(advantages(returns, normaliser), picks) if pick < 2)  # noqa: B905
        for chance, picks, returns in groups(chances, [0.0, 1.0, 0.0, 1.0], size)
    )
    assert bandit.group_advantage(size, normaliser) == pytest.approx(total / (size * q), abs=1e-12)


@given(
    st.floats(0.05, 1), st.floats(0.01, 0.99), st.floats(0.01, 1), st.integers(2, 32),
    st.sampled_from(NORMALISERS),
)  # fmt: skip
def test_a_flawed_action_never_has_a_positive_expectation(
    success: float, rate: float, share: float, size: int, normaliser: Normaliser
) -> None:
    assert Bandit(success, rate, success * share).group_advantage(size, normaliser) < 0


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("size", [2, 8])
def test_samples_agree_with_the_closed_form(size: int, normaliser: Normaliser) -> None:
    bandit = Bandit(0.7, 0.4, 0.5)
    rng = np.random.default_rng(0)
    estimate = sample_group_advantage(bandit, size, normaliser, 60_000, rng)
    assert 0 < estimate.error < 0.01
    assert abs(estimate.mean - bandit.group_advantage(size, normaliser)) < 4 * estimate.error


def test_the_error_is_the_spread_of_repeated_estimates() -> None:
    bandit, rng = Bandit(0.7, 0.4, 0.5), np.random.default_rng(1)
    found = [sample_group_advantage(bandit, 4, "std", 400, rng) for _ in range(400)]
    spread = np.std([e.mean for e in found], ddof=1)
    assert np.mean([e.error for e in found]) == pytest.approx(spread, rel=0.12)
    held = [e.interval[0] <= bandit.group_advantage(4, "std") <= e.interval[1] for e in found]
    assert 0.91 < np.mean(held) < 0.98


def test_no_estimate_without_flawed_samples() -> None:
    estimate = sample_group_advantage(Bandit(0.5, 0.0, 0.2), 4, "std", 50, np.random.default_rng(0))
    assert math.isnan(estimate.mean)


def test_grid_holds_legal_bandits() -> None:
    bandits = list(grid(4))
    assert len(bandits) == 64
    assert all(0 < b.risk <= b.success <= 1 and 0 < b.rate < 1 for b in bandits)


distributions = st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)


@settings(max_examples=25, deadline=None)
@given(
    distributions, distributions, st.floats(0, 1), st.integers(2, 4), st.sampled_from(NORMALISERS)
)
def test_graded_returns_against_all_groups(
    first: list[int], second: list[int], rate: float, size: int, normaliser: Normaliser
) -> None:
    levels = [0.0, 0.3, 1.0]
    flawed = [x / sum(first) for x in first]
    other = [x / sum(second) for x in second]
    mixed = [rate * f + (1 - rate) * o for f, o in zip(flawed, other, strict=True)]
    expected = sum(
        flawed[own] * chance * advantages([levels[own], *others], normaliser)[0]
        for own in range(3)
        for chance, _, others in groups(mixed, levels, size - 1)
    )
    found = flawed_advantage_graded(flawed, other, levels, rate, size, normaliser)
    assert found == pytest.approx(expected, abs=1e-9)


def test_graded_example_by_hand() -> None:
    levels, flawed, other = (GRADED_EXAMPLE[k] for k in ("levels", "flawed", "other"))
    assert np.dot(flawed, levels) < np.dot(other, levels)
    pair = flawed_advantage_graded(flawed, other, levels, 0.5, 2, "std")
    assert pair == pytest.approx(0.5 * (0.35 - 0.30) / math.sqrt(2), abs=1e-5)
    plain = flawed_advantage_graded(flawed, other, levels, 0.5, 2, "none")
    assert plain == pytest.approx(-0.5 * 0.5 * 0.05)


def test_study_finds_the_statement_and_its_end() -> None:
    numbers = study([2, 6], groups=1500, graded_draws=150, seed=0)
    assert json.loads(json.dumps(numbers)) == numbers
    assert all(row["not_negative"] == 0 for row in numbers["bandit"])
    assert all(row["intervals_above_zero"] == 0 for row in numbers["bandit"])
    held = sum(row["intervals_holding_exact"] for row in numbers["bandit"])
    assert 0.88 < held / sum(row["sampled"] for row in numbers["bandit"]) < 0.99
    positive = {(row["normaliser"], row["group_size"]): row for row in numbers["graded"]}
    assert all(positive["none", size]["positive"] == 0 for size in (2, 4, 8))
    found = positive["std", 2]
    assert found["positive"] > 0
    assert found["counter_example"]["advantage"] > 0
