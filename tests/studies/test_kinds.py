"""Which kinds of steps become rarer, and what the first batch does to them, counted by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from tests.builders import REF, make_episode, make_step
from tests.studies.test_gcd_analysis import script
from untwine.records import Group, Label, Step


def test_kinds_of_steps_counted_by_hand() -> None:
    """Two runs: at first 2 (3) of 4 steps are not understood, at the end 1 (2) of 4."""
    kinds = script("kinds")
    bad = (Label("rule", "flawed", "invalid"), Label("group", "good", "return"))

    def step(command: str, invalid: bool, probability: float) -> Step:
        labels = bad if invalid else ()
        made = make_step(0, command=command, action=(7, 8), labels=labels)
        return dataclasses.replace(
            made,
            invalid="unknown_command" if invalid else None,
            logprobs=(math.log(probability), 0.0),
            advantage=-1.0 if invalid else 0.5,
        )

    first = [step("go in", False, 0.5), step("go up", True, 0.2), step("badbad", True, 0.1)]
    last = [step("go in", False, 0.5), step("go up", True, 0.4), step("go on", False, 0.5)]
    ends = []
    for extra in (first[0], first[1]):
        ends.append(
            tuple(
                kinds.count(
                    [Group(REF, (make_episode(0.0, steps), make_episode(1.0, [extra], id="e1")))]
                )
                for steps in (first, last)
            )
        )
    found = kinds.differences(ends)
    assert set(found["share"]) == {"invalid", "invalid: go", "invalid: other", "other"}
    share = found["share"]["invalid: go"]
    assert share["values"] == [(0.25, 0.25), (0.5, 0.5)]
    assert found["share"]["invalid"]["values"] == [(0.5, 0.25), (0.75, 0.5)]
    assert found["share"]["invalid"]["difference"] == pytest.approx(-0.25)
    assert found["per_episode"]["invalid: other"]["values"] == [(0.5, 0.0), (0.5, 0.0)]
    chance = found["probability"]["invalid: go"]
    assert chance["values"][0] == pytest.approx((0.2, 0.4))
    assert chance["values"][1] == pytest.approx((0.2, 0.3))
    assert "invalid: other" not in found["probability"]
    assert found["advantage"]["invalid"]["first"] == pytest.approx(-1.0)


def test_what_the_first_batch_lifts_is_read_from_looks() -> None:
    kinds = script("kinds")

    def seen(share: float, null: float, flawed: int = 4) -> dict[str, Any]:
        rate = {"flawed": flawed, "reinforced": 0, "share": share, "null": null}
        return {"reinforced": {"labelled flawed, advantage below 0": {"repeat": rate}}}

    found = kinds.lifted([seen(0.2, 0.5), {}, seen(0.3, 0.4), seen(0.9, 0.9, flawed=0)])
    assert found["repeat"]["values"] == [(0.5, 0.2), (0.4, 0.3)]
    assert found["repeat"]["difference"] == pytest.approx(-0.2)
    assert kinds.lifted([seen(0.2, 0.5)]) == {}


def test_who_lifts_is_averaged_over_runs(tmp_path: Path) -> None:
    """In units of each run's own self term; a source that a run does not have counts 0 there."""
    kinds = script("kinds")

    def seen(own: float, **sources: float) -> dict[str, Any]:
        pushed = [
            {"relation": relation, "credit": "rewarded", "verdict": "good", "mean": value}
            for relation, value in sources.items()
        ]
        lifted = {"targets": 5, "own": own, "delta": own + sum(sources.values())}
        rare = {"targets": 4, "own": own, "delta": own, "sources": []}
        return {"lifts": {"repeat": {**lifted, "sources": pushed}, "undo": rare}}

    looks = [seen(-0.5, other=0.25), seen(-0.25, other=0.25, command=0.005), {}]
    found = kinds.lifters(looks)
    assert list(found) == ["repeat"]
    values = {name: one["values"] for name, one in found["repeat"].items()}
    assert values == {
        "self": [-1.0, -1.0],
        "other, rewarded, good": [0.5, 1.0],
        "command, rewarded, good": [0.0, pytest.approx(0.02)],
        "sum": [-0.5, pytest.approx(0.02)],
    }
    assert found["repeat"]["sum"]["mean"] == pytest.approx(-0.24)
    assert kinds.lifters(looks[:1]) == {}
    kinds.draw_lifters(found, tmp_path / "l.svg")
    drawn = (tmp_path / "l.svg").read_text()
    assert "other, rewarded, good" in drawn
    assert "command, rewarded" not in drawn
