"""What `untwine evaluate` shows names the environment as it is, synthetic games included."""

from __future__ import annotations

from pathlib import Path

import pytest

from untwine.config import EnvConfig, EvaluateConfig, Recipe
from untwine.errors import ConfigError, EnvError
from untwine.evaluate.command import evaluate_random, evaluate_run, print_table
from untwine.progress import Display

ROOMS = Recipe(env=EnvConfig(name="rooms", max_steps=3))
ALFWORLD = Recipe(
    env=EnvConfig(name="alfworld", max_steps=3, sessions=2), evaluate=EvaluateConfig(sets=["L0"])
)


@pytest.mark.parametrize(
    ("recipe", "title"),
    [(ALFWORLD, "ALFWorld (synthetic games)"), (ROOMS, "rooms")],
)
def test_rows_and_tables_carry_the_title(
    recipe: Recipe, title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = evaluate_random(recipe, ["L0"], 2, Display(quiet=True))
    assert [(row["environment"], row["set"], row["episodes"]) for row in rows] == [(title, "L0", 2)]
    print_table(rows)
    assert title in capsys.readouterr().out


def test_all_sets_are_looked_up_before_one_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    def played(*_: object) -> None:
        raise AssertionError("played")

    monkeypatch.setattr("untwine.evaluate.command.play_random", played)
    with pytest.raises(EnvError, match="L9"):
        evaluate_random(ROOMS, ["L0", "L9"], 2, Display(quiet=True))


def test_a_set_that_is_named_twice_is_played_once() -> None:
    rows = evaluate_random(ROOMS, ["L0", "L0"], 2, Display(quiet=True))
    assert [row["set"] for row in rows] == ["L0"]


def test_random_commands_are_not_greedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no most likely token"):
        evaluate_run(
            tmp_path, ROOMS, ["L0"], 2, Display(quiet=True), model="random", decodings=("greedy",)
        )


def test_a_narrow_terminal_shows_every_rate_whole(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = evaluate_random(ROOMS, ["L0"], 2, Display(quiet=True))
    row |= {"policy": "runs/a-long-name-of-a-run/model", "decoding": "greedy", "repeated_rate": 0.9}
    print_table([row])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "90 %" in shown
    assert "repeated" in shown
