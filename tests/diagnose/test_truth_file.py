"""Truth on disk comes back as it was, and only for the episodes it judged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.builders import REF, make_episode, make_step
from untwine.diagnose.truth_file import (
    Truth,
    TruthRow,
    branch_labels,
    checksum,
    read_truth,
    truth_path,
    write_truth,
)
from untwine.envs.protocol import EnvInfo
from untwine.errors import CheckpointError
from untwine.gcd.labels import label_group, register_labels
from untwine.records import Group, Label

INFO = EnvInfo("test", deterministic=True, snapshots=False, lists_commands=False, has_expert=False)

ROW = TruthRow(
    group=0, episode="e0", step=1, ref=str(REF), state_key="s1", action="go south", kind="other",
    position="late", weight=3.5, shared=1, q=0.25, value=0.5, action_value=0.25, advantage=-0.25,
    low=-0.5, high=-0.1, n=64, label="flawed", clear=True, confidence=0.99,
)  # fmt: skip


def written(tmp_path: Path) -> tuple[Path, Path, Truth]:
    episodes = tmp_path / "iter-000003.jsonl.gz"
    episodes.write_bytes(b"episodes")
    truth = Truth({"iteration": 3, "episodes_sha256": checksum(episodes)}, (ROW,))
    path = truth_path(tmp_path, 3)
    write_truth(path, truth)
    return path, episodes, truth


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    path, episodes, truth = written(tmp_path)
    assert path.name == "truth-iter-000003.jsonl"
    assert read_truth(path, episodes) == truth
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_other_episodes_and_damage_are_refused(tmp_path: Path) -> None:
    path, episodes, _ = written(tmp_path)
    episodes.write_bytes(b"other episodes")
    with pytest.raises(CheckpointError, match="judges other episodes"):
        read_truth(path, episodes)
    text = path.read_text()
    path.write_text(text.replace("untwine-truth-1", "untwine-truth-0"))
    with pytest.raises(CheckpointError, match="no truth file of this version"):
        read_truth(path, episodes)
    path.write_text(text[:-20])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_truth(path, episodes)
    with pytest.raises(CheckpointError, match="is missing"):
        checksum(tmp_path / "nowhere")


def test_branch_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [
        make_step(0, state="s0", command="go north"),
        make_step(1, state="s1", command="Go South"),
        make_step(2, state="s2", command="look"),
    ]
    group = Group(
        REF,
        (make_episode(0.0, steps, id="e0"), make_episode(1.0, steps[:2], id="e1")),
    )
    flawed = Label("branch", "flawed", "advantage", 0.99)
    good = Label("branch", "good", "advantage", 0.98)
    pooled = dataclasses.replace(
        ROW, step=0, state_key="s0", action="go north", label="good", confidence=0.98, shared=2
    )
    neutral = dataclasses.replace(ROW, step=2, state_key="s2", label="neutral", confidence=None)
    from untwine.gcd import labels

    monkeypatch.setattr(labels, "_SOURCES", dict(labels._SOURCES))
    register_labels("branch", branch_labels([ROW, pooled, neutral]))
    found = label_group(group, ["branch"], INFO)
    # the pooled pair is known wherever it occurs, the other only where it was judged
    assert [[s.labels for s in e.steps] for e in found.episodes] == [
        [(good,), (flawed,), ()],
        [(good,), ()],
    ]
    sure = label_group(group, ["branch"], INFO, min_confidence=0.985)
    assert [s.labels for s in sure.episodes[0].steps] == [(), (flawed,), ()]
