"""The tasks of the family `babyai`, their variations, and which worlds belong to which split.

A task is a level of minigrid. A variation is a world of that level, drawn from seeds of its own;
small levels have few worlds, so the same world comes up under many seeds. To keep what is examined
apart from what is trained on, every world belongs to one class by its digest, and a variation takes
the first of its seeds whose world is of the right class. So no world is shared between the train,
dev and test variations, nor between the train variations kept for training and every tenth, which
the default split file sets aside as L0.
"""

from __future__ import annotations

import hashlib

from untwine.envs.checking import check_variation
from untwine.envs.protocol import EnvInfo, Split
from untwine.errors import EnvError, nearest

# task -> level id in minigrid 3.2.0 (Chevalier-Boisvert et al., arXiv 1810.08272)
LEVELS = {
    "GoToObjS6": "BabyAI-GoToObjS6-v1",
    "GoToRedBall": "BabyAI-GoToRedBall-v0",
    "GoToLocalS7N5": "BabyAI-GoToLocalS7N5-v0",
    "GoToDoor": "BabyAI-GoToDoor-v0",
    "GoToObjMazeS4R2": "BabyAI-GoToObjMazeS4R2-v0",
    "GoToSeqS5R2": "BabyAI-GoToSeqS5R2-v0",
    "PickupDist": "BabyAI-PickupDist-v0",
    "PickupLoc": "BabyAI-PickupLoc-v0",
    "OpenDoor": "BabyAI-OpenDoor-v0",
    "OpenTwoDoors": "BabyAI-OpenTwoDoors-v0",
    "OpenDoorsOrderN2": "BabyAI-OpenDoorsOrderN2-v0",
    "PutNextLocalS6N4": "BabyAI-PutNextLocalS6N4-v0",
    "PutNextS5N2": "BabyAI-PutNextS5N2-v0",
    "UnlockLocal": "BabyAI-UnlockLocal-v0",
    "UnlockLocalDist": "BabyAI-UnlockLocalDist-v0",
    "UnlockPickup": "BabyAI-UnlockPickup-v0",
    "BlockedUnlockPickup": "BabyAI-BlockedUnlockPickup-v0",
    "ActionObjDoor": "BabyAI-ActionObjDoor-v0",
}
# Each has a sibling among the others, so L2 asks for transfer of skills that were trained.
HELD_OUT_TASKS = ("GoToSeqS5R2", "OpenDoorsOrderN2", "PutNextS5N2", "UnlockPickup")

SPLIT_RANGES: dict[Split, range] = {
    "train": range(0, 1000),
    "dev": range(1000, 1100),
    "test": range(1100, 1200),
}
VARIATIONS = 1200


def wanted_classes(variation: int) -> range:
    """Digest classes, out of 0 to 9, of the worlds that a variation may have."""
    if variation in SPLIT_RANGES["test"]:
        return range(9, 10)
    if variation in SPLIT_RANGES["dev"]:
        return range(8, 9)
    return range(7, 8) if variation % 10 == 9 else range(0, 7)


def class_of(world: str) -> int:
    """Digest class of a world given by its canonical key, 0 to 9."""
    return int.from_bytes(hashlib.sha256(world.encode()).digest()[:8]) % 10


class Catalogue:
    """The task instances of the family, by formula; needs no minigrid."""

    info = EnvInfo(
        name="babyai",
        title="BabyAI",
        deterministic=True,
        snapshots=True,
        lists_commands=True,
        has_expert=True,
    )
    held_out_tasks = HELD_OUT_TASKS

    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks."""
        return tuple(LEVELS)

    def variations(self, task: str, split: Split | None = None) -> tuple[int, ...]:
        """Variation numbers of a task. EnvError for an unknown task."""
        if task not in LEVELS:
            raise EnvError(f"unknown babyai task {task!r}.{nearest(task, LEVELS)}")
        return tuple(range(VARIATIONS) if split is None else SPLIT_RANGES[split])

    def check(self, task: str, variation: int) -> None:
        """EnvError when there is no such instance."""
        check_variation("babyai", task, variation, len(self.variations(task)))


CATALOGUE = Catalogue()
