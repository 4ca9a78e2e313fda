"""Label sources of a run: the plain ones of gcd/labels.py, and those that need more than a group.

branch   true advantages, by playing on        expert   plans from every state
judge    the verdict of a language model
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from untwine.config import JudgeConfig
from untwine.errors import ConfigError, nearest
from untwine.gcd.labels import LabelSource, is_plain, label_sources, plain_source
from untwine.gcd.sources.branch import BranchSource
from untwine.gcd.sources.expert import ExpertSource
from untwine.gcd.sources.judge import JudgeSource, check_judge
from untwine.gcd.sources.protocol import Bench, Source, Table
from untwine.records import Group, Label

__all__ = ["Bench", "Labeller", "Source", "check_sources", "register_source", "source_names"]

_MAKERS: dict[str, Callable[[Bench], Source]] = {
    "branch": BranchSource,
    "expert": ExpertSource,
    "judge": JudgeSource,
}


def register_source(name: str, maker: Callable[[Bench], Source]) -> None:
    """Add a source of your own that needs more than a group; see `register_labels` for others."""
    _MAKERS[name] = maker


def source_names() -> tuple[str, ...]:
    return tuple(sorted({*_MAKERS, *label_sources()}))


def costly(name: str) -> bool:
    """Whether labels of this source cost anything worth counting."""
    return name in _MAKERS


def check_sources(names: Sequence[str], judge: JudgeConfig | None = None) -> None:
    """ConfigError when a source does not exist, or (where `judge` is given) the judge's settings
    are of no use."""
    for name in names:
        if costly(name):
            if name == "judge" and judge is not None:
                check_judge(judge)
        elif is_plain(name):
            plain_source(name)
        else:
            raise ConfigError(
                f"unknown label source {name!r}; known are {', '.join(source_names())}, and one of "
                "your own is named module:function, such as my_module:labels."
                f"{nearest(name, source_names())}"
            )


class Labeller:
    """The sources of a recipe, made once for a run."""

    def __init__(self, names: Sequence[str], bench: Bench, min_confidence: float = 0.0) -> None:
        """ConfigError when a source does not exist, or lacks what it needs."""
        check_sources(names)
        self._bench = bench
        self._least = min_confidence
        self._sources = {
            name: _MAKERS[name](bench) if costly(name) else _Plain(plain_source(name), bench)
            for name in names
        }

    def label(
        self, groups: Sequence[Group], iteration: int
    ) -> tuple[list[Group], dict[str, float]]:
        """Copies of the groups with the labels that are confident enough, and counts: those of the
        sources, `labels_NAME` (steps that NAME labelled) and `seconds_labels`."""
        started = time.perf_counter()
        tables: list[list[Table]] = []
        counts: dict[str, float] = {"label_tokens": 0, "label_env_steps": 0}
        for name, source in self._sources.items():
            found, own = source.label(groups, iteration)
            for key, value in own.items():
                counts[key] = counts.get(key, 0) + value
            found = [[[self._sure(x) for x in row] for row in table] for table in found]
            counts[f"labels_{name}"] = sum(
                x is not None for table in found for row in table for x in row
            )
            tables.append(found)
        labelled = [
            _with_labels(group, [table[i] for table in tables]) for i, group in enumerate(groups)
        ]
        counts["seconds_labels"] = time.perf_counter() - started
        return labelled, counts

    def recorded(self, iteration: int, episodes: Path) -> None:
        """The episodes of the last call have been written to this file."""
        for source in self._sources.values():
            source.recorded(iteration, episodes)

    def _sure(self, label: Label | None) -> Label | None:
        return label if label is not None and label.confidence >= self._least else None


class _Plain(Source):
    """A source that needs nothing but the group."""

    def __init__(self, source: LabelSource, bench: Bench) -> None:
        self._source = source
        self._info = bench.info

    def label(
        self, groups: Sequence[Group], iteration: int
    ) -> tuple[list[Table], dict[str, float]]:
        return [self._source(group, self._info) for group in groups], {}


def _with_labels(group: Group, tables: Sequence[Table]) -> Group:
    return group.with_labels(
        [
            [
                tuple(label for table in tables if (label := table[g][t]) is not None)
                for t in range(episode.length)
            ]
            for g, episode in enumerate(group.episodes)
        ]
    )
