"""What `untwine evaluate` shows names the environment as it is, synthetic games included."""

from __future__ import annotations

import pytest

from untwine.config import EnvConfig, EvaluateConfig, Recipe
from untwine.evaluate.command import evaluate_random, print_table
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
