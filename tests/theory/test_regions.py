"""Two states: finite differences, root finding, long flows, GRPO, and measured points."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.theory.enumeration import expected_direction
from untwine.errors import ConfigError
from untwine.theory.advantage import NORMALISERS, Normaliser
from untwine.theory.regions import (
    Point,
    TwoStates,
    judge_points,
    logit,
    read_points,
    sigmoid,
    square_grid,
    study,
    time_near_one,
)

MODEL = TwoStates(risk=0.4, gain=0.3, overlap=0.6, success=0.9, success_other=0.2)


def test_velocity_is_gradient_ascent_in_feature_space() -> None:
    features = np.array([[1.0, 0.0], [0.6, 0.8]])  # unit vectors with inner product .6
    theta = np.array([0.7, -1.1])

    def gain(at: np.ndarray) -> float:
        q, other = (1 / (1 + math.exp(-z)) for z in features @ at)
        return 0.3 * other - 0.4 * q

    gradient = [(gain(theta + e) - gain(theta - e)) / 2e-5 for e in 1e-5 * np.eye(2)]
    found = MODEL.logit_velocity(features @ theta)
    assert found == pytest.approx(features @ gradient, abs=1e-9)


def test_velocity_by_hand() -> None:
    found = MODEL.logit_velocity(logit([[0.5, 0.2]]))
    # corrections .4 * .25 = .1 and .3 * .16 = .048
    assert found == pytest.approx(np.array([[-0.1 + 0.6 * 0.048, 0.048 - 0.6 * 0.1]]))


@settings(deadline=None)
@given(st.floats(0.02, 0.98), st.floats(0.1, 1), st.floats(0.1, 1), st.floats(0, 1))
def test_boundary_is_where_root_finding_says(
    other: float, risk: float, gain: float, overlap: float
) -> None:
    model = TwoStates(risk, gain, overlap, 1.0, 0.0)
    low, high = (float(x) for x in model.boundary(other))

    def speed(q: float) -> float:
        return float(model.logit_velocity(logit([q, other]))[0])

    if math.isnan(low):
        assert speed(0.5) > 0  # where the correction is strongest
        return
    assert low + high == pytest.approx(1)
    if high - low < 1e-3 or high > 1 - 1e-9:
        return
    below, above = 0.5, 1 - 1e-12
    for _ in range(80):
        middle = (below + above) / 2
        below, above = (middle, above) if speed(middle) < 0 else (below, middle)
    assert high == pytest.approx(below, abs=1e-7)
    assert speed((1 + high) / 2) > 0 > speed(0.5)
    assert speed(low / 2) > 0  # low q is lifted as well


def test_every_flow_ends_well_but_not_soon() -> None:
    model = TwoStates(0.3, 0.3, 0.5, 1.0, 0.0)
    path = model.flow(square_grid(6), [0.0, 1.0, 1e3, 1e6])
    assert (path[-1, :, 0] < 0.01).all()
    assert (path[-1, :, 1] > 0.99).all()
    difference = logit(path[:3]) @ [1.0, -1.0]
    assert (np.diff(difference, axis=0) < 0).all()
    slow = TwoStates(0.3, 0.3, 0.95, 1.0, 0.0).flow([[0.9, 0.5]], [0.0, 1e3])
    assert slow[-1, 0, 0] > 0.99


def test_without_overlap_q_follows_its_own_closed_form() -> None:
    # dz/dt = -r q (1 - q) means d(z + 2 sinh z)/dt = ... : z' (2 + e^z + e^-z) = -r
    path = TwoStates(0.5, 0.3, 0.0, 1.0, 0.0).flow([[0.8, 0.4]], [0.0, 3.0, 30.0])
    z = logit(path[:, 0, 0])
    level = 2 * z + np.exp(z) - np.exp(-z)
    assert level == pytest.approx(level[0] - 0.5 * np.array([0.0, 3.0, 30.0]), abs=1e-6)


@pytest.mark.parametrize(("odds", "other"), [(1e4, 1e3), (1e6, 3e5), (2e4, 1e5)])
def test_peak_odds_against_the_flow(odds: float, other: float) -> None:
    model = TwoStates(0.3, 0.3, 0.8, 1.0, 0.0)
    start = [[odds / (1 + odds), other / (1 + other)]]
    q = model.flow(start, np.r_[0.0, np.geomspace(1, 1e9, 2000)])[:, 0, 0]
    assert float((q / (1 - q)).max()) == pytest.approx(
        float(model.peak_odds(odds, other)), rel=2e-3
    )


def test_peak_odds_at_the_ends_of_kappa() -> None:
    assert TwoStates(0.3, 0.3, 0.0).peak_odds(50.0, 3.0) == 50
    assert np.isnan(TwoStates(0.3, 0.3, 1.0).peak_odds(50.0, 3.0))


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_expected_grpo_against_all_groups(normaliser: Normaliser) -> None:
    q, other = 0.7, 0.4
    first = expected_direction([q, 1 - q], [0.9 - 0.4, 0.9], 3, normaliser)[0]
    second = expected_direction([other, 1 - other], [0.2 + 0.3, 0.2], 3, normaliser)[0]
    found = MODEL.logit_velocity(logit([q, other]), 3, normaliser)
    assert found == pytest.approx([first + 0.6 * second, second + 0.6 * first], abs=1e-12)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_the_mean_over_seeds_follows_the_flow(normaliser: Normaliser) -> None:
    rate, steps, start, rng = 0.02, 500, np.array([0.8, 0.4]), np.random.default_rng(1)
    path = MODEL.sampled(start, 6, normaliser, rate, steps, 300, rng)
    exact = MODEL.flow(start[None], np.arange(steps + 1) * rate, 6, normaliser)[:, 0]
    error = path.std(axis=1) / math.sqrt(300)
    assert (np.abs(path.mean(axis=1) - exact) < 5 * error + 0.1 * rate).all()
    assert np.abs(exact[-1] - start).max() > 0.05


def test_sigmoid_and_logit_are_inverse_and_do_not_overflow() -> None:
    z = np.array([-30.0, -1.0, 0.0, 2.0])
    assert logit(sigmoid(z)) == pytest.approx(z, abs=1e-3)
    assert sigmoid([-1e4, 1e4]) == pytest.approx([0.0, 1.0])


def test_time_near_one_by_hand() -> None:
    path = np.array([0.5, 0.96, 0.99, 0.97, 0.3])[:, None, None].repeat(2, axis=2)
    assert time_near_one(path, np.array([0.0, 1.0, 3.0, 4.0, 5.0])) == pytest.approx([4.0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"risk": 0.0}, "risk must lie in"),
        ({"gain": 1.2}, "gain must lie in"),
        ({"overlap": -0.1}, "overlap must lie between 0 and 1"),
        ({"success": 0.2}, "must lie between risk"),
        ({"success_other": 0.8}, "must not exceed 1"),
    ],
)
def test_refuses_impossible_models(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TwoStates(**settings)


def test_points(tmp_path: Path) -> None:
    file = tmp_path / "points.jsonl"
    file.write_text(
        '{"q": 0.9, "push": 0.05, "label": "a"}\n\n{"q": 0.5, "push": 0, "q_other": 1}\n'
    )
    points = read_points(file)
    assert points == [Point(0.9, 0.05, None, "a"), Point(0.5, 0.0, 1.0, "")]
    # corrections .4 * .09 = .036 and .4 * .25 = .1
    found = judge_points(MODEL, [*points, Point(0.1, 0.02), Point(0.1, 0.04)])
    assert found == {
        "points": 4, "lifted": 2, "lifted_high": 1, "high": 1, "lifted_low": 1, "low": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no points"),
        ("{", "points.jsonl:1 is not JSON"),
        ("\n[1]", "points.jsonl:2 must be a JSON object"),
        ('{"q": 0.1}', "has no 'push'"),
        ('{"q": "x", "push": 1}', "q must be a finite number"),
        ('{"q": 0.5, "push": NaN}', "push must be a finite number"),
        ('{"q": true, "push": 1}', "q must be a finite number"),
        ('{"q": 1.5, "push": 1}', "q is a probability, so it cannot be 1.5"),
        ('{"q": 0.5, "push": 1, "q_other": -1}', "q_other is a probability"),
    ],
)
def test_refuses_bad_points(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "points.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_points(file)
    with pytest.raises(ConfigError, match="cannot read the points"):
        read_points(tmp_path / "nothing.jsonl")


def coupling_file(run: Path, rows: list[dict[str, object]]) -> Path:
    file = run / "diagnose" / "coupling.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"sample_list": rows}))
    return file


def test_points_of_a_run(tmp_path: Path) -> None:
    row: dict[str, object] = {"verdict": None, "kind": None, "weight": 1.0, "push": 0.01}
    rows = [
        {**row, "verdict": "flawed", "kind": "undo", "logprob": math.log(0.75)},
        {**row, "verdict": "good", "kind": "progress", "logprob": -1.0},
        {**row, "verdict": "flawed", "kind": "repeat", "logprob": 0.0, "push": None},
        {**row, "weight": -1.0, "logprob": -2.0},
    ]
    file = coupling_file(tmp_path, rows)
    (point,) = read_points(tmp_path)
    assert point == Point(pytest.approx(0.75), 0.01, None, "undo")
    assert read_points(file) == [point]
    coupling_file(tmp_path, rows[3:])  # without labels, those with a negative weight
    assert read_points(file) == [Point(math.exp(-2.0), 0.01, None, "")]
    coupling_file(tmp_path, rows[1:2])
    with pytest.raises(ConfigError, match="no flawed sample"):
        read_points(tmp_path)
    coupling_file(tmp_path, [{k: v for k, v in rows[0].items() if k != "push"}])
    with pytest.raises(ConfigError, match=r"no coupling file of this version .* again"):
        read_points(tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match=r"run `untwine diagnose coupling .*` first"):
        read_points(tmp_path)


def test_study_tells_danger_from_safety() -> None:
    numbers = study(TwoStates(gain=0.6), 8, 1000.0, 8, 0)
    assert json.loads(json.dumps(numbers)) == numbers
    rows = {(row["gain"], row["overlap"]): row for row in numbers["rows"]}
    assert rows[0.6, 0.0]["rises_at_start"] == 0
    assert rows[0.6, 0.9]["near_one_from_high"] > rows[0.6, 0.3]["near_one_from_high"]
    assert rows[0.6, 0.9]["near_one_from_low"] == 0 < rows[0.6, 0.99]["near_one_from_low"]
    assert all(row["difference_rises"] == 0 for row in numbers["rows"])
    with pytest.raises(ConfigError, match="horizon must be positive"):
        study(MODEL, 5, -1.0, 8, 0)
    with pytest.raises(ConfigError, match="at least 3"):
        square_grid(2)
