"""What a result cost, in words; the amounts are worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tests.compare.finished_runs import row, write_run

from untwine.cost import cost_text, count, duration
from untwine.evaluate.command import print_table
from untwine.report.page import build_report

SPENT: dict[str, Any] = {
    "cost_tokens": {"imitation": 400, "policy": 1600, "sampled": 99, "gcd": 150, "labels": 50},
    "cost_seconds": {"rollout": 100, "labels": 20, "update": 60, "gcd": 15},
}
SAID = (
    "2\u202f000 tokens of updates, and 200 (+10\u202f%) for verdicts and labels; 3 min, of it 35 s"
)


def test_overhead_is_beside_what_it_comes_on_top_of() -> None:
    assert cost_text(SPENT) == f"{SAID} for verdicts and labels"
    plain = {"cost_tokens": {"policy": 1_234_567}, "cost_seconds": {"rollout": 30}}
    assert cost_text(plain) == "1.23\u202fM tokens of updates; 30 s"
    assert cost_text({"cost_tokens": {"gcd": 5}, "cost_seconds": {}}) == (
        "0 tokens of updates, and 5 for verdicts and labels"
    )


@pytest.mark.parametrize(
    "lacking", [{}, {"cost_tokens": {}, "cost_seconds": {}}, {"cost_tokens": 3}]
)
def test_nothing_is_said_of_nothing(lacking: dict[str, Any]) -> None:
    assert cost_text(lacking) is None


def test_count_and_duration() -> None:
    assert [count(v) for v in (999, 12_345, 2.5e9)] == ["999", "12\u202f345", "2.5\u202fG"]
    assert [duration(v) for v in (59, 60, 3660)] == ["59 s", "1 min", "1 h 01 min"]


def test_it_is_shown_with_the_results(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [row({"a": 0.5}) | SPENT])
    assert SAID in build_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    shown = row({"a": 0.5}) | SPENT
    shown |= {
        "environment": "rooms", "policy": "run/model", "decoding": "sampled",
        "outcome_interval": [0.1, 0.9], "success_interval": [0.1, 0.9],
    }  # fmt: skip
    print_table([shown, shown])
    assert capsys.readouterr().out.count(SAID) == 1
