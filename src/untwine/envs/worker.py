"""A spawned worker of `EnvPool`: the messages, the child's side, and the parent's side.

No process outlives the pool. A worker leads a process group of its own, in which the JVM it starts
stays too; killing a worker means killing the group, and a worker whose parent has gone kills its
own group.

Every message carries a number, and a slot has one request at a time. An answer to an earlier
request of the slot (its call was broken off by an error) is dropped, so it is never taken for an
answer to a later one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from untwine.envs import registry
from untwine.envs.guiding import Advice, advice_along
from untwine.envs.protocol import Env, ExpertKind, Planner, Reset, Searcher
from untwine.envs.wandering import Command, wandering_plan
from untwine.errors import EnvError, UntwineError
from untwine.records import Observation

STARTUP_S = 60.0  # allowed on top of timeout_s until a new worker has answered once
KEPT_PLANS = 50_000  # plans from the states of episodes that a process remembers
SPARE = -1  # the slot of the environment in which experts search


@dataclass(frozen=True, slots=True)
class ResetRequest:
    """Begin an episode in the slot, whatever was there before."""

    task: str
    variation: int


@dataclass(frozen=True, slots=True)
class StepRequest:
    """Send one command to the episode in the slot."""

    command: str


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """Save the present state of the episode in the slot (only where `EnvInfo.snapshots`)."""


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """Return to a state saved in any slot of the pool, whatever was in this one before."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """Begin an episode and send these commands; the answer is the last observation."""

    task: str
    variation: int
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What an environment gave as its state."""

    value: Any


@dataclass(frozen=True, slots=True)
class Lost:
    """The episode of this slot went down with its worker; `reason` says how."""

    reason: str


@dataclass(frozen=True, slots=True)
class ExpertRequest:
    """Solve an instance as this `expert` does; with `noise`, after a wrong command now and then; up
    to `alternatives` other commands are judged beside each (wandering.py)."""

    task: str
    variation: int
    noise: float = 0.0
    max_steps: int = 0
    seed: int = 0
    valid_only: bool = False
    expert: ExpertKind = "oracle"
    alternatives: int = 0
    memory: int = 0


@dataclass(frozen=True, slots=True)
class AdviceRequest:
    """What the expert thinks of every state on the way of these commands (guiding.py)."""

    task: str
    variation: int
    commands: tuple[str, ...]
    searching: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """An UntwineError on its way to the parent."""

    kind: type[UntwineError]
    message: str

    def error(self) -> UntwineError:
        error = self.kind.__new__(self.kind)  # some kinds have more arguments than the message
        error.args = (self.message,)
        return error


@dataclass(frozen=True, slots=True)
class Broken:
    """The worker is of no more use."""

    reason: str


Beginning = ResetRequest | RestoreRequest | ReplayRequest  # needs no episode in the slot
SpareRequest = ExpertRequest | AdviceRequest
Request = Beginning | StepRequest | SnapshotRequest | SpareRequest
Answer = Reset | Observation | Snapshot | Fault | tuple[Command, ...] | tuple[Advice, ...] | None


