"""What is said over runs, against loops written from the paper's definitions, enumeration of all
resamples, numbers worked by hand, and coverage in simulation."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from untwine.evaluate.aggregate import (
    Strata,
    bootstrap,
    paired_difference,
    performance_profile,
    probability_of_improvement,
)
from untwine.evaluate.statistics import iqm

SEEDS = st.integers(0, 2**32)


def drawn(seed: int, runs: int = 4) -> np.ndarray:
    """Scores of runs on three tasks, with many ties."""
    return np.random.default_rng(seed).integers(0, 5, size=(runs, 3)) / 4


@given(SEEDS)
def test_probability_of_improvement_is_the_definition(seed: int) -> None:
    x, y = drawn(seed), drawn(seed + 1, 5)
    total = Fraction(0)
    for m in range(3):
        wins = Fraction(0)
        for i in range(4):
            for j in range(5):
                if x[i, m] > y[j, m]:
                    wins += 1
                elif x[i, m] == y[j, m]:
                    wins += Fraction(1, 2)
        total += wins / 20
    assert probability_of_improvement(x, y) == pytest.approx(float(total / 3), abs=1e-12)
    assert probability_of_improvement(y, x) == pytest.approx(1 - float(total / 3), abs=1e-12)


def test_probability_of_improvement_by_hand_and_by_scipy() -> None:
    x, y = np.array([[0.9], [0.5], [0.4]]), np.array([[0.5], [0.3]])
    # 0.9 beats both, 0.5 ties and beats, 0.4 loses and beats: (2 + 1.5 + 1) / 6
    assert probability_of_improvement(x, y) == pytest.approx(0.75)
    rank = stats.mannwhitneyu(x[:, 0], y[:, 0]).statistic
    assert probability_of_improvement(x, y) == pytest.approx(rank / 6)


@given(SEEDS)
def test_performance_profile_counts_scores_above(seed: int) -> None:
    scores = drawn(seed)
    thresholds = np.array([-0.1, 0.0, 0.3, 0.5, 1.0])
    expected = [sum(float(v) > tau for v in scores.flat) / 12 for tau in thresholds]
    assert performance_profile(scores, thresholds).tolist() == pytest.approx(expected)


@given(SEEDS)
def test_the_area_under_the_profile_is_the_mean(seed: int) -> None:
    """For scores in [0, 1], the integral of P(score > tau) over tau is the mean score."""
    scores = drawn(seed)
    steps = 4000
    middles = (np.arange(steps) + 0.5) / steps
    area = performance_profile(scores, middles).mean()
    assert area == pytest.approx(float(scores.mean()), abs=1 / steps)


@pytest.mark.parametrize("strata", ["runs", "tasks"])
def test_bootstrap_matches_all_resamples(strata: Strata) -> None:
    """Three runs, two tasks: every resample can be written down."""
    scores = np.array([[0.0, 0.1], [0.4, 0.7], [1.0, 0.8]])
    found = []
    for first in itertools.product(range(3), repeat=3):
        others = [first] if strata == "runs" else itertools.product(range(3), repeat=3)
        for second in others:
            found.append(iqm(np.concatenate([scores[list(first), 0], scores[list(second), 1]])))
    expected = np.percentile(found, [10, 90])
    low, high = bootstrap(iqm, scores, strata=strata, confidence=0.8, resamples=20_000)
    assert (float(low), float(high)) == pytest.approx(tuple(expected), abs=0.03)


def test_arms_are_resampled_independently() -> None:
    """Drawn together, equal arms would always tie. Drawn apart, one of 16 resamples holds the best
    run of one arm twice and the worst of the other: more than the 5 % beyond each end."""
    scores = np.array([[0.2], [0.8]])
    low, high = bootstrap(probability_of_improvement, scores, scores, confidence=0.9)
    assert (float(low), float(high)) == (0.0, 1.0)


def test_vector_statistics_get_an_interval_for_each_entry() -> None:
    scores = np.array([[0.2], [0.4], [0.9]])
    low, high = bootstrap(lambda s: performance_profile(s, np.array([0.1, 0.5, 0.95])), scores)
    assert low.tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert high.tolist() == pytest.approx([1.0, 1.0, 0.0])


def test_tasks_keep_their_mix() -> None:
    """Tasks that are constant leave no spread, however different they are from each other."""
    scores = np.tile([1.0, 0.0, 0.0, 0.0], (10, 1))
    for strata in ("runs", "tasks"):
        low, high = bootstrap(np.mean, scores, strata=strata)  # type: ignore[arg-type]
        assert (float(low), float(high)) == pytest.approx((0.25, 0.25))


def test_whole_runs_cover_where_tasks_share_the_luck_of_a_run() -> None:
    """A run's luck moves all its tasks: strata of tasks then cover far too rarely."""
    rng = np.random.default_rng(0)
    hits = {"runs": 0, "tasks": 0}
    for trial in range(200):
        scores = rng.normal(size=(16, 1)) + 0.1 * rng.normal(size=(16, 6))
        for strata in hits:
            low, high = bootstrap(
                np.mean,  # type: ignore[arg-type]
                scores,
                strata=strata,  # type: ignore[arg-type]
                resamples=200,
                seed=trial,
            )
            hits[strata] += bool(low <= 0 <= high)
    assert 0.86 <= hits["runs"] / 200 <= 0.98
    assert hits["tasks"] / 200 < 0.75


