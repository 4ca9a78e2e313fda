"""Source `branch`: the true advantage of steps, found by playing on (diagnose/branching.py).

Some steps of each iteration are judged on line, at a stated budget, by the policy that played them;
what is found is written beside the episodes, as `untwine diagnose truth` would. Truth files of
other runs may be used as well, for equal actions in equal states of the same task instance: they
hold under the policy of that run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from untwine.config import Recipe
from untwine.diagnose.branching import Settings
from untwine.diagnose.population import draw_steps, recorded_steps
from untwine.diagnose.recorded import iteration_files
from untwine.diagnose.truth import Draw, TruthFinder, questions, truth_header
from untwine.diagnose.truth_file import (
    Truth,
    TruthRow,
    branch_label,
    branch_labels,
    read_truth,
    truth_path,
    write_truth,
)
from untwine.errors import ConfigError
from untwine.gcd.labels import action_key
from untwine.gcd.sources.protocol import Bench, Source, Table, tables_of
from untwine.records import Group, Label

PairKey = tuple[str, str, str]


class BranchSource(Source):
    """On-line truth within `gcd.branch.steps` and `gcd.branch.branches`, and stored truth."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._config = bench.recipe.gcd.branch
        self._stored = stored_labels([Path(run) for run in self._config.runs])
        self._last: tuple[int, Any] | None = None
        if not self._config.steps and not self._stored:
            raise ConfigError(
                "gcd.labels names branch, but gcd.branch.steps is 0 and gcd.branch.runs gives no "
                "label; set steps=16 or name runs that hold truth files"
            )
        if self._config.steps and bench.collector is None:
            raise ConfigError("branch labels need a policy that plays on; leave branch out here")

    def label(
        self, groups: Sequence[Group], iteration: int
    ) -> tuple[list[Table], dict[str, float]]:
        stored = tables_of(groups, self._from_store)
        if not self._config.steps:
            return stored, {}
        rows, counts = self._on_line(groups, iteration)
        source = branch_labels(rows)
        found = [source(group, self._bench.info) for group in groups]
        both = [
            [
                [new or old for new, old in zip(*pair, strict=True)]
                for pair in zip(*tables, strict=True)
            ]
            for tables in zip(found, stored, strict=True)
        ]
        return both, counts

    def recorded(self, iteration: int, episodes: Path) -> None:
        """Write the truth beside the episodes."""
        if self._last is not None and self._last[0] == iteration:
            write_truth(truth_path(self._bench.run, iteration), self._last[1](episodes))

    def _on_line(
        self, groups: Sequence[Group], iteration: int
    ) -> tuple[list[TruthRow], dict[str, float]]:
        recipe, config = self._bench.recipe, self._config
        settings = branch_settings(recipe, 1_000_003 * recipe.seed + iteration)
        assert self._bench.collector is not None
        population = recorded_steps(groups, self._bench.info)
        rng = random.Random(f"{recipe.seed}/branch/{iteration}")
        drawn = draw_steps(population, config.steps, rng)
        finder = TruthFinder(
            recipe, self._bench.collector, settings, self._bench.display, self._bench.on_progress
        )
        rows = finder.rows(drawn, questions(population, drawn, pooled=True))

        def truth(episodes: Path) -> Truth:
            draw = Draw(config.steps)
            header = truth_header(
                iteration, episodes, settings, draw, len(population), finder, rows
            )
            return Truth(header, tuple(rows))

        self._last = (iteration, truth)
        return rows, branch_costs(rows, finder)

    def _from_store(self, group: Group, g: int, t: int) -> Label | None:
        step = group.episodes[g].steps[t]
        return self._stored.get((str(group.ref), step.state_key, action_key(step)))


def branch_settings(recipe: Recipe, seed: int) -> Settings:
    """How `gcd.branch` has a step judged."""
    config = recipe.gcd.branch
    return Settings(
        delta=config.delta,
        error=round(1 - config.confidence, 9),
        branches=config.branches,
        returns=recipe.rl.returns,
        seed=seed,
    )


def branch_costs(rows: Sequence[TruthRow], finder: TruthFinder) -> dict[str, float]:
    """Counts for the metrics: what was judged, and what it cost."""
    report = finder.report()
    return {
        "branch_steps": len(rows),
        "branch_episodes": report["branches_played"],
        "branch_left_out": report["steps_left_out"],
        "label_env_steps": report["env_steps"],
        "label_tokens": report["sampled_tokens"] + report["computed_tokens"],
    }


def stored_labels(runs: Sequence[Path]) -> dict[PairKey, Label]:
    """Labels from the truth files of these run directories, by task instance, state and action.
    Where they disagree about one, it has none. ConfigError for a run without truth files."""
    found: dict[PairKey, Label | None] = {}
    for run in runs:
        files = {k: f for k, f in iteration_files(run).items() if truth_path(run, k).is_file()}
        if not files:
            raise ConfigError(
                f"gcd.branch.runs names {run}, which holds no truth files; "
                f"run `untwine diagnose truth {run}` first"
            )
        for iteration, episodes in files.items():
            for row in read_truth(truth_path(run, iteration), episodes).rows:
                key, label = (row.ref, row.state_key, row.action), branch_label(row)
                if label is None:
                    continue
                before = found.setdefault(key, label)
                if before is None or before.verdict != label.verdict:
                    found[key] = None
                elif label.confidence > before.confidence:
                    found[key] = label
    return {key: label for key, label in found.items() if label is not None}
