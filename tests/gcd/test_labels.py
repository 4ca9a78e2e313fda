"""Rule and group labels on hand-made episodes."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.builders import REF, make_episode, make_step
from untwine.envs.protocol import EnvInfo
from untwine.errors import ConfigError
from untwine.gcd.labels import agreed_verdict, group_labels, label_group, rule_labels
from untwine.records import Group, Label, Step

INFO = EnvInfo(
    "test", deterministic=True, snapshots=False, lists_commands=False, has_expert=False,
    inspecting=("look",),
)  # fmt: skip


def rules(*steps: Step, outcome: float = 0.0) -> list[tuple[str, str] | None]:
    group = Group(REF, (make_episode(outcome, steps),))
    return [label and (label.verdict, label.kind) for label in rule_labels(group, INFO)[0]]


def test_every_rule() -> None:
    assert rules(make_step(command=None, invalid="empty")) == [("flawed", "invalid")]
    assert rules(make_step(command="xyzzy", invalid="unknown_command")) == [("flawed", "invalid")]
    assert rules(make_step(state="a", after="b", reward=0.2)) == [("good", "progress")]
    assert rules(make_step(state="a", after="b", reward=-0.2)) == [("flawed", "setback")]
    assert rules(make_step(state="a", after="b", done=True)) == [("flawed", "fatal")]
    assert rules(make_step(state="a", after="a")) == [("flawed", "no_effect")]
    assert rules(make_step(state="a", after="b")) == [None]


def test_the_first_rule_that_applies_counts() -> None:
    """In the order of docs/concepts.md: invalid, progress, fatal, setback, then the rest."""
    both = make_step(command=None, invalid="empty", reward=0.2)
    assert rules(both) == [("flawed", "invalid")]
    assert rules(make_step(reward=0.2, done=True)) == [("good", "progress")]
    assert rules(make_step(reward=-0.2, done=True)) == [("flawed", "fatal")]
    assert rules(make_step(state="a", after="a", reward=-0.2)) == [("flawed", "setback")]
    assert rules(make_step(state="a", after="a", reward=0.2)) == [("good", "progress")]


def test_repeat_needs_the_same_command_in_the_same_state() -> None:
    push = make_step(0, state="a", after="a", command="push")
    assert rules(push, push) == [("flawed", "no_effect"), ("flawed", "repeat")]
    away = make_step(1, state="a", after="b", command="go north")
    other = make_step(2, state="b", after="b", command="push")
    assert rules(push, away, other)[2] == ("flawed", "no_effect")


def test_looking_once_is_no_flaw_looking_twice_is_a_repeat() -> None:
    look = make_step(0, state="a", after="a", command="look around")
    assert rules(look, look) == [None, ("flawed", "repeat")]


def test_going_straight_back_is_undo_unless_it_gained() -> None:
    there = make_step(0, state="a", after="b", command="go north")
    back = make_step(1, state="b", after="a", command="go south")
    assert rules(there, back) == [None, ("flawed", "undo")]
    gained = make_step(1, state="b", after="a", command="go south", reward=0.5)
    assert rules(there, gained)[1] == ("good", "progress")


def branching_group(returns: list[float], takers: set[int]) -> Group:
    """All episodes start in the same state; `takers` take `left`, the others `right`."""
    episodes = []
    for g, value in enumerate(returns):
        command = "left" if g in takers else "right"
        episodes.append(
            make_episode(
                value, [make_step(0, state="s", after=f"x{g}", command=command)], id=f"e{g}"
            )
        )
    return Group(REF, tuple(episodes))


def test_group_confidence_against_all_assignments() -> None:
    returns = [1.0, 1.0, 0.8, 0.0, 0.1, 0.0, 0.4, 0.2]
    group = branching_group(returns, {0, 1, 2})
    labels = group_labels(group, INFO)
    assert labels[0][0] is not None
    assert labels[0][0].verdict == "good"
    assert labels[7][0] is not None
    assert labels[7][0].verdict == "flawed"
    # Independent reference: mean and deviation of the takers' mean over all C(8, 3) assignments.
    means = [sum(returns[i] for i in c) / 3 for c in itertools.combinations(range(8), 3)]
    centre = sum(means) / len(means)
    deviation = math.sqrt(sum((m - centre) ** 2 for m in means) / len(means))
    z = ((1.0 + 1.0 + 0.8) / 3 - centre) / deviation
    assert labels[0][0].confidence == pytest.approx(math.erf(abs(z) / math.sqrt(2)))


def test_group_abstains_when_it_cannot_know() -> None:
    alone = branching_group([1.0, 0.0, 0.0, 0.0], {0})
    assert group_labels(alone, INFO) == [[None]] * 4
    for value in (1.0, 0.1, 0.7):  # the mean of six times .1 is not exactly .1
        constant = branching_group([value] * 6, {0, 1})
        assert group_labels(constant, INFO) == [[None]] * 6


def test_an_episode_counts_once_however_often_it_passes() -> None:
    loop = make_step(0, state="s", after="s", command="left")
    exit_ = make_step(1, state="s", after="t", command="right")
    episodes = [
        make_episode(1.0, [loop] * 6 + [exit_], id="a"),
        make_episode(0.0, [loop, exit_], id="b"),
        make_episode(0.0, [exit_], id="c"),
        make_episode(0.0, [exit_], id="d"),
    ]
    label = group_labels(Group(REF, tuple(episodes)), INFO)[0][0]
    # takers of `left`: episodes a and b once each: mean 1/2 against 1/4, var 3/16
    z = 0.25 / math.sqrt(3 / 16 / 2 * 2 / 3)
    assert label is not None
    assert label.confidence == pytest.approx(math.erf(z / math.sqrt(2)))


def test_sources_together() -> None:
    group = label_group(branching_group([1.0, 1.0, 0.0, 0.0], {0, 1}), ["rule", "group"], INFO)
    step = group.episodes[0].steps[0]
    assert [label.source for label in step.labels] == ["group"]
    assert agreed_verdict(step) == "good"
    clash = make_step(labels=(Label("rule", "flawed", "undo"), Label("group", "good", "return")))
    assert agreed_verdict(clash) is None
    assert agreed_verdict(make_step()) is None
    strict = label_group(group, ["group"], INFO, min_confidence=0.999)
    assert strict.episodes[0].steps[0].labels == ()
    with pytest.raises(ConfigError, match="Did you mean 'group'"):
        label_group(group, ["groups"], INFO)
