"""What an environment of one's own answers, looked at before anything is learnt from it.

Families that come with untwine are tested for it; for others a wrong answer would come out later
and elsewhere, as a lost worker, a return of 1.7, or a file that cannot be written.
"""

from __future__ import annotations

import math

from untwine.envs.protocol import Env, Planner, Reset
from untwine.envs.wrapper import Wrapper
from untwine.errors import EnvError
from untwine.own_code import cut_short
from untwine.records import Observation


class CheckedEnv(Wrapper):
    """An environment whose answers are checked: EnvError names the method and what it returned."""

    def __init__(self, name: str, env: Env) -> None:
        super().__init__(env)
        self._name = name
        if isinstance(env, Planner):
            self.plan = self._plan

    def reset(self, task: str, variation: int) -> Reset:
        found = self._env.reset(task, variation)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], str):
            raise self._wrong(
                "reset", f"returned {_said(found)}", "return Reset(goal, observation)"
            )
        return Reset(found[0], self.seen(found[1], "reset"))

    def admissible(self) -> tuple[str, ...]:
        return self._commands("admissible", super().admissible()) or ()

    def expert(self, task: str, variation: int) -> tuple[str, ...] | None:
        return self._commands("expert", super().expert(task, variation))

    def _plan(self) -> tuple[str, ...] | None:
        assert isinstance(self._env, Planner)
        return self._commands("plan", self._env.plan())

    def seen(self, observation: object, method: str) -> Observation:
        if not isinstance(observation, Observation):
            raise self._wrong(method, f"returned {_said(observation)}", "return an Observation")
        for key, kinds in _FIELDS.items():
            value = getattr(observation, key)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                told = f"{key}={_said(value)}"
                wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
                raise self._wrong(method, f"gave {told}", f"{key} must be {wanted}")
        if not math.isfinite(observation.score):
            raise self._wrong(method, f"gave score={observation.score}", "a score must be finite")
        if not 0 <= observation.outcome <= 1:
            raise self._wrong(
                method, f"gave outcome={observation.outcome}", "an outcome must lie between 0 and 1"
            )
        if observation.admissible is not None:
            self._commands(f"{method} (admissible)", observation.admissible)
        return observation

    def _commands(self, method: str, found: object) -> tuple[str, ...] | None:
        if found is None:
            return None
        if not isinstance(found, tuple | list) or not all(isinstance(text, str) for text in found):
            raise self._wrong(method, f"returned {_said(found)}", "return a tuple of commands")
        return tuple(found)

    def _wrong(self, method: str, what: str, wanted: str) -> EnvError:
        return EnvError(f"environment {self._name!r}: {method} {what}; {wanted}")


_FIELDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "state_key": (str,),
    "score": (float, int),
    "outcome": (float, int),
    "done": (bool,),
    "success": (bool,),
    "invalid": (str, type(None)),
}


def _said(value: object) -> str:
    """A value with its type."""
    return f"{cut_short(value)} ({type(value).__name__})"
