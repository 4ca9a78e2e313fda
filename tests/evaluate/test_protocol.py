"""Summaries of evaluations, by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.builders import REF, make_episode, make_step

from untwine.config import EnvConfig, Recipe
from untwine.envs.protocol import EnvInfo
from untwine.errors import EnvError
from untwine.evaluate.protocol import evaluate, evaluation_refs, success_gain, summarise
from untwine.evaluate.statistics import bootstrap_interval, wilson_interval
from untwine.progress import Display
from untwine.records import Group
from untwine.workshop import Workshop

INFO = EnvInfo(
    "test", deterministic=True, snapshots=False, lists_commands=False, has_expert=False
)  # fmt: skip


def played(variation: int, outcome: float) -> Group:
    ref = dataclasses.replace(REF, variation=variation)
    episode = dataclasses.replace(make_episode(outcome, [make_step()]), ref=ref)
    return Group(ref, (episode,))


def test_means_and_intervals_of_instances_played_once() -> None:
    outcomes = [1.0, 0.0, 0.5, 1.0]
    found = summarise([played(v, outcome) for v, outcome in enumerate(outcomes)], INFO)
    assert (found["episodes"], found["instances"]) == (4, 4)
    assert found["outcome_mean"] == pytest.approx(0.625)
    assert found["success_rate"] == pytest.approx(0.5)
    assert found["outcome_interval"] == list(bootstrap_interval(outcomes))
    assert found["success_interval"] == list(wilson_interval(2, 4))


def test_an_instance_played_twice_counts_once_in_the_intervals() -> None:
    once = summarise([played(v, float(v % 2)) for v in range(8)], INFO)
    twice = summarise([played(v, float(v % 2)) for v in [*range(8), *range(8)]], INFO)
    assert twice["episodes"] == 16
    assert twice["instances"] == 8
    for key in ("outcome_mean", "outcome_interval", "success_rate", "success_interval"):
        assert twice[key] == once[key]


def test_tasks_are_means_over_their_instances() -> None:
    """One instance played twice, another once, a third of another task."""
    other = dataclasses.replace(REF, task="tidy")
    episode = dataclasses.replace(make_episode(1.0, [make_step()]), ref=other)
    groups = [played(0, 1.0), played(0, 0.0), played(1, 0.5), Group(other, (episode,))]
    found = summarise(groups, INFO)
    assert found["by_task"] == {
        REF.task: {"episodes": 3, "outcome_mean": 0.5, "success_rate": 0.25},
        "tidy": {"episodes": 1, "outcome_mean": 1.0, "success_rate": 1.0},
    }
    assert found["success_rate"] == pytest.approx(0.5)
    assert found["outcome_mean"] == pytest.approx(2 / 3)


def test_gains_are_paired_by_instance() -> None:
    before = summarise([played(v, outcome) for v, outcome in enumerate([1.0, 0.0, 0.0, 0.5])], INFO)
    after = summarise([played(v, outcome) for v, outcome in enumerate([1.0, 1.0, 1.0, 0.0])], INFO)
    assert before["per_instance"][f"{REF.task}/3"] == [0.5, 0.0]
    gain, interval = success_gain(before, after)
    assert gain == pytest.approx(0.5)
    assert interval == bootstrap_interval([0.0, 1.0, 1.0, 0.0])
    other = summarise([played(v, 1.0) for v in range(3)], INFO)
    with pytest.raises(ValueError, match="different instances"):
        success_gain(before, other)


def test_repeated_actions_are_counted_by_hand() -> None:
    """Doing the same in another state is no repeat; what came of it does not matter."""
    moves = [("a", "go"), ("b", "GO"), ("a", "go"), ("a", "look"), ("a", "Look"), ("a", "go")]
    steps = [make_step(t, state=state, command=said) for t, (state, said) in enumerate(moves)]
    garbled = [make_step(6 + t, state="a", command=None, invalid="no command") for t in range(2)]
    episodes = (make_episode(0.0, [*steps, *garbled]), make_episode(0.0, steps[:2], id="e1"))
    found = summarise([Group(REF, episodes)], INFO)
    assert found["repeated_rate"] == pytest.approx(4 / 10)  # go, Look, go, the garbled text
    assert found["invalid_rate"] == pytest.approx(2 / 10)
    assert found["episode_length"] == pytest.approx(5)


def test_an_empty_set_is_refused_before_it_is_played() -> None:
    env = EnvConfig(name="rooms", held_out_tasks=[])
    assert len(evaluation_refs(env, "L1", 6)) == 6
    assert evaluation_refs(env, "L2", 0) == []
    with pytest.raises(EnvError, match="set 'L2' of environment 'rooms' is empty; leave it out"):
        evaluation_refs(env, "L2", 6)


@pytest.mark.parametrize("tasks", [["fecth"], ["fetch", "fecth"]])
@pytest.mark.parametrize("name", ["L0", "L2"])
def test_a_task_that_no_set_has_is_refused(name: str, tasks: list[str]) -> None:
    with pytest.raises(EnvError, match=r"unknown task 'fecth' .* Did you mean 'fetch'\?"):
        evaluation_refs(EnvConfig(name="rooms", tasks=tasks), name, 4)


def test_held_out_tasks_of_a_recipe_are_those_of_l2() -> None:
    env = EnvConfig(name="alfworld", held_out_tasks=["look_at_obj_in_light"], tasks=[])
    assert {ref.task for ref in evaluation_refs(env, "L2", 8)} == {"look_at_obj_in_light"}
    assert len({ref.task for ref in evaluation_refs(env, "L1", 10)}) == 5


def test_at_a_temperature_of_its_own() -> None:
    """Near zero, sampling takes what greedy decoding takes; at the policy's it does not."""
    tree = {
        "env": {"name": "rooms", "tasks": ["fetch"], "max_steps": 5, "sessions": 8},
        "policy": {
            "threads": 1,
            "tiny": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2},
        },
        "sampling": {"constrained": True},
    }
    with Workshop(Recipe.model_validate(tree), Display(quiet=True)) as workshop:

        def said(**decoding: Any) -> list[list[str | None]]:
            groups = evaluate(workshop.collector, workshop.refs[:8], 0, **decoding)
            return [[step.command for step in g.episodes[0].steps] for g in groups]

        greedy = said(greedy=True)
        assert said(temperature=1e-7) == greedy
        assert said() != greedy
        assert said(temperature=1.0) == said()
