"""An environment around another one, which may change or check what it shows."""

from __future__ import annotations

from typing import Any

from untwine.envs.protocol import Env, Planner, Reset, Searcher
from untwine.records import Observation


class Wrapper:
    """Passes everything on, and every observation through `seen`."""

    def __init__(self, env: Env) -> None:
        self._env = env
        # an environment is a Planner or a Searcher by what it has
        if isinstance(env, Planner):
            self.plan = env.plan
        if isinstance(env, Searcher):
            self.search = env.search

    def reset(self, task: str, variation: int) -> Reset:
        goal, observation = self._env.reset(task, variation)
        return Reset(goal, self.seen(observation, "reset"))

    def step(self, command: str) -> Observation:
        return self.seen(self._env.step(command), "step")

    def restore(self, snapshot: Any) -> Observation:
        return self.seen(self._env.restore(snapshot), "restore")

    def admissible(self) -> tuple[str, ...]:
        return self._env.admissible()

    def snapshot(self) -> Any:
        return self._env.snapshot()

    def expert(self, task: str, variation: int) -> tuple[str, ...] | None:
        return self._env.expert(task, variation)

    def close(self) -> None:
        self._env.close()

    def seen(self, observation: Observation, method: str) -> Observation:
        """What is shown of an observation that `method` returned."""
        return observation
