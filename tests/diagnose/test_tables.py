"""What the terminal shows of numbers; whatever stands in them."""

from __future__ import annotations

from typing import Any

import pytest

from untwine.diagnose.lift_table import lift_rows
from untwine.diagnose.tables import print_coupling

RATE = {"flawed": 1, "reinforced": 1, "share": 1.0, "null": None, "interval": None, "p_value": None}


def shown_step(text: str, prompt: str, **more: Any) -> dict[str, Any]:
    step = {"text": text, "prompt": prompt, "kind": None, "task": "t", "probability": 0.5}
    return {**step, "weight": 1.0, **more}


def offender(text: str, prompt: str, *pushers: dict[str, Any], **more: Any) -> dict[str, Any]:
    sums = {"delta": 0.01, "own": -0.002, "coupled": 0.012, "pushers": list(pushers)}
    return shown_step(text, prompt, **sums, **more)


def pusher(text: str, prompt: str, weight: float = 1.0) -> dict[str, Any]:
    return shown_step(text, prompt, weight=weight, push=0.004, cosine=0.5)


NUMBERS = {
    "iteration": 0, "samples": 2, "distinct": 2, "steps": 2, "metric": "sgd", "policy": "model",
    "drift": {"mean": 0.0, "largest": 0.0}, "honesty": None, "head_correlation": None,
    "reinforced": {"labelled flawed": {"all": RATE}}, "mean_push": None, "lifts": {},
    "credits": None, "cosines": [], "offenders": [],
}  # fmt: skip


def lines_of(
    capsys: pytest.CaptureFixture[str],
    *offenders: dict[str, Any],
    diffs: int = 3,
    lifts: dict[str, Any] | None = None,
) -> list[str]:
    """What is printed after the table of offenders."""
    print_coupling({**NUMBERS, "offenders": list(offenders), "lifts": lifts or {}}, diffs)
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    lines = out.split("\n")
    last = max(i for i, line in enumerate(lines) if line.startswith("└"))
    return [line for line in lines[last + 1 :] if line.strip()]


def test_an_offender_stands_beside_its_strongest_pusher(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = offender(
        "wait",
        "You are in the hall.\nDoor: open",
        pusher("open door", "You are in the hall.\nDoor: shut"),
        pusher("not shown", "other"),
        kind="no_effect",
    )
    assert lines_of(capsys, first) == [
        "1. wait (no_effect): +0.0100, of which +0.0040 from open door (rewarded)",
        "prompts: [-only the flawed step's-] {+only the pusher's+}",
        "You are in the hall.",
        "Door: [-open-]{+shut+}",
    ]


def test_equal_prompts_and_missing_pushers_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines_of(capsys, offender("a", "p", pusher("b", "p", weight=-1.0)), offender("c", "q"))
    assert shown == [
        "1. a: +0.0100, of which +0.0040 from b (punished)",
        "both prompts are equal; only the actions differ",
        "2. c: +0.0100; no other sample pushes it up",
    ]


def test_as_many_as_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    three = [offender("a", "p", pusher("b", "q")) for _ in range(3)]
    assert sum(line[1:3] == ". " for line in lines_of(capsys, *three, diffs=2)) == 2
    assert lines_of(capsys, *three, diffs=0) == []


def test_long_prompts_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    same = "".join(f"line {i}\n" for i in range(500))
    shown = "\n".join(lines_of(capsys, offender("a", same + "x", pusher("b", same + "y"))))
    assert "[-x-]{+y+}" in shown
    assert "equal characters … " in shown
    other = "".join(f"word {i * i}\n" for i in range(5000))
    assert len("\n".join(lines_of(capsys, offender("a", same, pusher("b", other))))) < 2500


LIFTS = {
    "all": {
        "targets": 4,
        "own": -0.002,
        "delta": 0.0005,
        "sources": [
            {"relation": "same command", "credit": "rewarded", "verdict": "good", "mean": 0.003},
            {"relation": "other", "credit": "punished", "verdict": None, "mean": -0.0005},
            {"relation": "other", "credit": "rewarded", "verdict": None, "mean": 0.00001},
        ],
    },
    "undo": {
        "targets": 5,
        "own": -0.001,
        "delta": -0.003,
        "sources": [
            {"relation": "other", "credit": "punished", "verdict": None, "mean": -0.002},
        ],
    },
    "forced": {"targets": 9, "own": 0.0, "delta": 0.0, "sources": []},
    "rare": {"targets": 4, "own": -0.001, "delta": -0.001, "sources": []},
}


def test_who_lifts_in_units_of_the_self_term() -> None:
    rows = [(row.name, dict(row.values)) for row in lift_rows(LIFTS)]
    assert rows == [
        ("self", {"all": -1.0, "undo": -1.0}),
        ("same command, rewarded, good", {"all": 1.5, "undo": None}),
        ("other, punished, no label", {"all": -0.25, "undo": -2.0}),
        ("sum", {"all": 0.25, "undo": -3.0}),
    ]
    assert lift_rows({"forced": LIFTS["forced"]}) == []


def test_who_lifts_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    lines_of(capsys, lifts=LIFTS)
    lines_of(capsys, lifts={})
    lines_of(capsys, lifts={"forced": LIFTS["forced"]})
    print_coupling({**NUMBERS, "lifts": LIFTS})
    out = capsys.readouterr().out
    (line,) = [line for line in out.split("\n") if "same command, rewarded, good" in line]
    assert line.split()[-4:-1] == ["+1.50", "│", "–"]


def test_what_other_credit_would_do_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    lines_of(capsys)
    found = {"good": 0.1, "flawed": -0.2, "difference": 0.3}
    print_coupling({**NUMBERS, "credits": {"veto": found}})
    (line,) = [line for line in capsys.readouterr().out.split("\n") if "veto" in line]
    assert line.split()[1::2] == ["veto", "+0.100", "-0.200", "+0.300"]


def test_nothing_hostile_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither escape sequences, nor markup of our own tables, nor turned text."""
    nasty = "\x1b[2Jgone\x07 [bold]x[/bold] [/red] \u202eturned\x9b1m"
    lines = lines_of(capsys, offender(nasty, f"{nasty} a", pusher(nasty, f"{nasty} b")))
    shown = "\n".join(lines)
    assert "[U+001B][2Jgone[U+0007] [bold]x[/bold] [/red] [U+202E]turned[U+009B]1m" in shown
    assert "[-a-]{+b+}" in shown
