"""RLVMR: what tags earn by hand, advantages against a brute-force computation."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics

import pytest

from tests.builders import REF, make_episode, make_group, make_step
from untwine.config import PromptConfig
from untwine.credit import check_credit, credit_method
from untwine.credit.grpo import grpo
from untwine.credit.rlvmr import rlvmr, tag_rewards
from untwine.errors import ConfigError
from untwine.prompting.tags import TAGS
from untwine.records import Episode, Group, Step


def step(
    tag: str | None,
    way: str,
    command: str | None = "go",
    *,
    invalid: str | None = None,
) -> Step:
    """A step that leads from the state named by the first letter of `way` to that of the second."""
    made = make_step(state=way[0], after=way[1], command=command, invalid=invalid)
    return dataclasses.replace(made, tag=tag)


def rewards(outcome: float, *steps: Step) -> list[float]:
    return tag_rewards(make_episode(outcome, steps))


def test_planning_earns_with_success_only() -> None:
    steps = [step("planning", "ab"), step("planning", "bb", invalid="unknown")]
    assert rewards(1.0, *steps) == [1.0, 0.0]
    assert rewards(0.0, *steps) == [0.0, 0.0]
    assert rewards(0.9, *steps) == [0.0, 0.0]  # part of the way is no success


def test_exploring_earns_where_command_and_state_are_new() -> None:
    assert rewards(
        0.0,
        step("explore", "ab", "go north"),
        step("explore", "ba", "go south"),  # back where it began
        step("explore", "ac", "Go north"),  # elsewhere, by a command known already
        step("explore", "cd", "go east"),
        step("explore", "dd", "look"),  # nothing new to see
        step("explore", "de", "xyzzy", invalid="unknown"),
        step("explore", "ef", "go west"),
    ) == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]


def test_a_command_that_was_refused_is_new_when_it_is_valid() -> None:
    refused = step("explore", "aa", "open drawer", invalid="not_admissible")
    again = step("explore", "bc", "open drawer")
    assert rewards(0.0, refused, step("monitor", "ab", "go east"), again) == [0.0, 0.0, 1.0]


def test_a_command_said_under_another_tag_is_not_new() -> None:
    found = rewards(0.0, step("monitor", "ab", "open box"), step("explore", "bc", "open box"))
    assert found == [0.0, 0.0]


def test_reflection_earns_when_it_corrects_a_failure() -> None:
    def after(first: Step, *then: Step) -> float:
        return rewards(0.0, first, *then)[-1]

    refused = step("monitor", "aa", None, invalid="no_tag")
    wrong = step("monitor", "aa", "open bx", invalid="unknown")
    right = step("reflection", "ab", "open box")
    assert after(wrong, right) == 1.0
    assert after(refused, right) == 1.0
    assert after(wrong, step("reflection", "ab", "Open bx")) == 0.0  # the same again
    assert after(wrong, step("reflection", "aa", "look")) == 0.0  # changes nothing
    assert after(wrong, step("reflection", "aa", "open bux", invalid="unknown")) == 0.0
    assert after(step("monitor", "ab", "go"), step("reflection", "bc", "stay")) == 0.0
    looked = step("monitor", "aa", "look")
    assert after(looked, right) == 0.0  # looking once is no failure,
    assert after(looked, looked, right) == 1.0  # looking again in vain is
    assert rewards(0.0, right) == [0.0]  # nothing to reflect on


def test_monitor_and_no_tag_earn_nothing() -> None:
    assert rewards(1.0, step("monitor", "ab"), step(None, "bc", "new")) == [0.0, 0.0]


def worked_group() -> Group:
    won = make_episode(
        1.0,
        [step("planning", "ab", "x"), step("explore", "bc", "y"), step("monitor", "cd", "z")],
        id="won",
    )
    lost = make_episode(
        0.0,
        [
            step("planning", "ab", "x"),
            step("explore", "ba", "y"),
            step("explore", "aa", "x"),
            step(None, "aa", None, invalid="no_tag"),
        ],
        id="lost",
    )
    return Group(REF, (won, lost))


def test_hand_worked_without_std() -> None:
    """Returns 1 and 0: ±1/2. Planning earned 1 and 0, mean 1/2; exploring 1, 0, 0, mean 1/3; the
    only monitor step is alone."""
    rows = rlvmr(worked_group(), weight=0.6, normalise="none", refusal=0.25)
    assert rows[0] == pytest.approx([0.5 + 0.3, 0.5 + 0.4, 0.5])
    assert rows[1] == pytest.approx([-0.5 - 0.3, -0.5 - 0.2, -0.5 - 0.2, -0.5 - 0.25])


def test_hand_worked_with_std() -> None:
    """Unbiased deviations: sqrt(1/2) of returns and planning, sqrt(1/3) of exploring."""
    rows = rlvmr(worked_group())
    half, third = 0.5 / 0.5**0.5, 1 / 3**0.5
    assert rows[0] == pytest.approx([2 * half, half + 2 * third, half], abs=1e-5)
    assert rows[1] == pytest.approx(
        [-2 * half, -half - third, -half - third, -half - 0.1], abs=1e-5
    )


def test_a_tag_that_occurs_once_gets_no_raw_reward() -> None:
    group = Group(
        REF, (make_episode(1.0, [step("planning", "ab")]), make_episode(0.0, [], id="e1"))
    )
    assert rlvmr(group) == grpo(group)


def random_group(rng: random.Random) -> Group:
    def episode(g: int) -> Episode:
        places = [rng.choice("abcd") for _ in range(rng.randint(1, 9) + 1)]
        steps = []
        for before, after in itertools.pairwise(places):
            command = rng.choice(["go", "look", "take", "Take", None])
            invalid = "no_tag" if command is None else rng.choice([None, None, "unknown"])
            tag = None if command is None else rng.choice([*TAGS, None])
            steps.append(step(tag, before + after, command, invalid=invalid))
        return make_episode(rng.choice([0.0, 0.0, 0.4, 1.0]), steps, id=f"e{g}")

    return Group(REF, tuple(episode(g) for g in range(rng.randint(1, 6))))


@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_brute_force(seed: int) -> None:
    """Each step looks for its own peers, and the standard library computes."""
    group = random_group(random.Random(seed))
    rows = rlvmr(group, weight=0.7, refusal=0.3)
    earned = [tag_rewards(episode) for episode in group.episodes]
    returns = [episode.outcome for episode in group.episodes]
    for g, episode in enumerate(group.episodes):
        for t, own in enumerate(episode.steps):
            expected = 0.0
            if len(returns) > 1:
                spread = statistics.stdev(returns) + 1e-6
                expected = (returns[g] - statistics.mean(returns)) / spread
            peers = [
                earned[h][u]
                for h, other in enumerate(group.episodes)
                for u, peer in enumerate(other.steps)
                if peer.tag == own.tag
            ]
            if own.tag and len(peers) > 1:
                centred = earned[g][t] - statistics.mean(peers)
                expected += 0.7 * centred / (statistics.stdev(peers) + 1e-6)
            if own.command is None:
                expected -= 0.3
            assert rows[g][t] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_using_a_tag_pays_nothing_in_itself(seed: int) -> None:
    """Over all steps with one tag, what is added to the outcome's advantage sums to 0."""
    group = random_group(random.Random(seed))
    extra: dict[str, float] = {}
    for own, base, episode in zip(rlvmr(group), grpo(group), group.episodes, strict=True):
        for mine, theirs, one in zip(own, base, episode.steps, strict=True):
            if one.tag:
                assert mine is not None
                assert theirs is not None
                extra[one.tag] = extra.get(one.tag, 0.0) + mine - theirs
    assert all(total == pytest.approx(0.0, abs=1e-9) for total in extra.values())


def test_without_tags_it_is_grpo() -> None:
    group = make_group([1.0, 0.0, 0.5], lengths=[1, 4, 2])
    assert rlvmr(group) == grpo(group)


def test_equal_returns_still_teach_by_tags() -> None:
    lost = [
        make_episode(0.0, [step("explore", "ab", "x")], id="new"),
        make_episode(0.0, [step("explore", "aa", "x")], id="old"),
    ]
    rows = rlvmr(Group(REF, tuple(lost)), normalise="none")
    assert rows == [[0.5], [-0.5]]


def test_by_name_with_options_and_only_with_tags() -> None:
    group = credit_method("rlvmr", {"weight": 0.0, "refusal": 0.0})(worked_group())
    assert [s.advantage for s in group.episodes[0].steps] == grpo(worked_group())[0]
    with pytest.raises(ConfigError, match="Did you mean 'refusal'"):
        credit_method("rlvmr", {"refusl": 1})
    check_credit("grpo", PromptConfig())
    check_credit("rlvmr", PromptConfig(tags=True))
    with pytest.raises(ConfigError, match=r"set prompt\.tags to true"):
        check_credit("rlvmr", PromptConfig())
