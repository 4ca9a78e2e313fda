"""Back to recorded states: snapshots and replay agree, and what cannot be repeated is said."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.diagnose.conftest import MakeCollector
from untwine.config import PromptConfig, SamplingConfig
from untwine.diagnose.restoring import Mismatch, restore_points
from untwine.envs.pool import EnvPool, ReplayRequest, RestoreRequest, StepRequest
from untwine.errors import CheckpointError
from untwine.policy.loading import Policy
from untwine.policy.sampler import Sample
from untwine.records import Episode, Observation, TaskRef
from untwine.rollout import Collector


def episodes_of(collector: Collector, ref: TaskRef, count: int = 3) -> list[Episode]:
    groups, _ = collector.collect([ref], count, torch.Generator().manual_seed(0))
    return list(groups[0].episodes)


@pytest.mark.parametrize("name", ["alfworld", "rooms"])
def test_snapshot_and_replay_lead_to_the_same_state(policy: Policy, name: str) -> None:
    task = {"alfworld": "pick_and_place_simple", "rooms": "fetch"}[name]
    with EnvPool(name, {"list_commands": True}, workers=0, sessions=4, timeout_s=60.0) as pool:
        collector = Collector(policy, pool, 5, PromptConfig(), SamplingConfig(constrained=True))
        episodes = episodes_of(collector, TaskRef(name, task, 3))
        starts, mismatches = restore_points(
            pool, collector.prompter, [(e, range(e.length)) for e in episodes]
        )
        assert not mismatches
        assert len(starts) == sum(e.length for e in episodes)
        for episode in episodes:
            for t, step in enumerate(episode.steps):
                start = starts[episode.id, t]
                assert isinstance(start.back, RestoreRequest)
                assert start.steps == episode.steps[:t]
                assert start.conversation.prompt_ids == step.prompt_ids
                commands = tuple(s.command for s in episode.steps[:t] if s.command is not None)
                replay = ReplayRequest(task, 3, commands)
                # slot 3 has played none of this; slot 0 has, and other things since
                restored, replayed = pool.call({3: start.back, 0: replay}).values()
                assert isinstance(restored, Observation)
                assert isinstance(replayed, Observation)
                assert restored.state_key == replayed.state_key == step.state_key
                assert set(restored.admissible or ()) == set(replayed.admissible or ())
                assert step.command is not None
                after = list(pool.call(dict.fromkeys((0, 3), StepRequest(step.command))).values())
                assert after[0] == after[1]
                assert isinstance(after[0], Observation)
                assert (after[0].state_key, after[0].text) == (step.next_state_key, step.feedback)


def test_playing_on_from_a_start_repeats_the_episode_when_its_replies_are_given(
    make_chain: MakeCollector,
) -> None:
    """The prefix is kept, a given reply is played as it is, and steps count from the beginning."""
    collector = make_chain()
    episodes = episodes_of(collector, TaskRef("chain", "near", 0), 6)
    points = [(e, t) for e in episodes for t in range(e.length)]
    starts, _ = restore_points(collector.pool, collector.prompter, [(e, [t]) for e, t in points])
    given = [
        dataclasses.replace(
            starts[e.id, t],
            reply=Sample(e.steps[t].action_ids, e.steps[t].logprobs, e.steps[t].allowed),
        )
        for e, t in points
    ]
    played, stats = collector.play_on(given, torch.Generator().manual_seed(5))
    for (episode, t), branch in zip(points, played, strict=True):
        assert branch is not None
        assert branch.steps[: t + 1] == episode.steps[: t + 1]
        assert branch.length <= 3
        assert (branch.ended == "limit") == (branch.length == 3 and not branch.steps[-1].done)
    kept = sum(t for _, t in points)
    assert stats.env_steps == sum(b.length for b in played if b) - kept


@pytest.mark.parametrize(("drifts", "what"), [("text", "text"), ("state", "state")])
@pytest.mark.parametrize("snapshots", [True, False])
def test_an_environment_that_is_not_repeatable_is_reported(
    make_chain: MakeCollector, drifts: str, what: str, snapshots: bool
) -> None:
    collector = make_chain(drifts=drifts, snapshots=snapshots)
    episodes = episodes_of(collector, TaskRef("chain", "near", 0))
    starts, mismatches = restore_points(
        collector.pool, collector.prompter, [(e, range(e.length)) for e in episodes]
    )
    assert starts == {}
    assert mismatches == [Mismatch(e.id, -1, what) for e in episodes]


def test_only_what_comes_before_the_difference_is_used(make_chain: MakeCollector) -> None:
    """An answer on record that the environment does not give: the step itself goes too."""
    collector = make_chain()
    episode = next(
        e for e in episodes_of(collector, TaskRef("chain", "near", 0), 8) if e.length == 3
    )
    steps = list(episode.steps)
    steps[1] = dataclasses.replace(steps[1], feedback="You are elsewhere.")
    forged = dataclasses.replace(episode, steps=tuple(steps))
    starts, mismatches = restore_points(collector.pool, collector.prompter, [(forged, [0, 1, 2])])
    assert list(starts) == [(episode.id, 0)]
    assert mismatches == [Mismatch(episode.id, 1, "text")]


def test_prompts_of_another_model_are_refused(make_chain: MakeCollector) -> None:
    collector = make_chain()
    episode = episodes_of(collector, TaskRef("chain", "near", 0))[0]
    first = dataclasses.replace(episode.steps[0], prompt_ids=(1, 2, 3))
    forged = dataclasses.replace(episode, steps=(first, *episode.steps[1:]))
    with pytest.raises(CheckpointError, match=r"^step 0 of episode .* another prompt"):
        restore_points(collector.pool, collector.prompter, [(forged, [0])])


def test_replies_that_were_refused_are_part_of_the_way(
    make_chain: MakeCollector,
) -> None:
    """A free policy from scratch is hardly understood; what never reached the environment is not
    sent, and the prompts are rebuilt all the same."""
    collector = make_chain(SamplingConfig(max_new_tokens=4))
    episodes = episodes_of(collector, TaskRef("chain", "near", 0), 4)
    assert any(s.command is None for e in episodes for s in e.steps)
    starts, mismatches = restore_points(
        collector.pool, collector.prompter, [(e, [e.length - 1]) for e in episodes]
    )
    assert not mismatches
    assert len(starts) == 4