def test_strata_of_tasks_cover_where_every_score_is_a_run() -> None:
    rng = np.random.default_rng(5)
    truth = iqm(np.concatenate([rng.normal(m, 1, 200_000) for m in (0.0, 2.0)]))
    hits = 0
    for trial in range(150):
        scores = rng.normal([0.0, 2.0], 1, (25, 2))
        low, high = bootstrap(iqm, scores, strata="tasks", resamples=200, seed=trial)
        hits += bool(low <= truth <= high)
    assert 0.87 <= hits / 150 <= 0.99


def test_paired_difference_worked_by_hand() -> None:
    found = paired_difference(np.array([0.6, 0.7, 0.9]), np.array([0.5, 0.5, 0.6]))
    assert found.pairs == 3
    assert found.mean == pytest.approx(0.2)
    assert found.deviation == pytest.approx(0.1)
    half = 4.302653 * 0.1 / 3**0.5
    assert found.interval == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    assert found.p_value == pytest.approx(2 / 8)  # only all plus and all minus are as extreme
    alone = paired_difference(np.array([0.6]), np.array([0.5]))
    assert (alone.interval, alone.deviation, alone.p_value) == (None, None, 1.0)


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=7))
def test_sign_flips_are_enumerated(differences: list[int]) -> None:
    total, count = abs(sum(differences)), 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        count += abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= total
    values = np.array(differences) / 8
    found = paired_difference(values, np.zeros(len(values)))
    assert found.p_value == pytest.approx(count / 2 ** len(differences))


def test_many_pairs_are_sampled_and_agree_with_the_exact_law() -> None:
    """Twenty differences of one size: the flips are a binomial, 15 or more plus signs of 20, or as
    many minus signs, have probability 2 * 0.020695."""
    values = np.array([1.0] * 15 + [-1.0] * 5)
    found = paired_difference(values, np.zeros(20))
    assert found.p_value == pytest.approx(0.04139, abs=0.005)


def test_differences_and_flips_agree_with_scipy() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=9), rng.normal(size=9)
    found = paired_difference(x, y)
    interval = stats.ttest_rel(x, y).confidence_interval()
    assert found.interval == pytest.approx((interval.low, interval.high))
    reference = stats.permutation_test(
        (x, y), lambda a, b: np.mean(a - b), permutation_type="samples"
    )
    assert found.p_value == pytest.approx(reference.pvalue)
