"""Statistics against values worked by hand, brute force, and coverage in simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from untwine.evaluate.statistics import (
    bootstrap_interval,
    iqm,
    student_interval,
    student_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], 5.0),
        ([1.0, 2.0, 9.0], 4.0),  # floor(3/4) = 0: nothing is cut
        ([9.0, 1.0, 3.0, 2.0], 2.5),  # one from each end
        ([0.0, 1.0, 2.0, 4.0, 100.0], 7 / 3),  # floor(5/4) = 1
        ([1, 2, 3, 4, 5, 6, 100], 4.0),  # floor(7/4) = 1: (2+3+4+5+6)/5
        ([1, 2, 3, 5, 8, 13, 21, 34], 7.25),  # two from each end: (3+5+8+13)/4
        (list(range(1, 10)), 5.0),
    ],
)
def test_iqm_matches_values_worked_by_hand(values: list[float], expected: float) -> None:
    assert iqm(values) == pytest.approx(expected)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_iqm_matches_a_slow_definition(values: list[float]) -> None:
    rest = list(values)
    for _ in range(math.floor(0.25 * len(values))):
        rest.remove(min(rest))
        rest.remove(max(rest))
    assert iqm(values) == pytest.approx(sum(rest) / len(rest), abs=1e-9)


# Independent numbers: the classic worked cases of the score interval without continuity
# correction (Newcombe 1998, table I, method 3).
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 200), st.data())
def test_wilson_ends_solve_the_score_equation(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    rate, z = successes / n, 1.959963984540054
    for p in wilson_interval(successes, n):
        assert (rate - p) ** 2 * n == pytest.approx(z * z * p * (1 - p), abs=1e-6)


def test_wilson_covers_by_exact_enumeration() -> None:
    """Exact binomial coverage, averaged over success rates, is close to nominal."""
    n = 40
    intervals = [wilson_interval(k, n) for k in range(n + 1)]
    coverages = []
    for p in np.linspace(0.05, 0.95, 91):
        coverages.append(
            sum(
                math.comb(n, k) * p**k * (1 - p) ** (n - k)
                for k, (low, high) in enumerate(intervals)
                if low <= p <= high
            )
        )
    assert np.mean(coverages) == pytest.approx(0.95, abs=0.01)
    assert min(coverages) > 0.89


def test_wilson_of_nothing_and_of_the_impossible() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="not possible"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=1.5)


def test_bootstrap_matches_brute_force_over_all_resamples() -> None:
    values = [0.0, 0.1, 0.4, 0.9, 1.0]
    means = [sum(draw) / 5 for draw in itertools.product(values, repeat=5)]
    expected = np.percentile(means, [5, 95])
    found = bootstrap_interval(values, confidence=0.9, resamples=40_000)
    assert found == pytest.approx(tuple(expected), abs=0.021)


def test_bootstrap_is_seeded_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=50)
    whole = bootstrap_interval(values, seed=3)
    assert whole == bootstrap_interval(values, seed=3)
    assert whole != bootstrap_interval(values, seed=4)
    monkeypatch.setattr("untwine.evaluate.statistics._CHUNK", 70)
    assert bootstrap_interval(values, seed=3) == pytest.approx(whole, abs=1e-12)


def test_bootstrap_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        low, high = bootstrap_interval(rng.exponential(size=60), resamples=300, seed=trial)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 400 <= 0.98  # a percentile bootstrap of a skewed sample is a bit short


# Table of Student's t, two-sided 95 %, as printed in textbooks.
@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (7, 2.365), (15, 2.131)]
)
def test_student_quantiles_are_those_of_the_table(freedom: int, expected: float) -> None:
    assert student_quantile(0.95, freedom) == pytest.approx(expected, abs=6e-4)


@given(st.integers(1, 60), st.floats(0.05, 0.995))
def test_student_quantiles_bound_the_mass_found_by_integration(
    freedom: int, confidence: float
) -> None:
    """The density of Student's distribution, summed over a fine grid of u = atan(t / sqrt(n)):
    it is proportional to cos(u)^(n - 1)."""
    end = math.atan(student_quantile(confidence, freedom) / math.sqrt(freedom))

    def mass(limit: float) -> float:
        grid = (np.arange(20_000) + 0.5) / 20_000 * limit
        return float(np.sum(np.cos(grid) ** (freedom - 1)) * limit)

    assert mass(end) / mass(math.pi / 2) == pytest.approx(confidence, abs=1e-6)


def test_student_quantiles_agree_with_scipy() -> None:
    for freedom in range(1, 40):
        for confidence in (0.5, 0.9, 0.95, 0.999):
            expected = stats.t.ppf(0.5 + confidence / 2, freedom)
            assert student_quantile(confidence, freedom) == pytest.approx(expected, rel=1e-9)


def test_student_interval_worked_by_hand() -> None:
    # mean 3, sum of squares 10, variance 2.5, standard error sqrt(2.5 / 5) = .7071, t = 2.7764
    low, high = student_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low, high) == pytest.approx((3 - 1.96324, 3 + 1.96324), abs=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        student_interval([1.0])


def test_iqm_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    for n in range(1, 30):
        values = rng.normal(size=n)
        assert iqm(values) == pytest.approx(float(stats.trim_mean(values, 0.25)), abs=1e-12)


def test_empty_and_broken_values_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="finite"):
        iqm([1.0, math.nan])
    assert bootstrap_interval([0.5]) == (0.5, 0.5)
