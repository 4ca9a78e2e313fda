"""The 30 tasks of ScienceWorld and their variations, known without starting Java.

`catalogue.json` holds what the server of scienceworld 1.2.3 says; a test compares the two.
`python -m untwine.envs.scienceworld` writes it anew (needs Java).
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from untwine.envs.checking import check_variation
from untwine.envs.protocol import EnvInfo, Split
from untwine.envs.splits import format_ranges, parse_ranges
from untwine.errors import EnvError, nearest

CATALOGUE_FILE = Path(__file__).parent / "catalogue.json"
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
BLOCKED = ("reset task",)

# Task types of which nothing is seen in training: one of each kind of task that has a sibling
# among the seen ones, so that L2 asks for transfer rather than for a new science.
HELD_OUT_TASKS = (
    "chemistry-mix-paint-tertiary-color",
    "find-plant",
    "freeze",
    "grow-fruit",
    "identify-life-stages-2",
    "inclined-plane-friction-unnamed-surfaces",
    "lifespan-longest-lived-then-shortest-lived",
    "measure-melting-point-unknown-substance",
    "mendelian-genetics-unknown-plant",
    "power-component-renewable-vs-nonrenewable-energy",
    "test-conductivity-of-unknown-substances",
)


class ScienceWorldCatalogue:
    """Tasks and variations, read from `catalogue.json` when first asked for."""

    info = EnvInfo(
        name="scienceworld",
        title="ScienceWorld",
        deterministic=False,
        snapshots=False,
        lists_commands=True,
        has_expert=True,
        remote=True,
        inspecting=(
            "look", "examine", "read", "inventory", "task", "help", "objects", "wait", "wait1",
        ),
        blocked=BLOCKED,
    )  # fmt: skip
    held_out_tasks = HELD_OUT_TASKS

    @cached_property
    def _tasks(self) -> dict[str, dict[str, Any]]:
        tree = json.loads(CATALOGUE_FILE.read_text(encoding="utf-8"))
        tasks: dict[str, dict[str, Any]] = tree["tasks"]
        return tasks

    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks, in the order of the server."""
        return tuple(self._tasks)

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        """Variation numbers of a task. EnvError for an unknown task or split."""
        if split is None:
            return tuple(range(self.count(task)))
        if split not in SPLITS:
            raise EnvError(f"unknown split {split!r}; known are {', '.join(SPLITS)}")
        return parse_ranges(self._entry(task)[split])

    def count(self, task: str) -> int:
        """Number of variations of a task. EnvError for an unknown task."""
        return int(self._entry(task)["variations"])

    def check(self, task: str, variation: int) -> None:
        """EnvError when there is no such instance."""
        check_variation("scienceworld", task, variation, self.count(task))

    def _entry(self, task: str) -> dict[str, Any]:
        if task not in self._tasks:
            raise EnvError(f"unknown scienceworld task {task!r}.{nearest(task, self._tasks)}")
        return self._tasks[task]


def ask_server(server: Any) -> dict[str, dict[str, Any]]:
    """The same as `catalogue.json` holds, from a running server (a `PythonInterface`)."""
    tasks = {}
    for task in list(server.getTaskNames()):
        server.load(task, 0, "", False)  # the splits are those of the loaded task
        tasks[str(task)] = {
            "variations": int(server.getTaskMaxVariations(task)),
            "train": format_ranges(server.getVariationsTrain()),
            "dev": format_ranges(server.getVariationsDev()),
            "test": format_ranges(server.getVariationsTest()),
        }
    return tasks
