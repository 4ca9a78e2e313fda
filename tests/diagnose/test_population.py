"""Samples of recorded steps: right sizes, unbiased weights; kinds and positions."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.builders import REF, make_episode, make_step
from untwine.diagnose.population import RecordedStep, draw_steps, in_order, recorded_steps
from untwine.envs.protocol import EnvInfo
from untwine.errors import ConfigError
from untwine.records import Group, Label

INFO = EnvInfo(
    "test", deterministic=True, snapshots=False, lists_commands=False, has_expert=False,
    inspecting=("look",),
)  # fmt: skip


def group() -> Group:
    """Twelve steps: three invalid, one no_effect, one off_plan on record, the rest `other`."""
    off_plan = (Label("expert", "flawed", "off_plan"),)
    returns_only = (Label("group", "flawed", "return", 0.9),)
    steps = [
        make_step(0, state="a", after="b"),
        make_step(1, state="b", after="c", invalid="unknown_command"),
        make_step(2, state="c", after="d", labels=off_plan),
        make_step(3, state="d", after="d"),
        make_step(4, state="d", after="e", labels=returns_only),
        make_step(5, state="e", after="f", labels=(*returns_only, *off_plan)),
        make_step(6, state="f", after="g", invalid="ambiguous"),
    ]
    other = [make_step(t, state=f"x{t}", after=f"x{t + 1}") for t in range(4)]
    other.append(make_step(4, state="a", after="b", command="Go North", invalid="ambiguous"))
    return Group(REF, (make_episode(0.0, steps, id="e0"), make_episode(0.0, other, id="e1")))


def test_kinds_and_positions() -> None:
    steps = recorded_steps([group()], INFO)
    assert [s.kind for s in steps] == [
        "other", "invalid", "off_plan", "no_effect", "other", "off_plan", "invalid",
        "other", "other", "other", "other", "invalid",
    ]  # fmt: skip
    assert [s.position for s in steps] == [
        "early", "early", "early", "middle", "middle", "late", "late",
        "early", "early", "middle", "middle", "late",
    ]  # fmt: skip
    assert steps[0].pair == steps[-1].pair  # the same command in the same state
    assert len({s.pair for s in steps}) == 10


def test_order_in_tables() -> None:
    assert in_order(["late", "middle", "early", "late"]) == ["early", "middle", "late"]
    assert in_order(["undo", "invalid", "undo"]) == ["invalid", "undo"]


def test_uniform_samples_are_unbiased() -> None:
    steps = recorded_steps([group()], INFO)
    rng = random.Random(0)
    seen: Counter[tuple[str, int]] = Counter()
    for _ in range(3000):
        drawn = draw_steps(steps, 4, rng)
        assert len({(s.episode.id, s.t) for s, _ in drawn}) == 4
        assert [w for _, w in drawn] == [3.0] * 4
        seen.update((s.episode.id, s.t) for s, _ in drawn)
    # each is drawn with chance 1/3: mean 1000, deviation 25.8
    assert all(abs(seen[s.episode.id, s.t] - 1000) < 4 * 25.8 for s in steps)


@pytest.mark.parametrize("stratified", ["kind", "position"])
def test_weights_of_strata_make_up_for_their_chances(stratified: str) -> None:
    steps = recorded_steps([group()], INFO)
    sizes = Counter(getattr(s, stratified) for s in steps)
    rng = random.Random(0)
    total: Counter[tuple[str, int]] = Counter()
    for _ in range(2000):
        drawn = draw_steps(steps, 7, rng, stratified)  # type: ignore[arg-type]
        assert len(drawn) == 7
        for name, size in sizes.items():
            own = [w for s, w in drawn if getattr(s, stratified) == name]
            assert sum(own) == pytest.approx(size)
        for s, w in drawn:
            total[s.episode.id, s.t] += w  # type: ignore[assignment]
    for s in steps:  # the weighted count of every step has mean 1
        assert total[s.episode.id, s.t] / 2000 == pytest.approx(1.0, abs=0.15)


def test_all_steps_at_most_and_one_of_each_stratum_at_least() -> None:
    steps = recorded_steps([group()], INFO)
    drawn = draw_steps(steps, 100, random.Random(0), "kind")
    assert [w for _, w in drawn] == [1.0] * 12
    with pytest.raises(ConfigError, match=r"raise --steps to at least 4"):
        draw_steps(steps, 3, random.Random(0), "kind")
    empty: list[RecordedStep] = []
    with pytest.raises(ConfigError, match="cannot be drawn from 0"):
        draw_steps(empty, 3, random.Random(0))
