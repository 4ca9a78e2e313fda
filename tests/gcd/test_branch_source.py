"""Branch labels on the walk on a line, whose true advantages have known signs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.diagnose.test_truth_commands import RECIPE
from tests.diagnose.untwine_chain_env import ChainEnv
from untwine.config import PromptConfig, Recipe, SamplingConfig, make_recipe
from untwine.diagnose.truth_file import read_truth, truth_path
from untwine.envs import registry
from untwine.envs.pool import EnvPool
from untwine.episodes import write_groups
from untwine.errors import CheckpointError, ConfigError
from untwine.gcd.sources import Bench, Labeller
from untwine.gcd.sources.branch import BranchSource
from untwine.policy.loading import Policy
from untwine.progress import Display
from untwine.records import Group, TaskRef
from untwine.rollout import Collector

REFS = [TaskRef("chain", "near", k) for k in range(3)]


def recipe(**branch: Any) -> Recipe:
    return make_recipe({**RECIPE, "gcd": {"labels": ["branch"], "branch": branch}})


@pytest.fixture
def collector(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setattr(ChainEnv, "resets", 0)
    registry.register_family("chain", "tests.diagnose.untwine_chain_env:FAMILY")
    with EnvPool("chain", {"list_commands": True}, workers=0, sessions=16, timeout_s=5) as pool:
        yield Collector(policy, pool, 4, PromptConfig(), SamplingConfig(constrained=True))


@pytest.fixture
def groups(collector: Collector) -> list[Group]:
    return collector.collect(REFS, 12, torch.Generator().manual_seed(1))[0]


def source(collector: Collector, run: Path, **branch: Any) -> BranchSource:
    bench = Bench(recipe(**branch), collector.pool, collector, run, Display(quiet=True))
    return BranchSource(bench)


def recorded(run: Path, groups: list[Group], iteration: int) -> Path:
    path = run / "episodes" / f"iter-{iteration:06d}.jsonl.gz"
    write_groups(path, groups)
    return path


def test_labels_on_line_and_the_truth_they_leave(
    collector: Collector, groups: list[Group], tmp_path: Path
) -> None:
    made = source(collector, tmp_path, steps=1000, branches=32)
    tables, counts = made.label(groups, 3)
    flawed = good = 0
    for group, table in zip(groups, tables, strict=True):
        for episode, row in zip(group.episodes, table, strict=True):
            for step, label in zip(episode.steps, row, strict=True):
                if label is not None:
                    # the left end loses at once, and right is never worse
                    assert label.verdict == {"go left": "flawed", "go right": "good"}.get(
                        step.command or "", label.verdict
                    )
                    flawed += label.verdict == "flawed"
                    good += label.verdict == "good"
    assert flawed
    assert good
    assert counts["branch_steps"] == sum(e.length for g in groups for e in g.episodes)
    assert counts["label_env_steps"] > 0
    assert counts["label_tokens"] > 0
    made.recorded(3, recorded(tmp_path, groups, 3))
    truth = read_truth(truth_path(tmp_path, 3), tmp_path / "episodes/iter-000003.jsonl.gz")
    assert len(truth.rows) == counts["branch_steps"]
    assert truth.header["branches_played"] == counts["branch_episodes"]


def test_the_budget_is_kept_and_the_draw_can_be_repeated(
    collector: Collector, groups: list[Group], tmp_path: Path
) -> None:
    first, counts = source(collector, tmp_path, steps=5, branches=16).label(groups, 2)
    assert counts["branch_steps"] == 5
    assert counts["branch_episodes"] <= 5 * 2 * 16
    again, _ = source(collector, tmp_path, steps=5, branches=16).label(groups, 2)
    assert first == again
    made = source(collector, tmp_path, steps=5, branches=16)
    made.label(groups, 2)
    made.recorded(4, tmp_path / "missing")  # of another iteration: nothing is written
    assert not truth_path(tmp_path, 4).exists()


def test_stored_truth_labels_equal_actions(
    collector: Collector, groups: list[Group], tmp_path: Path
) -> None:
    made = source(collector, tmp_path, steps=12, branches=32)
    tables, _ = made.label(groups, 0)
    recorded(tmp_path, groups, 0)
    with pytest.raises(ConfigError, match="which holds no truth files"):
        source(collector, tmp_path, steps=0, runs=[str(tmp_path)])
    made.recorded(0, tmp_path / "episodes/iter-000000.jsonl.gz")
    again, counts = source(collector, tmp_path, steps=0, runs=[str(tmp_path)]).label(groups, 7)
    assert counts == {}
    known = {
        (str(g.ref), s.state_key, s.command): x.verdict
        for g, table in zip(groups, tables, strict=True)
        for e, row in zip(g.episodes, table, strict=True)
        for s, x in zip(e.steps, row, strict=True)
        if x is not None
    }
    assert known
    for g, table in zip(groups, again, strict=True):
        for e, row in zip(g.episodes, table, strict=True):
            for s, x in zip(e.steps, row, strict=True):
                wanted = known.get((str(g.ref), s.state_key, s.command))
                assert (x and x.verdict) == wanted


def test_what_is_lacking_is_said(collector: Collector, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set steps=16 or name runs"):
        source(collector, tmp_path, steps=0)
    with pytest.raises(CheckpointError, match="holds no episodes"):
        source(collector, tmp_path, runs=[str(tmp_path / "nowhere")])
    bench = Bench(recipe(), collector.pool, None, tmp_path, Display(quiet=True))
    with pytest.raises(ConfigError, match="need a policy"):
        BranchSource(bench)
    with pytest.raises(ConfigError, match="Did you mean 'branch'"):
        Labeller(["brunch"], bench)
