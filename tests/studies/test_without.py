"""Credit that is taken out to find out what it does: by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.builders import REF, make_episode, make_step
from untwine.credit import credit_method
from untwine.errors import ConfigError
from untwine.records import Group, Label

METHOD = "studies.gcd.without:without"
FLAWED, GOOD = Label("rule", "flawed", "invalid"), Label("rule", "good", "progress")


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"credit": "rewarded", "word": "focus"}, [[0, 0, 1], [-1, -1, -1]]),
        ({"credit": "rewarded", "word": "focus", "verdict": "good"}, [[1, 0, 1], [-1, -1, -1]]),
        ({"credit": "punished", "word": "focus"}, [[1, 1, 1], [0, -1, -1]]),
        ({"credit": "punished", "word": "focus", "others": True}, [[1, 1, 1], [-1, 0, 0]]),
        ({"credit": "rewarded", "word": "go", "others": True}, [[0, 0, 1], [-1, -1, -1]]),
        ({"credit": "punished", "word": "wait"}, [[1, 1, 1], [-1, -1, -1]]),
    ],
)
def test_one_push_is_taken_out(options: dict[str, Any], rows: list[list[int]]) -> None:
    """Returns 1 and 0: GRPO gives +-1/sqrt 2, here as +-1."""
    won = [
        make_step(0, command="focus on ant", labels=(FLAWED,)),
        make_step(1, command="focus on bee", labels=(GOOD, Label("group", "flawed", "return"))),
        make_step(2, command="go to hall"),
    ]
    lost = [
        make_step(0, command="focus on cat", labels=(FLAWED,)),
        make_step(1, command="go to hall"),
        make_step(2, command=None, invalid="unfinished"),
    ]
    group = Group(REF, (make_episode(1.0, won, id="a"), make_episode(0.0, lost, id="b")))
    found = credit_method(METHOD, options)(group)
    signs = [[round((s.advantage or 0) * 2**0.5, 3) for s in e.steps] for e in found.episodes]
    assert signs == rows


def test_rules_alone() -> None:
    group_says_good = Label("group", "good", "return")
    steps = [
        make_step(0, labels=(FLAWED, group_says_good)),
        make_step(1, labels=(GOOD,)),
        make_step(2, labels=(group_says_good,)),
        make_step(3, labels=(GOOD, FLAWED)),
    ]
    group = Group(REF, (make_episode(1.0, steps, id="a"), make_episode(0.0, steps, id="b")))
    found = credit_method("studies.gcd.without:rules_only", {})(group)
    assert [[s.advantage for s in e.steps] for e in found.episodes] == [[-1, 1, 0, 0]] * 2


def test_what_is_taken_out_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"options\.credit: .*'rewarded' or 'punished'"):
        credit_method(METHOD, {"credit": "blamed", "word": "go"})