class Sessions:
    """The environments of one process, one for each slot, made when first needed."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name = name
        self._options = options
        self._envs: dict[int, Env] = {}
        self._plans: dict[tuple[str, int, str], tuple[str, ...] | None] = {}

    def answer(self, slot: int, request: Request) -> Answer:
        """Anything but an UntwineError passes through: the process is then to be replaced."""
        try:
            if slot not in self._envs:
                self._envs[slot] = registry.make_env(self._name, self._options)
            env = self._envs[slot]
            if isinstance(request, StepRequest):
                return env.step(request.command)
            if isinstance(request, ResetRequest):
                return env.reset(request.task, request.variation)
            if isinstance(request, SnapshotRequest):
                return Snapshot(env.snapshot())
            if isinstance(request, RestoreRequest):
                return env.restore(request.snapshot.value)
            if isinstance(request, ReplayRequest):
                return _replay(env, request)
            if isinstance(request, AdviceRequest):
                return self._advice(env, request)
            return _expert(env, request)
        except UntwineError as error:
            return Fault(type(error), str(error))

    def _advice(self, env: Env, request: AdviceRequest) -> tuple[Advice, ...]:
        if not isinstance(env, Planner):
            raise EnvError("this environment has no expert that can start anywhere")
        if request.searching and not isinstance(env, Searcher):
            raise EnvError("this environment has no searching expert; set gcd.expert: oracle")
        if len(self._plans) > KEPT_PLANS:
            self._plans.clear()
        return advice_along(
            env,
            request.task,
            request.variation,
            request.commands,
            self._plans,
            searching=request.searching,
            seed=request.seed,
        )

    def close(self) -> None:
        for env in self._envs.values():
            with contextlib.suppress(Exception):
                env.close()
        self._envs.clear()


def _replay(env: Env, request: ReplayRequest) -> Observation:
    observation = env.reset(request.task, request.variation).observation
    for command in request.commands:
        observation = env.step(command)
    return observation


def _expert(env: Env, request: ExpertRequest) -> tuple[Command, ...] | None:
    task, variation = request.task, request.variation
    searching = request.expert != "oracle"
    if request.noise or searching or request.alternatives:
        if not isinstance(env, Planner):
            raise EnvError("this environment has no experts that err: it cannot plan anew")
        if searching and not isinstance(env, Searcher):
            raise EnvError("this environment has no searching expert; use cold_start.expert=oracle")
        wandering = wandering_plan(
            env,
            task,
            variation,
            request.noise,
            request.max_steps,
            request.seed,
            valid_only=request.valid_only,
            expert=request.expert,
            alternatives=request.alternatives,
            memory=request.memory,
        )
        if wandering is not None or searching:
            return wandering
    plan = env.expert(task, variation)
    return None if plan is None else tuple(Command(command) for command in plan)


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _serve(pipe: connection.Connection, name: str, target: str, options: dict[str, Any]) -> None:
    """Life of a worker: answer requests until the parent says None or goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    if hasattr(os, "setpgrp"):
        os.setpgrp()
        threading.Thread(target=_follow_parent, daemon=True).start()
    sessions = Sessions(name, options)
    try:
        registry.register_family(name, target)
        while (message := pipe.recv()) is not None:
            number, requests = message
            for slot, request in requests:
                pipe.send((number, slot, sessions.answer(slot, request)))
    except (EOFError, BrokenPipeError):
        pass  # the parent has gone
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send((0, SPARE, Broken(describe(error))))
    sessions.close()


def _follow_parent() -> None:
    """End this process group when the parent has died without a word (even amid a hanging step)."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.killpg(os.getpgrp(), signal.SIGKILL)


class Worker:
    """A spawned process, seen from the parent.

    awaited   slots that have not been answered -> number of the message with their request
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        target = registry.family_target(name)
        self.process = context.Process(
            target=_serve, args=(theirs, name, target, dict(options)), daemon=True
        )
        self.process.start()
        theirs.close()
        self._number = 0
        self.awaited: dict[int, int] = {}
        self.answered = False
        self.heard = time.monotonic()

    def send(self, requests: Sequence[tuple[int, Request]]) -> None:
        self.heard = time.monotonic()
        self._number += 1
        self.awaited.update({slot: self._number for slot, _ in requests})
        with contextlib.suppress(OSError):  # a dead worker is noticed when its answer is awaited
            self.pipe.send((self._number, requests))

    def receive(self) -> tuple[int, Answer | Broken] | None:
        """The next answer, `Broken` when the worker is dead, None for an answer out of date."""
        try:
            number, slot, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1.0)
            return SPARE, Broken(f"the process died (exit code {self.process.exitcode})")
        self.heard = time.monotonic()
        if isinstance(answer, Broken):
            return SPARE, answer
        self.answered = True
        if self.awaited.get(slot) != number:
            return None
        del self.awaited[slot]
        return slot, answer

    def silence_left(self, allowed: float) -> float:
        """Seconds until the worker counts as dead."""
        extra = 0.0 if self.answered else STARTUP_S
        return self.heard + allowed + extra - time.monotonic()

    def stop(self, grace: float = 0.0) -> None:
        """Ask the worker to end within `grace` seconds, then kill it and all it started."""
        if grace:
            with contextlib.suppress(OSError):
                self.pipe.send(None)
            self.process.join(grace)
        assert self.process.pid is not None
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(5.0)
        self.pipe.close()
