"""Three actions: the flow against finite differences, its closed forms, GRPO against the flow."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.theory.enumeration import expected_direction
from untwine.errors import ConfigError
from untwine.theory.advantage import NORMALISERS, Normaliser, slope
from untwine.theory.squeezing import (
    GOOD,
    MILD,
    TABULAR,
    check_gram,
    flow,
    logit_gradient,
    odds_below_which_total_rises,
    overlaps,
    random_grams,
    replicator_velocity,
    sampled,
    simplex_grid,
    softmax,
    study,
    velocity,
)

weights = st.floats(0.01, 1.0)


@st.composite
def policies(draw: st.DrawFn) -> np.ndarray:
    raw = np.array([draw(weights) for _ in range(3)])
    return raw / raw.sum()


def test_velocity_is_gradient_ascent_in_feature_space() -> None:
    rng = np.random.default_rng(0)
    features, theta = rng.normal(size=(3, 2)), rng.normal(size=2)
    risks = np.array([0.0, 0.7, 0.2])

    def probabilities(at: np.ndarray) -> np.ndarray:
        raw = [math.exp(z) for z in features @ at]
        return np.array(raw) / sum(raw)

    gradient = np.zeros(2)
    for i in range(2):
        bump = np.zeros(2)
        bump[i] = 1e-5
        difference = probabilities(theta + bump) - probabilities(theta - bump)
        gradient[i] = -risks @ difference / 2e-5
    ahead, behind = probabilities(theta + 1e-5 * gradient), probabilities(theta - 1e-5 * gradient)
    found = velocity(probabilities(theta), risks, features @ features.T)
    assert found == pytest.approx((ahead - behind) / 2e-5, abs=1e-8)


def test_a_counter_example_by_hand() -> None:
    pi, risks = np.array([0.01, 0.30, 0.69]), np.array([0.0, 1.0, 0.01])
    # w = .3069, so dz/dt = .01 * .3069, .3 * (.3069 - 1), .69 * (.3069 - .01)
    assert logit_gradient(pi, risks) == pytest.approx([0.003069, -0.20793, 0.204861])
    mean = 0.01 * 0.003069 - 0.3 * 0.20793 + 0.69 * 0.204861
    assert velocity(pi, risks)[GOOD] == pytest.approx(0.01 * (0.003069 - mean))
    assert velocity(pi, risks)[GOOD] < 0  # the flawed mass rises


@given(policies(), st.floats(0.05, 1), st.floats(0.02, 0.98), st.integers(0, 10_000))
def test_probabilities_stay_a_distribution_and_the_return_rises(
    pi: np.ndarray, worst: float, ratio: float, seed: int
) -> None:
    risks, gram = np.array([0.0, worst, worst * ratio]), random_grams(1, seed)[0]
    speed = velocity(pi, risks, gram)
    assert speed.sum() == pytest.approx(0, abs=1e-12)
    assert speed @ risks <= 1e-12
    assert logit_gradient(pi, risks).sum() == pytest.approx(0, abs=1e-12)


@given(policies(), st.floats(0.02, 0.98))
def test_closed_form_tells_where_the_flawed_mass_rises(pi: np.ndarray, ratio: float) -> None:
    speed = velocity(pi, np.array([0.0, 1.0, ratio]))[GOOD]
    assume(abs(speed) > 1e-9)
    mass = 1 - pi[GOOD]
    bound = odds_below_which_total_rises(pi[1] / mass, ratio)
    assert (speed < 0) == (pi[GOOD] / mass < bound)


@given(policies(), st.floats(0.02, 0.98))
def test_the_flawed_mass_falls_where_good_is_not_less_likely_than_mild(
    pi: np.ndarray, ratio: float
) -> None:
    risks = np.array([0.0, 1.0, ratio])
    assert replicator_velocity(pi, risks)[GOOD] > 0
    assume(pi[GOOD] >= pi[MILD])
    assert velocity(pi, risks)[GOOD] > 0
    logits = logit_gradient(pi, risks)  # and the flow does not leave this set
    assert logits[GOOD] > logits[MILD]


def test_the_flow_ends_at_the_good_action() -> None:
    starts = np.array([[0.1, 0.35, 0.55], [0.02, 0.9, 0.08], [0.3, 0.3, 0.4]])
    path = flow(starts, np.array([0.0, 1.0, 0.05]), TABULAR, [0.0, 10.0, 30_000.0])
    assert path.sum(axis=-1) == pytest.approx(np.ones((3, 3)))
    assert (path[-1, :, GOOD] > 0.99).all()
    assert path[1, 0, GOOD] < path[0, 0, GOOD]


def test_the_clock_of_grpo_changes_the_speed_but_not_the_path() -> None:
    start, risks = np.array([[0.2, 0.3, 0.5]]), np.array([0.0, 0.5, 0.2])
    plain = flow(start, risks, TABULAR, [0.0, 7.5, 15.0])
    slower = flow(start, risks, TABULAR, [0.0, 10.0, 20.0], clock=(0.7, 4, "none"))
    assert slower == pytest.approx(plain, abs=1e-7)
    std = flow(start, risks, TABULAR, [0.0, 9.0], clock=(0.7, 4, "std"))[-1, 0]
    fine = flow(start, risks, TABULAR, np.linspace(0, 40, 4001))[:, 0]
    assert np.abs(fine - std).max(axis=1).min() < 5e-4


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_expected_grpo_is_the_gradient_times_the_slope(normaliser: Normaliser) -> None:
    pi, risks, success = np.array([0.2, 0.3, 0.5]), np.array([0.0, 0.5, 0.2]), 0.7
    exact = expected_direction(pi.tolist(), (success - risks).tolist(), 3, normaliser)
    factor = slope(success - pi @ risks, 3, normaliser)
    assert factor * logit_gradient(pi, risks) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_one_sampled_step_is_right_on_average(normaliser: Normaliser) -> None:
    pi, risks, success = np.array([0.2, 0.3, 0.5]), np.array([0.0, 0.5, 0.2]), 0.7
    gram, rng = overlaps(0.3, 0.5, -0.2), np.random.default_rng(0)
    path = sampled(pi, risks, gram, success, 3, normaliser, 1e-3, 1, 100_000, rng)
    moves = (np.log(path[1]) - np.log(path[0])) / 1e-3
    direction = expected_direction(pi.tolist(), (success - risks).tolist(), 3, normaliser)
    logits = gram @ direction
    error = moves.std(axis=0) / math.sqrt(len(moves))
    assert (np.abs(moves.mean(axis=0) - (logits - pi @ logits)) < 4 * error + 1e-3).all()


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_the_mean_over_seeds_follows_the_flow(normaliser: Normaliser) -> None:
    start, risks, rate, steps = np.array([0.2, 0.3, 0.5]), np.array([0.0, 0.6, 0.3]), 0.02, 500
    rng, gram = np.random.default_rng(3), overlaps(0.0, 0.4, 0.0)
    path = sampled(start, risks, gram, 0.8, 6, normaliser, rate, steps, 300, rng)
    times = np.arange(steps + 1) * rate
    exact = flow(start[None], risks, gram, times, clock=(0.8, 6, normaliser))[:, 0]
    error = path.std(axis=1) / math.sqrt(300)
    assert (np.abs(path.mean(axis=1) - exact) < 5 * error + 0.1 * rate).all()
    assert np.abs(exact[-1] - start).max() > 0.1  # it went somewhere


def test_grams_and_grids() -> None:
    assert check_gram(overlaps(0.1, 0.2, 0.3))[0, 2] == 0.2
    with pytest.raises(ConfigError, match="eigenvalue"):
        overlaps(0.9, 0.9, -0.9)
    with pytest.raises(ConfigError, match=r"between -1 and 1, not 1\.5"):
        overlaps(1.5, 0, 0)
    with pytest.raises(ConfigError, match="symmetric"):
        check_gram([[1, 0], [0, 1]])
    with pytest.raises(ConfigError, match="at least 4"):
        simplex_grid(3)
    cells = simplex_grid(10)
    assert len(cells) == 36
    assert cells.sum(axis=1) == pytest.approx(np.ones(36))
    assert softmax([800.0, 800.0]) == pytest.approx([0.5, 0.5])
    assert np.linalg.eigvalsh(random_grams(20, 0)).min() > -1e-12


def test_study_reports_counter_examples() -> None:
    numbers = study(TABULAR, [0.05, 0.9], 12, 100.0, 5, 0)
    assert json.loads(json.dumps(numbers)) == numbers
    low, high = numbers["ratios"]
    assert low["total_rises"] > 0.1 > high["total_rises"] == 0
    assert low["mild_rises"] > low["total_rises"]
    for row in (low, high):
        assert row["total_rises_where_good_most_likely"] == 0
        assert row["natural_gradient_total_rises"] == 0
        assert row["risk_weighted_rises"] == 0
    assert numbers["random_features"]["risk_weighted_rises"] == 0
    for row in numbers["sampled"]:
        gaps = [step["largest_gap"] for step in row["rows"]]
        assert gaps[-1] < gaps[0]
    with pytest.raises(ConfigError, match="between 0 and 1, not 1"):
        study(TABULAR, [1.0], 12, 100.0, 0, 0)
    with pytest.raises(ConfigError, match="horizon must be positive"):
        study(TABULAR, [0.5], 12, 0.0, 0, 0)
