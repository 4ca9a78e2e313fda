"""Calibration measures against numbers worked by hand and plain loops."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import make_group
from untwine.credit.grpo import grpo
from untwine.diagnose.calibration import (
    Judged,
    calibrate,
    lemma_advantage,
    mean_ranks,
    rank_correlation,
    sign_agreement,
    variance,
)

# Two groups. Episode 0 has two flawed steps and a good one, episode 1 a good and a neutral one,
# episode 2 (other group) a flawed one that got a positive estimate.
ESTIMATES = [-1.0, -0.5, 0.25, 0.75, 0.0, 0.5]
VERDICTS = [-1, -1, 1, 1, 0, -1]
ADVANTAGES = [-0.4, -0.2, 0.1, 0.3, 0.0, -0.1]
WEIGHTS = [1.0, 1.0, 2.0, 2.0, 4.0, 3.0]
GROUPS = [7, 7, 7, 7, 7, 9]
EPISODES = [0, 0, 0, 1, 1, 2]


def judged() -> Judged:
    return Judged.of(
        ESTIMATES,
        VERDICTS,
        advantages=ADVANTAGES,
        weights=WEIGHTS,
        groups=GROUPS,
        episodes=EPISODES,
    )


def test_measures_worked_by_hand() -> None:
    found = calibrate(judged())
    assert (found["steps"], found["flawed"], found["good"]) == (6, 3, 2)
    # (-1 - 0.5 + 3 * 0.5) / 5 and (2 * 0.25 + 2 * 0.75) / 4
    assert found["flawed_mean"]["value"] == pytest.approx(0.0)
    assert found["good_mean"]["value"] == pytest.approx(0.5)
    assert found["difference"]["value"] == pytest.approx(0.5)
    # episodes: flawed -0.75 and 0.5, good 0.25 and 0.75
    by_episode = found["by_episode"]
    assert by_episode["flawed_mean"]["value"] == pytest.approx(-0.125)
    assert by_episode["good_mean"]["value"] == pytest.approx(0.5)
    assert by_episode["difference"]["value"] == pytest.approx(0.625)
    assert found["miscalibration"]["value"] == pytest.approx(3 / 5)
    assert found["sign_agreement"] == pytest.approx(6 / 9)
    # sum of w a: -0.4 - 0.2 + 0.2 + 0.6 - 0.3 = -0.1, over 13
    assert found["mean_advantage"]["value"] == pytest.approx(-0.1 / 13)
    assert found["mean_estimate"]["value"] == pytest.approx(2.0 / 13)
    # sum of w e^2: 1 + 0.25 + 0.125 + 1.125 + 0 + 0.75 = 3.25
    assert found["variance"] == pytest.approx(3.25 / 13 - (2 / 13) ** 2)


def test_the_interval_draws_whole_groups() -> None:
    """With two groups a resample is one of them twice (a quarter each) or both (a half)."""
    found = calibrate(judged(), resamples=4000)
    # flawed steps: group 7 alone -0.75, both 0.0, group 9 alone 0.5
    assert found["flawed_mean"]["interval"] == pytest.approx((-0.75, 0.5))
    assert found["by_episode"]["flawed_mean"]["interval"] == pytest.approx((-0.75, 0.5))
    assert found["miscalibration"]["interval"] == pytest.approx((0.0, 1.0))
    # good steps are in one group only: where it is not drawn there is nothing to compare
    assert found["good_mean"]["interval"] == pytest.approx((0.5, 0.5))
    assert found["difference"]["interval"] == pytest.approx((0.5, 1.25))


def test_interval_of_many_groups_is_that_of_the_mean() -> None:
    """One step per group: the standard error is known, sigma / sqrt(n)."""
    rng = random.Random(0)
    values = [rng.gauss(-0.3, 1.0) for _ in range(400)]
    low, high = calibrate(Judged.of(values, [-1] * 400))["flawed_mean"]["interval"]
    error = float(np.std(values)) / math.sqrt(400)
    assert low == pytest.approx(float(np.mean(values)) - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(float(np.mean(values)) + 1.96 * error, abs=0.3 * error)


def test_one_group_has_no_interval_and_no_flawed_step_no_mean() -> None:
    found = calibrate(Judged.of([1.0, 2.0], [1, 0], groups=[0, 0]))
    assert found["good_mean"] == {"value": 1.0, "interval": None}
    assert found["flawed_mean"] is None
    assert found["difference"] is None
    assert found["miscalibration"] is None
    assert found["rank_correlation"] is None
    assert found["mean_advantage"] is None


def plain_spearman(x: list[float], y: list[float]) -> float | None:
    """By the definition: Pearson's correlation of ranks, ties sharing the mean of theirs."""

    def ranks(values: list[float]) -> list[float]:
        return [
            sum(v < value for v in values) + (1 + sum(v == value for v in values)) / 2
            for value in values
        ]

    a, b = ranks(x), ranks(y)
    n = len(a)
    mean = (n + 1) / 2
    covariance = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
    scale = math.sqrt(sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b))
    return covariance / scale if scale else None


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(-2, 2), st.integers(-2, 2), st.integers(1, 4)),
        min_size=1,
        max_size=15,
    )
)
def test_rank_correlation_counts_a_step_as_often_as_it_weighs(
    rows: list[tuple[int, int, int]],
) -> None:
    x, y, w = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    found = rank_correlation(x, y, w)
    repeated = [(float(a), float(b)) for a, b, times in rows for _ in range(times)]
    expected = plain_spearman([a for a, _ in repeated], [b for _, b in repeated])
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))
    one_sided = np.concatenate([[r] * int(t) for r, t in zip(mean_ranks(x, w), w, strict=True)])
    plain = [sum(a < v for a, _ in repeated) + (1 + sum(a == v for a, _ in repeated)) / 2
             for v, _ in repeated]  # fmt: skip
    assert one_sided.tolist() == pytest.approx(plain)


