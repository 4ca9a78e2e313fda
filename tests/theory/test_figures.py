"""Figures: the same numbers give the same file, and labels cannot break one."""

from __future__ import annotations

from pathlib import Path

from untwine.theory.figures import draw_calibration, draw_regions, draw_squeezing
from untwine.theory.horizon import random_tasks
from untwine.theory.regions import Point, TwoStates
from untwine.theory.squeezing import TABULAR


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    tasks = random_tasks(20, 2, 2, 3, 0)
    for path in (tmp_path / "a.svg", tmp_path / "b.svg"):
        draw_calibration(path, [2, 4], 200, 0, tasks)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    draw_calibration(tmp_path / "c.svg", [2, 4], 200, 1, tasks)
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "c.svg").read_bytes()


def test_points_are_drawn_whatever_their_labels(tmp_path: Path) -> None:
    draw_regions(tmp_path / "bare.svg", TwoStates(), 20.0)
    labels = ["$\\frac{$", "_hidden", "<b>&", "", "repeat", "undo", "move"]
    points = [Point(0.1 * i, 0.02 * i - 0.01, 0.5, label) for i, label in enumerate(labels)]
    draw_regions(tmp_path / "points.svg", TwoStates(), 20.0, points)
    assert (tmp_path / "points.svg").read_bytes() != (tmp_path / "bare.svg").read_bytes()


def test_an_extreme_model_is_drawn(tmp_path: Path) -> None:
    draw_regions(tmp_path / "one.svg", TwoStates(0.1, 0.7, 1.0, 0.1, 0.3), 20.0)
    draw_squeezing(tmp_path / "two.png", TABULAR, [0.99], 0)
    assert (tmp_path / "two.png").stat().st_size > 10_000
