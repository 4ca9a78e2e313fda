"""What a label source of a run must be, and what it works with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from untwine.config import Recipe
from untwine.envs.pool import EnvPool
from untwine.envs.protocol import EnvInfo
from untwine.progress import Display
from untwine.records import Group, Label
from untwine.rollout import Collector

Table = list[list[Label | None]]  # of one group: a row for each episode, an entry for each step


@dataclass(frozen=True, slots=True)
class Bench:
    """What sources work with. Nothing else uses the pool while they do.

    collector    plays with the policy that played the episodes; None: no policy is at hand
    run          folder in which a source may keep things
    on_progress  called now and then; may raise to stop
    wanted       (episode, number of the step) of which labels are wanted, where a label is paid
                 for; None: of all
    """

    recipe: Recipe
    pool: EnvPool
    collector: Collector | None
    run: Path
    display: Display
    on_progress: Callable[[], None] = lambda: None
    wanted: Container[tuple[str, int]] | None = None

    @property
    def info(self) -> EnvInfo:
        return self.pool.info


class Source(ABC):
    """Labels the steps it is sure of, and abstains from all others.

    What it says depends on the groups, the policy, the recipe and the number of the iteration only
    (a judge: also on its answers, which are kept), so that a run can be resumed exactly.
    """

    @abstractmethod
    def label(
        self, groups: Sequence[Group], iteration: int
    ) -> tuple[list[Table], dict[str, float]]:
        """A table for each group, and counts for the metrics."""

    def recorded(self, iteration: int, episodes: Path) -> None:  # noqa: B027  (most need nothing)
        """The episodes of the last call have been written to this file."""


def tables_of(
    groups: Sequence[Group],
    label_of: Callable[[Group, int, int], Label | None],
) -> list[Table]:
    """Tables from a function of (group, number of the episode, number of the step)."""
    return [
        [
            [label_of(group, g, t) for t in range(episode.length)]
            for g, episode in enumerate(group.episodes)
        ]
        for group in groups
    ]