def test_rank_correlation_of_known_values() -> None:
    one = np.ones(5)
    x = np.array([106.0, 100, 86, 101, 99])
    assert rank_correlation(x, x**3, one) == pytest.approx(1.0)
    assert rank_correlation(x, -x, one) == pytest.approx(-1.0)
    # squared rank differences 1, 1, 0, 1, 1 give 1 - 6 * 4 / (5 * 24)
    y = np.array([4.0, 4.5, 1, 2.5, 2.9])
    x = np.array([5.0, 4, 1, 3, 2])
    assert rank_correlation(x, y, one) == pytest.approx(1 - 6 * 4 / 120)
    assert rank_correlation(x, np.array([1.0, 2, np.nan, 3, 4]), one) is None


def test_an_estimate_of_zero_agrees_with_nothing() -> None:
    assert sign_agreement(Judged.of([0.0, 0.0, 1.0], [1, -1, 1])) == pytest.approx(1 / 3)
    assert sign_agreement(Judged.of([1.0], [0])) is None
    assert variance(np.array([1.0, 3.0]), np.array([3.0, 1.0])) == pytest.approx(0.75)


def test_lists_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        Judged.of([1.0, 2.0], [1])


def test_the_lemma_on_a_bandit() -> None:
    """One state, three actions with known success rates: A* of each, and what a group of returns
    gives on average when the action is taken with another frequency."""
    success, policy = {"a": 0.9, "b": 0.4, "c": 0.2}, {"a": 0.5, "b": 0.3, "c": 0.2}
    value = sum(policy[k] * success[k] for k in policy)
    advantage = success["b"] - value
    others = (policy["a"] * success["a"] + policy["c"] * success["c"]) / 0.7
    risk = others - success["b"]
    assert advantage == pytest.approx(-risk * (1 - 0.3))
    same, rarer, certain = lemma_advantage(
        np.array([advantage] * 3), np.array([0.3, 0.3, 1.0]), np.array([0.3, 0.1, 0.5])
    )
    assert same == pytest.approx(advantage)
    assert rarer == pytest.approx(-risk * 0.9)
    assert certain == 0.0


