"""The integrator, against solutions that are known."""

from __future__ import annotations

import numpy as np
import pytest

from untwine.theory.flow import integrate


def test_logistic_growth_of_many_starts() -> None:
    start = np.array([[0.01, 0.3], [0.9, 0.999]])
    times = np.array([0.0, 0.1, 1.0, 5.0, 20.0])
    path = integrate(lambda y: y * (1 - y), start, times)
    odds = start / (1 - start) * np.exp(times)[:, None, None]
    assert path.shape == (5, 2, 2)
    assert path == pytest.approx(odds / (1 + odds), abs=2e-8)
    assert (path[0] == start).all()


def test_rotation_keeps_its_radius() -> None:
    path = integrate(lambda y: np.array([-y[1], y[0]]), [1.0, 0.0], np.linspace(0, 20, 41))
    angle = np.linspace(0, 20, 41)
    assert path == pytest.approx(np.stack([np.cos(angle), np.sin(angle)], axis=1), abs=2e-7)


def test_a_smaller_tolerance_is_nearer() -> None:
    errors = [
        abs(integrate(lambda y: -(y**3), [1.0], [0.0, 4.0], rtol=tol, atol=tol)[-1, 0] - 1 / 3)
        for tol in (1e-4, 1e-7, 1e-10)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_refuses_times_that_do_not_increase_and_what_blows_up() -> None:
    with pytest.raises(ValueError, match="increasing"):
        integrate(lambda y: y, [1.0], [0.0, 0.0])
    with pytest.raises(FloatingPointError), np.errstate(all="ignore"):
        integrate(lambda y: y * y, [1.0], [0.0, 2.0])
