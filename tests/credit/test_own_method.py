"""A credit method of one's own, by its place, and what it may return."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import make_group
from untwine.credit import credit_method
from untwine.errors import ConfigError

CODE = "def method(group, value=None):\n    return VALUES[value or 'right']\n"
VALUES: dict[str, Any] = {
    "right": [[1, None], [np.float32(0.5), -1.0, 0.0]],
    "array": [np.ones(2), np.zeros(3)],
    "nothing": None,
    "number": 0.5,
    "one row": [[1.0, 1.0]],
    "row of numbers": [1.0, 2.0],
    "short": [[1.0], [1.0, 1.0, 1.0]],
    "words": [["a", 1.0], [1.0, 1.0, 1.0]],
    "nan": [[math.nan, 1.0], [1.0, 1.0, 1.0]],
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "untwine_own_credit.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "untwine_own_credit", raising=False)

    def returning(value: str) -> list[list[float | None]]:
        method = credit_method("untwine_own_credit:method", {"value": value})
        sys.modules["untwine_own_credit"].VALUES = VALUES  # type: ignore[attr-defined]
        group = method(make_group([1.0, 0.0], [2, 3]))
        return [[step.advantage for step in episode.steps] for episode in group.episodes]

    return returning


def test_numbers_of_any_kind_become_advantages(own: Any) -> None:
    assert own("right") == [[1.0, None], [0.5, -1.0, 0.0]]
    assert own("array") == [[1.0, 1.0], [0.0, 0.0, 0.0]]
    assert all(type(value) is float for row in own("array") for value in row)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nothing", "a row of advantages for each of 2 episodes"),
        ("number", "a row of advantages for each of 2 episodes"),
        ("one row", "a row of advantages for each of 2 episodes"),
        ("row of numbers", "a row of advantages for each of 2 episodes"),
        ("short", "episode 0 has 2 steps and gets 1 advantages"),
        ("words", "the advantage 'a' is neither a finite number nor None"),
        ("nan", "the advantage nan is neither"),
    ],
)
def test_what_is_no_table_of_advantages_is_said(own: Any, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"credit method 'untwine_own_credit:method': .*{words}"):
        own(value)
