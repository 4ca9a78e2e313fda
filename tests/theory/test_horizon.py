"""Several steps: against enumeration of all episodes, pairs of them, and finite differences."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from tests.theory.enumeration import advantages
from untwine.theory.advantage import NORMALISERS, Normaliser
from untwine.theory.horizon import (
    FLAWED,
    Tasks,
    Unit,
    detour,
    ends,
    fork,
    judge,
    mean_over,
    random_tasks,
    study,
    visits,
)

HORIZON = 3
TINY = random_tasks(1, 2, 2, HORIZON, 5)

Walk = tuple[float, float, list[tuple[int, int, int]]]


def walks(tasks: Tasks) -> Iterator[Walk]:
    """(probability, return, steps (t, s, a)) of every episode of the only task."""
    states = tasks.start_NS.shape[1]
    moves, policy = tasks.moves_NSAX[0], tasks.policy_NHSA[0]

    def go(chance: float, t: int, s: int, steps: list[tuple[int, int, int]]) -> Iterator[Walk]:
        for a in range(policy.shape[-1]):
            for x in range(states + 2):
                p = chance * float(policy[t, s, a] * moves[s, a, x])
                path = [*steps, (t, s, a)]
                if x >= states or t + 1 == len(policy):
                    yield p, float(x == states), path
                else:
                    yield from go(p, t + 1, x, path)

    for s in range(states):
        yield from go(float(tasks.start_NS[0, s]), 0, s, [])


def test_ends_and_visits_against_all_episodes() -> None:
    joint = np.zeros((HORIZON, 2, 2, 2, HORIZON + 1))
    visited = np.zeros((HORIZON, 2, 2))
    for chance, success, steps in walks(TINY):
        for place in steps:
            visited[place] += chance
            joint[(*place, int(success), len(steps))] += chance
    assert visits(TINY)[0] == pytest.approx(visited, abs=1e-14)
    assert ends(TINY)[0] == pytest.approx(joint / visited[..., None, None], abs=1e-12)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("unit", ["step", "episode"])
def test_expected_advantages_against_all_pairs_of_episodes(
    normaliser: Normaliser, unit: Unit
) -> None:
    every = list(walks(TINY))
    other = {won: sum(p for p, r, _ in every if r == won) for won in (0.0, 1.0)}
    total = np.zeros((HORIZON, 2, 2))
    weight = np.zeros((HORIZON, 2, 2))
    for chance, success, steps in every:
        scale = 1.0 if unit == "step" else 1 / len(steps)
        mean = sum(p * advantages([success, won], normaliser)[0] for won, p in other.items())
        for place in steps:
            total[place] += chance * mean * scale
            weight[place] += chance * scale
    found = judge(TINY, 2, normaliser, unit)
    assert (found.visit * found.weighted)[0] == pytest.approx(total, abs=1e-13)
    assert (found.visit * found.weight)[0] == pytest.approx(weight, abs=1e-13)
    chosen = np.random.default_rng(0).random((1, HORIZON, 2, 2)) < 0.5
    expected = total[chosen[0]].sum() / weight[chosen[0]].sum()
    assert mean_over(found, chosen)[0] == pytest.approx(expected)


def test_gradient_is_that_of_the_success_probability() -> None:
    logits = np.log(TINY.policy_NHSA)

    def success(shifted: np.ndarray) -> float:
        weights = np.exp(shifted)
        policy = weights / weights.sum(axis=-1, keepdims=True)
        shifted_task = Tasks(TINY.moves_NSAX, policy, TINY.start_NS)
        return sum(p * r for p, r, _ in walks(shifted_task))

    found = judge(TINY, 4, "none", "step").gradient
    for place in np.ndindex(*logits.shape):
        bump = np.zeros_like(logits)
        bump[place] = 1e-5
        slope = (success(logits + bump) - success(logits - bump)) / 2e-5
        assert found[place] == pytest.approx(0.75 * slope, abs=1e-9)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_with_equal_steps_the_gradient_has_the_sign_of_the_true_advantage(
    normaliser: Normaliser,
) -> None:
    found = judge(random_tasks(200, 3, 3, 5, 1), 4, normaliser, "step")
    clear = (np.abs(found.truth) > 1e-7) & (found.visit > 1e-9)
    assert clear.sum() > 5000
    assert (np.sign(found.gradient) == np.sign(found.truth))[clear].all()


def test_episode_weights_balance_to_nothing() -> None:
    found = judge(random_tasks(50, 3, 3, 5, 2), 8, "std", "episode")
    everything = np.ones_like(found.visit, dtype=np.bool_)
    assert mean_over(found, everything) == pytest.approx(np.zeros(50), abs=1e-12)
    per_step = judge(random_tasks(50, 3, 3, 5, 2), 8, "std", "step")
    assert np.abs(mean_over(per_step, everything)).min() > 1e-4


def test_counter_examples_by_hand() -> None:
    found = judge(fork(), 8, "none", "step")
    flawed = (found.truth < -FLAWED) & (found.visit > 0)
    assert found.truth[flawed] == pytest.approx([-0.1])
    assert mean_over(found, flawed)[0] == pytest.approx(7 / 8 * (0.8 - 0.45))
    assert found.gradient[flawed] == pytest.approx([7 / 8 * 0.25 * -0.1])

    step, episode = (judge(detour(), 8, "none", unit) for unit in ("step", "episode"))
    flawed = (step.truth < -FLAWED) & (step.visit > 0)
    assert step.truth[flawed] == pytest.approx([-0.025])
    assert step.gradient[flawed] == pytest.approx([7 / 8 * 0.5 * -0.025])
    success, failure = 7 / 8 * (1 - 0.525), -7 / 8 * 0.525
    sound = 0.55 * success + 0.45 * failure
    slow = 0.5 * success + 0.5 * failure / 3
    assert episode.gradient[flawed] == pytest.approx([0.5 * (slow - (sound + slow) / 2)])
    assert episode.gradient[flawed] > 0


def test_study_counts_both_kinds_of_counter_example() -> None:
    numbers = study(300, 3, 3, 5, 8, 0)
    assert json.loads(json.dumps(numbers)) == numbers
    for row in numbers["rows"]:
        assert (row["flawed_places_pushed_up"] > 0) == (row["unit"] == "episode")
        assert row["mean_over_flawed"] < 0 < row["mean_over_good"]
    assert numbers["examples"]["fork, step"]["mean_over_flawed"] > 0
