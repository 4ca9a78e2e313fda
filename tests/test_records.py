"""Invariants of the records, and the disk format bit for bit."""

from __future__ import annotations

import dataclasses
import gzip
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import REF, make_episode, make_group, make_step
from untwine.batch import policy_rows
from untwine.credit.grpo import grpo
from untwine.episodes import read_groups, write_groups
from untwine.errors import CheckpointError
from untwine.records import Episode, Group, Label, Step, TaskRef


def test_a_step_without_command_says_why() -> None:
    with pytest.raises(ValueError, match="no reason why"):
        make_step(command=None, invalid=None)


def test_every_action_id_has_a_logprob() -> None:
    step = make_step()
    with pytest.raises(ValueError, match="log-probabilities"):
        Step(**{f: getattr(step, f) for f in step.__slots__ if f != "logprobs"}, logprobs=(0.0,))


def test_a_group_holds_one_task_and_each_episode_once() -> None:
    other = make_episode(0.0, [make_step()], ref=TaskRef("rooms", "fetch", 1))
    with pytest.raises(ValueError, match="other tasks"):
        Group(REF, (other,))
    same = make_episode(0.0, [make_step()])
    with pytest.raises(ValueError, match="twice"):
        Group(REF, (same, same))


def test_new_advantages_leave_the_old_group_alone() -> None:
    group = make_group([1.0, 0.0])
    changed = group.with_advantages([[0.5, None], [-0.5, -0.5]])
    assert [s.advantage for s in changed.episodes[0].steps] == [0.5, None]
    assert all(s.advantage is None for e in group.episodes for s in e.steps)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        group.with_advantages([[0.5]])


def test_the_return_is_the_outcome_or_the_success() -> None:
    group = make_group([0.5, 1.0, 0.0])
    assert group.returns_G == (0.5, 1.0, 0.0)
    by_success = dataclasses.replace(group, returns="success")
    assert by_success.returns_G == (0.0, 1.0, 0.0)
    half, _whole, none = (row[0] for row in grpo(by_success))
    assert half == none < 0


text = st.text(max_size=12)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
floats = st.floats(-30, 0, width=32)


def choices(tokens: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...] | None]:
    """None where the whole vocabulary was always open; an empty set where it was for a token."""
    allowed = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
    sets = st.lists(allowed, min_size=tokens, max_size=tokens)
    return st.none() | sets.filter(any).map(tuple)


@st.composite
def episodes(draw: st.DrawFn, id: str) -> Episode:
    steps = []
    prompt = draw(ids)
    for t in range(draw(st.integers(1, 3))):
        action = draw(ids)
        base = make_step(t, prompt=prompt, action=action)
        labels = draw(
            st.lists(
                st.builds(Label, text, st.sampled_from(["good", "flawed"]), text, st.floats(0, 1)),
                max_size=2,
            )
        )
        values = {f: getattr(base, f) for f in base.__slots__} | {
            "logprobs": tuple(draw(floats) for _ in action),
            "observation": draw(text),
            "thought": draw(st.none() | text),
            "feedback": draw(text),
            "allowed": draw(choices(len(action))) if action else None,
            "admissible": draw(st.none() | st.lists(text, max_size=3).map(tuple)),
            "labels": tuple(labels),
            "advantage": draw(st.none() | st.floats(-9, 9)),
            "reward": draw(st.floats(-1, 1)),
        }
        steps.append(Step(**values))
        prompt = [*prompt, *action, *draw(ids)] if draw(st.booleans()) else draw(ids)
    return make_episode(draw(st.floats(0, 1)), steps, id=id)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_episodes_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    groups = [
        Group(
            REF,
            tuple(data.draw(episodes(f"g{g}e{i}")) for i in range(data.draw(st.integers(1, 2)))),
        )
        for g in range(data.draw(st.integers(1, 2)))
    ]
    file = tmp_path_factory.mktemp("episodes") / "iter-000001.jsonl.gz"
    write_groups(file, groups)
    assert read_groups(file) == groups


def test_a_batch_is_rebuilt_from_disk_bit_for_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    group = make_group([rng.random() for _ in range(3)], lengths=[2, 3, 1])
    group = group.with_advantages([[rng.gauss(0, 1) for _ in e.steps] for e in group.episodes])
    file = tmp_path / "iter-000000.jsonl.gz"
    write_groups(file, [group])
    for mean in ("token", "step", "episode"):
        for ours, theirs in zip(
            policy_rows([group], mean), policy_rows(read_groups(file), mean), strict=True
        ):
            for name in ("ids", "targets", "weights", "old_logprobs", "advantages"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "iter-000000.jsonl.gz"
    with pytest.raises(CheckpointError, match="missing"):
        read_groups(file)
    write_groups(file, [make_group([1.0, 0.0])])
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        read_groups(file)
    file.write_bytes(gzip.compress(b'{"format": "something else"}\n'))
    with pytest.raises(CheckpointError, match="not an episode file"):
        read_groups(file)
    file.write_bytes(whole)
    (tmp_path / "iter-000000.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="damaged"):
        read_groups(file)
