"""Betting bounds against their definition, and their promise against simulation."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untwine.diagnose.betting import evidence, mean_bounds

ERROR = 0.05


def plain_capitals(x: list[float], m: float, planned: int) -> tuple[float, float]:
    """K+ and K- by the definition, value after value."""
    above = below = 1.0
    total, squares, variance = 0.5, 0.25, 0.25
    for i, value in enumerate(x, start=1):
        bet = math.sqrt(2 * math.log(2 / ERROR) / (planned * variance))
        above *= 1 + (min(bet, 0.5 / m) if m > 0 else bet) * (value - m)
        below *= 1 - (min(bet, 0.5 / (1 - m)) if m < 1 else bet) * (value - m)
        total += value
        squares += (value - total / (i + 1)) ** 2
        variance = squares / (i + 1)
    return above, below


@settings(max_examples=40, deadline=None)
@given(x=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=60), planned=st.integers(1, 200))
def test_bounds_enclose_the_means_that_no_gambler_refutes(x: list[float], planned: int) -> None:
    low, high = mean_bounds(x, 0, 1, error=ERROR, planned=planned)
    assert 0 <= low <= 1
    assert 0 <= high <= 1
    for k in range(201):
        m = k / 200
        above, below = plain_capitals(x, m, planned)
        if above < 0.999 * 2 / ERROR:
            assert m >= low - 1e-9
        elif above > 1.001 * 2 / ERROR:
            assert m <= low + 1e-9
        if below < 0.999 * 2 / ERROR:
            assert m <= high + 1e-9
        elif below > 1.001 * 2 / ERROR:
            assert m >= high - 1e-9


def test_evidence_is_one_over_the_capital() -> None:
    x = [0.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    above, below = plain_capitals(x, 0.3, 20)
    values = [4 * v - 1 for v in x]  # the same on [-1, 3]
    at_most, at_least = evidence(values, -1, 3, 4 * 0.3 - 1, error=ERROR, planned=20)
    assert at_most == pytest.approx(1 / above)
    assert below < 1
    assert at_least == 1.0


def test_scale_and_shift_change_nothing() -> None:
    rng = random.Random(0)
    x = [rng.random() for _ in range(50)]
    low, high = mean_bounds(x, 0, 1, error=ERROR, planned=64)
    wide = mean_bounds([10 * v - 3 for v in x], -3, 7, error=ERROR, planned=64)
    assert wide == pytest.approx((10 * low - 3, 10 * high - 3), abs=1e-9)


def test_without_values_or_room_nothing_is_claimed() -> None:
    assert mean_bounds([], -1, 1, error=ERROR, planned=8) == (-1, 1)
    assert mean_bounds([], 0.0, 0.0, error=ERROR, planned=8) == (0.0, 0.0)
    with pytest.raises(ValueError, match="must lie in"):
        mean_bounds([0.0, 2.0], 0, 1, error=ERROR, planned=8)


@pytest.mark.parametrize(
    ("after_action", "after_other", "share"),
    [(0.5, 0.5, 1.0), (0.1, 0.15, 1.0), (0.9, 0.5, 0.2), (0.0, 0.0, 1.0), (0.02, 0.3, 0.6)],
)
def test_coverage_when_one_stops_as_soon_as_the_verdict_is_clear(
    after_action: float, after_other: float, share: float
) -> None:
    """200 runs of the procedure in branching.py; with coverage 0.95 or more, 23 misses or more have
    a chance below 1e-4."""
    rng = random.Random(1)
    truth, delta, missed, narrow = share * (after_action - after_other), 0.05, 0, 0
    for _ in range(200):
        values: list[float] = []
        for look in (16, 32, 64, 128, 256):
            while len(values) < look:
                difference = (rng.random() < after_action) - (rng.random() < after_other)
                values.append(share * difference)
            low, high = mean_bounds(values, -share, share, error=ERROR, planned=256)
            if high < -delta or low > delta or (low >= -delta and high <= delta):
                break
        missed += not low <= truth <= high
        narrow += high - low < 0.32
    assert missed < 23
    assert narrow > 190  # a promise that is kept by saying nothing would be worth nothing
