"""A tiny environment family for the tests of the pool: it can hang, die and raise on command."""

import os
import time
from collections.abc import Mapping
from typing import Any

from untwine.envs.protocol import EnvFamily, EnvInfo, Reset
from untwine.errors import EnvError
from untwine.records import Observation


class FakeCatalogue:
    info = EnvInfo("fake", deterministic=True, snapshots=False, lists_commands=False,
                   has_expert=True)  # fmt: skip

    def tasks(self) -> tuple[str, ...]:
        return ("count", "doomed")

    def variations(self, task: str, split: str | None = None) -> tuple[int, ...]:
        return tuple(range(100))


class FakeEnv:
    """Counts its steps; the text tells the task, the variation, the count and the process."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        if options.get("broken"):
            raise RuntimeError("no such machine")
        self.flag = options.get("flag")
        self.where = ""
        self.count = 0

    def _observe(self) -> Observation:
        text = f"{self.where} {self.count} {os.getpid()}"
        return Observation(text, text, 0.0, 0.0, done=False, success=False)

    def reset(self, task: str, variation: int) -> Reset:
        if task not in ("count", "doomed"):
            raise EnvError(f"unknown task {task!r}")
        if task == "doomed":
            os._exit(3)
        self.where, self.count = f"{task}/{variation}", 0
        return Reset("count up", self._observe())

    def step(self, command: str) -> Observation:
        self.count += 1
        if command == "hang":
            time.sleep(1000)
        if command == "die":
            os._exit(7)
        if command == "raise":
            raise ConnectionError("the other side has gone")
        if command == "fault":
            raise EnvError("a fault of the user")
        return self._observe()

    def expert(self, task: str, variation: int) -> tuple[str, ...] | None:
        if task == "doomed":
            os._exit(3)
        if task == "fragile" and self.flag and not os.path.exists(self.flag):  # noqa: PTH110
            with open(self.flag, "w"):  # noqa: PTH123
                os._exit(4)
        if task == "slow":
            time.sleep(0.3)
        if task == "unknown":
            raise EnvError("unknown task 'unknown'")
        return None if variation % 2 else (f"{task} {variation}",)

    def admissible(self) -> tuple[str, ...]:
        return ()

    def snapshot(self) -> Any:
        raise EnvError("no snapshots")

    def restore(self, snapshot: Any) -> Observation:
        raise EnvError("no snapshots")

    def close(self) -> None:
        pass


FAMILY = EnvFamily(FakeCatalogue(), FakeEnv, ("broken", "flag"))  # type: ignore[arg-type]
