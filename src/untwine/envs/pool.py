"""Many episodes at once: slots in this process or in spawned workers.

A *slot* holds one live episode. `EnvPool.send` takes requests for distinct slots, `receive` returns
one reply for each, in order; workers act at the same time, and while the caller does other things
in between. A worker that dies or stays silent is replaced, and every episode it held is answered
with `Lost`: the caller begins it again (rollout.py does, and counts it), so none is lost for good.

The silence allowed is counted per request: a worker answers one request after the other, and each
answer starts the clock anew. A process that has never answered gets `STARTUP_S` more, since it has
to import Python modules and perhaps to start a JVM. Without workers nothing can be timed out, but
an environment that raises something unexpected is replaced just the same.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import connection
from types import TracebackType
from typing import Any

from untwine.envs import registry
from untwine.envs.guiding import Advice
from untwine.envs.protocol import EnvInfo, ExpertKind, Reset
from untwine.envs.wandering import Command
from untwine.envs.worker import (
    SPARE,
    AdviceRequest,
    Answer,
    Beginning,
    Broken,
    ExpertRequest,
    Fault,
    Lost,
    ReplayRequest,
    Request,
    ResetRequest,
    RestoreRequest,
    Sessions,
    Snapshot,
    SnapshotRequest,
    SpareRequest,
    StepRequest,
    Worker,
    describe,
)
from untwine.errors import EnvError
from untwine.records import Observation

__all__ = [
    "ATTEMPTS", "EXPERT_FACTOR", "AdviceRequest", "Beginning", "EnvPool", "EpisodeRequest", "Lost",
    "ReplayRequest", "ResetRequest", "RestoreRequest", "Snapshot", "SnapshotRequest", "StepRequest",
]  # fmt: skip

EpisodeRequest = Beginning | StepRequest | SnapshotRequest
EpisodeAnswer = Reset | Observation | Snapshot | Lost
SpareAnswer = tuple[Command, ...] | tuple[Advice, ...] | None

EXPERT_FACTOR = 5.0  # an expert may search this many times as long as a step may take
ATTEMPTS = 3  # failed starts of a worker in a row, or failed searches of one expert


class EnvPool:
    """`workers` processes with `sessions` episodes each; with workers=0 all of it happens here.

    slots     how many episodes can be live at once; slots are numbered from 0
    restarts  how many times a worker (or the environments of this process) had to be replaced
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        workers: int,
        sessions: int,
        timeout_s: float,
    ) -> None:
        """EnvError for an unknown environment; wrong options show at the first call."""
        registry.get_family(name)
        self._name = name
        self._options = dict(options)
        self._sessions = sessions
        self._timeout_s = timeout_s
        self._live: set[int] = set()
        self._lost: dict[int, Lost] = {}
        self._answers: dict[int, Answer | Lost] = {}  # that nobody has received yet
        self._here = Sessions(name, self._options)
        self._here_answered = False
        self._failures = [0] * max(1, workers)
        self._workers = [Worker(name, self._options) for _ in range(workers)]
        self.slots = max(1, workers) * sessions
        self.restarts = 0

    @property
    def workers(self) -> int:
        """Number of processes; without any, environments act while the caller waits."""
        return len(self._workers)

    @property
    def info(self) -> EnvInfo:
        """What the environments of this pool offer. EnvError for wrong options."""
        return registry.get_catalogue(self._name, self._options).info

    def call(self, requests: Mapping[int, EpisodeRequest]) -> dict[int, EpisodeAnswer]:
        """Send every request and wait for the answers, in the order given. See `receive`."""
        self.send(requests)
        return self.receive(requests)

    def send(self, requests: Mapping[int, EpisodeRequest]) -> None:
        """Hand requests to the workers; their answers wait for `receive`. Without workers they are
        answered now. A slot has one request at a time: a later one takes the place of an earlier.

        A snapshot may be restored in any slot.

        ValueError for a slot that does not exist, or a step or snapshot in a slot without an
        episode.
        """
        passed: dict[int, list[tuple[int, Request]]] = {}
        for slot, request in requests.items():
            if not self.slots:
                raise ValueError("the pool is closed")
            if not 0 <= slot < self.slots:
                raise ValueError(f"there is no slot {slot}, only 0 to {self.slots - 1}")
            self._answers.pop(slot, None)
            if isinstance(request, Beginning):
                self._lost.pop(slot, None)
            elif slot in self._lost:
                self._answers[slot] = self._lost[slot]
                continue
            elif slot not in self._live:
                raise ValueError(f"slot {slot} has no episode; send a ResetRequest first")
            passed.setdefault(slot // self._sessions, []).append((slot, request))
        for i, batch in passed.items():
            if self._workers:
                self._workers[i].send(batch)
            else:
                self._answers.update(self._answer_here(batch))

    def receive(self, slots: Iterable[int]) -> dict[int, EpisodeAnswer]:
        """Wait for the answers to what was sent to these slots, in the order given.

        An UntwineError raised by an environment is raised here, once all of them have answered.
        EnvError when a worker fails `ATTEMPTS` times in a row before its first answer.
        ValueError for a slot to which nothing was sent.
        """
        wanted = list(slots)
        while missing := [slot for slot in wanted if slot not in self._answers]:
            waiting = {slot // self._sessions for slot in missing}
            idle = [s for s in missing if not self._awaits(s)]
            if idle:
                raise ValueError(f"nothing was sent to slot {idle[0]}")
            for i, slot, answer in self._hear(waiting, self._timeout_s):
                if isinstance(answer, Broken):
                    self._replace(i, answer.reason)
                else:
                    self._answers[slot] = answer
        answers = {slot: self._answers.pop(slot) for slot in wanted}
        self._remember(answers)
        return {s: a for s, a in answers.items() if isinstance(a, EpisodeAnswer)}

    def _awaits(self, slot: int) -> bool:
        return bool(self._workers) and slot in self._workers[slot // self._sessions].awaited

    def _remember(self, answers: Mapping[int, Answer | Lost]) -> None:
        """Keep the books on live slots; raise the first fault."""
        for slot, answer in answers.items():
            if isinstance(answer, Reset | Observation):
                self._live.add(slot)
            elif isinstance(answer, Lost):
                self._live.discard(slot)
                self._lost[slot] = answer
        faults = {slot: a for slot, a in answers.items() if isinstance(a, Fault)}
        self._live.difference_update(faults)
        for fault in faults.values():
            raise fault.error()

    def _hear(
        self, waiting: Iterable[int], allowed: float
    ) -> list[tuple[int, int, Answer | Broken]]:
        """Wait for news: (worker, slot, answer), at most one of each worker."""
        workers = {i: self._workers[i] for i in waiting}
        left = min(worker.silence_left(allowed) for worker in workers.values())
        ready = connection.wait([w.pipe for w in workers.values()], timeout=max(0.0, left))
        news: list[tuple[int, int, Answer | Broken]] = []
        for i, worker in workers.items():
            if worker.pipe in ready:
                if (received := worker.receive()) is not None:
                    news.append((i, *received))
            elif worker.silence_left(allowed) <= 0:
                news.append((i, SPARE, Broken(f"no answer for {allowed:g} seconds")))
        return news

    def _replace(self, i: int, reason: str) -> Lost:
        """Put a new worker in the place of worker `i`; its episodes are lost."""
        worker = self._workers[i]
        worker.stop()
        lost = Lost(f"worker {i} of environment {self._name!r}: {reason}")
        self._answers.update({slot: lost for slot in worker.awaited if slot != SPARE})
        self._note_failure(i, worker.answered, lost.reason)
        self._workers[i] = Worker(self._name, self._options)
        return lost

    def _note_failure(self, i: int, answered: bool, reason: str) -> None:
        self.restarts += 1
        mine = range(i * self._sessions, (i + 1) * self._sessions)
        self._answers.update({slot: Lost(reason) for slot in mine if slot in self._answers})
        self._lost.update({slot: Lost(reason) for slot in self._live.intersection(mine)})
        self._live.difference_update(mine)
        self._failures[i] = 0 if answered else self._failures[i] + 1
        if self._failures[i] >= ATTEMPTS:
            self._failures[i] = 0
            raise EnvError(f"failed {ATTEMPTS} times in a row before the first answer: {reason}")

    def _answer_here(self, batch: Sequence[tuple[int, Request]]) -> dict[int, Answer | Lost]:
        """The same as a worker does, in this process."""
        answers: dict[int, Answer | Lost] = {}
        for slot, request in batch:
            try:
                answers[slot] = self._here.answer(slot, request)
                self._here_answered = True
            except Exception as error:
                self._here.close()
                self._here = Sessions(self._name, self._options)
                reason = f"environment {self._name!r}: {describe(error)}"
                answered, self._here_answered = self._here_answered, False
                self._note_failure(0, answered, reason)
                return {slot: Lost(reason) for slot, _ in batch}
        return answers

    def experts(self, refs: Sequence[tuple[str, int]]) -> list[tuple[str, ...] | None]:
        """Commands that solve each (task, variation), or None where the environment knows none.

        Runs in environments of its own, so live episodes go on undisturbed (unless a worker dies).
        EnvError when the same instance fails `ATTEMPTS` times, or is unknown.
        """
        plans = self._plans([ExpertRequest(*ref) for ref in refs])
        return [None if plan is None else tuple(command.text for command in plan) for plan in plans]

    def wandering_experts(
        self,
        refs: Sequence[tuple[str, int]],
        *,
        noise: float,
        max_steps: int,
        seed: int = 0,
        valid_only: bool = False,
        expert: ExpertKind = "oracle",
        alternatives: int = 0,
        memory: int = 0,
    ) -> list[tuple[Command, ...] | None]:
        """The same with experts that err (wandering.py), only where `EnvInfo.replans`. Where the
        erring one does not reach the goal in time, the plan is the faultless one; where one
        that searches does not, there is none."""
        return self._plans(
            [
                ExpertRequest(
                    *ref, noise, max_steps, seed, valid_only, expert, alternatives, memory
                )
                for ref in refs
            ]
        )

    def advice(self, requests: Sequence[AdviceRequest]) -> list[tuple[Advice, ...]]:
        """What the expert thinks of the states on each way, only where `EnvInfo.replans`. Like
        `experts`, in environments of its own."""
        return [
            tuple(a for a in way or () if isinstance(a, Advice)) for way in self._search(requests)
        ]

    def _plans(self, requests: Sequence[ExpertRequest]) -> list[tuple[Command, ...] | None]:
        return [
            None if plan is None else tuple(c for c in plan if isinstance(c, Command))
            for plan in self._search(requests)
        ]

    def _search(self, requests: Sequence[SpareRequest]) -> list[SpareAnswer]:
        if not self.slots:
            raise ValueError("the pool is closed")
        try:
            return self._searched(requests)
        finally:  # after a fault nobody waits for the others any more
            for worker in self._workers:
                worker.awaited.pop(SPARE, None)

    def _searched(self, requests: Sequence[SpareRequest]) -> list[SpareAnswer]:
        found: dict[int, SpareAnswer] = {}
        failed = [0] * len(requests)
        todo = deque(range(len(requests)))
        busy: dict[int, int] = {}  # worker -> index of the instance it searches
        while todo or busy:
            for i in range(max(1, len(self._workers))):
                if i not in busy and todo:
                    busy[i] = todo.popleft()
                    if self._workers:
                        self._workers[i].send([(SPARE, requests[busy[i]])])
            for i, answer in self._hear_experts(busy, requests):
                index = busy.pop(i)
                if isinstance(answer, Fault):
                    raise answer.error()
                if isinstance(answer, Lost):
                    failed[index] += 1
                    if failed[index] >= ATTEMPTS:
                        task, variation = requests[index].task, requests[index].variation
                        raise EnvError(
                            f"the expert of {self._name}/{task}/{variation} failed {ATTEMPTS} "
                            f"times: {answer.reason}"
                        )
                    todo.appendleft(index)
                else:
                    assert not isinstance(answer, Reset | Observation | Snapshot)
                    found[index] = answer
        return [found[index] for index in range(len(requests))]

    def _hear_experts(
        self, busy: Mapping[int, int], requests: Sequence[SpareRequest]
    ) -> list[tuple[int, Answer | Lost]]:
        if not self._workers:
            return [(0, self._answer_here([(SPARE, requests[busy[0]])])[SPARE])]
        plans: list[tuple[int, Answer | Lost]] = []
        for i, slot, answer in self._hear(busy, EXPERT_FACTOR * self._timeout_s):
            if isinstance(answer, Broken):
                plans.append((i, self._replace(i, answer.reason)))
            elif slot == SPARE:
                plans.append((i, answer))
            else:
                self._answers[slot] = answer
        return plans

    def close(self) -> None:
        """End all workers and environments; no slots remain. Safe to call twice."""
        self._here.close()
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)  # all at once, so that they end at the same time
        for worker in self._workers:
            worker.stop(grace=5.0)
        self._workers.clear()
        self.slots = 0

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
