"""Group advantages and their expectation, against enumeration and against the trainer's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import REF, make_episode, make_step
from tests.theory.enumeration import advantages, groups
from untwine.credit.grpo import grpo
from untwine.errors import ConfigError
from untwine.records import Group
from untwine.theory.advantage import (
    NORMALISERS,
    Normaliser,
    advantages_by_successes,
    as_normaliser,
    expected_advantages,
    group_advantages,
    slope,
)

normalisers = st.sampled_from(NORMALISERS)
shares = st.floats(0.01, 0.99)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=9), normalisers)
def test_group_advantages_are_those_that_training_uses(
    returns: list[float], normaliser: Normaliser
) -> None:
    episodes = tuple(make_episode(r, [make_step()], id=f"e{i}") for i, r in enumerate(returns))
    trained = [row[0] for row in grpo(Group(REF, episodes), normaliser)]
    assert group_advantages([returns], normaliser)[0] == pytest.approx(trained, abs=1e-9)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("value", [0.1, 0.5, 0.85])
def test_expected_advantages_against_all_groups(
    value: float, size: int, normaliser: Normaliser
) -> None:
    found = expected_advantages(value, size, normaliser)
    for own in (0, 1):
        expected = sum(
            chance * advantages([float(own), *others], normaliser)[0]
            for chance, _, others in groups([1 - value, value], [0.0, 1.0], size - 1)
        )
        assert float(found[own]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_advantages_by_successes_are_those_of_a_group(normaliser: Normaliser) -> None:
    failure, success = advantages_by_successes(4, normaliser)
    for s in range(1, 4):
        group = advantages([1.0] * s + [0.0] * (4 - s), normaliser)
        assert (success[s], failure[s]) == pytest.approx((group[0], group[-1]))
    assert failure[0] == success[4] == failure[4] == success[0] == 0


def test_slope_by_hand() -> None:
    values = np.linspace(0.05, 0.95, 7)
    assert slope(values, 5, "none") == pytest.approx(np.full(7, 0.8))
    # a pair that differs has the advantages +-1/sqrt 2, whatever V
    assert slope(values, 2, "std") == pytest.approx(np.full(7, 2**-0.5), abs=1e-5)
    assert slope(values, 1000, "std") == pytest.approx(1 / np.sqrt(values * (1 - values)), rel=0.02)


@given(shares, st.integers(2, 40), normalisers)
def test_slope_is_positive_and_advantages_average_to_nothing(
    value: float, size: int, normaliser: Normaliser
) -> None:
    assert slope(value, size, normaliser) > 0
    failure, success = expected_advantages(value, size, normaliser)
    assert value * success + (1 - value) * failure == pytest.approx(0, abs=1e-9)


@settings(max_examples=30)
@given(shares, st.integers(2, 60))
def test_small_groups_underestimate_what_a_large_group_gives(value: float, size: int) -> None:
    assert slope(value, size, "std") * np.sqrt(value * (1 - value)) < 1


def test_refuses_what_is_no_group_and_no_normaliser() -> None:
    with pytest.raises(ConfigError, match="between 2 and 1000, not 1"):
        slope(0.5, 1, "none")
    with pytest.raises(ConfigError, match="Did you mean 'std'"):
        as_normaliser("sdt")
    assert as_normaliser("none") == "none"