def test_group_returns_follow_the_lemma_on_average() -> None:
    """Exact expectation of R - mean R over all groups of three episodes of a two-action bandit, by
    enumeration. A baseline that holds the episode itself shrinks it by (G - 1) / G."""
    q, p_flawed, p_other = 0.25, 0.2, 0.7
    expected, chance = 0.0, 0.0
    outcomes = [
        (flawed, won, (q if flawed else 1 - q) * (rate if won else 1 - rate))
        for flawed, rate in ((True, p_flawed), (False, p_other))
        for won in (True, False)
    ]
    for first in outcomes:
        for second in outcomes:
            for third in outcomes:
                weight = first[2] * second[2] * third[2]
                mean = (first[1] + second[1] + third[1]) / 3
                if first[0]:
                    expected += weight * (first[1] - mean)
                    chance += weight
    value = q * p_flawed + (1 - q) * p_other
    (predicted,) = lemma_advantage(np.array([p_flawed - value]), np.array([q]), np.array([q]))
    assert expected / chance == pytest.approx(2 / 3 * predicted)
    assert predicted == pytest.approx(-(p_other - p_flawed) * (1 - q))


# A chain of bandits: at place k the flawed action has probability Q[k] and costs R[k], wherever
# else the episode goes; the return is 1 with what is left of .9.
Q, R = (0.1, 0.4, 0.8), (0.3, 0.15, 0.25)
MEMBERS = 4


def play_chain(groups: int, rng: random.Random) -> tuple[Judged, list[int]]:
    """Judged steps of GRPO without the deviation, and the place of each."""
    estimates: list[float] = []
    flawed_N: list[bool] = []
    places: list[int] = []
    for _ in range(groups):
        chosen = [[rng.random() < q for q in Q] for _ in range(MEMBERS)]
        chances = [0.9 - sum(r for r, bad in zip(R, row, strict=True) if bad) for row in chosen]
        returns = [float(rng.random() < p) for p in chances]
        for row, credit in zip(
            chosen, grpo(make_group(returns, [len(Q)] * MEMBERS), normalise="none"), strict=True
        ):
            estimates += [a for a in credit if a is not None]
            flawed_N += row
            places += range(len(Q))
    advantages = [
        -R[k] * (1 - Q[k]) if bad else R[k] * Q[k] for k, bad in zip(places, flawed_N, strict=True)
    ]
    judged = Judged.of(
        estimates,
        [-1 if bad else 1 for bad in flawed_N],
        advantages=advantages,
        groups=[n // (MEMBERS * len(Q)) for n in range(len(estimates))],
        episodes=[n // len(Q) for n in range(len(estimates))],
    )
    return judged, places


def test_calibration_on_a_chain_of_bandits_follows_the_lemma() -> None:
    """The measured mean over flawed steps is -r (1 - q) of each place, shrunk by (G - 1) / G since
    the baseline holds the episode itself; 95 % intervals hold that nearly always."""
    held = total = 0
    for seed in range(15):
        judged, places = play_chain(150, random.Random(seed))
        for k in range(len(Q)):
            here = judged.where(np.array(places) == k)
            found = calibrate(here, resamples=400)["flawed_mean"]
            exact = -R[k] * (1 - Q[k]) * (MEMBERS - 1) / MEMBERS
            assert found["value"] < 0
            held += found["interval"][0] <= exact <= found["interval"][1]
            total += 1
            (lemma,) = lemma_advantage(
                np.array([-R[k] * (1 - Q[k])]), np.array([Q[k]]), np.array([Q[k]])
            )
            assert lemma == pytest.approx(-R[k] * (1 - Q[k]))
    assert total == 45
    assert held >= 39


def test_measures_on_a_chain_of_bandits_with_perfect_estimates() -> None:
    judged, _ = play_chain(200, random.Random(0))
    perfect = judged.of_advantages()
    found = calibrate(perfect, resamples=100)
    assert found["rank_correlation"] == pytest.approx(1.0)
    assert found["sign_agreement"] == 1.0
    assert found["miscalibration"]["value"] == 0.0
    assert found["mean_advantage"]["value"] == pytest.approx(0.0, abs=0.02)
    noisy = calibrate(judged, resamples=100)
    assert 0 < noisy["rank_correlation"] < 0.5
    assert 0.2 < noisy["miscalibration"]["value"] < 0.6
