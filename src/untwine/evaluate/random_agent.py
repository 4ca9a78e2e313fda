"""The floor of every table: an agent that takes a random admissible command at each step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from untwine.envs.pool import EnvPool, Lost, ResetRequest, StepRequest
from untwine.envs.protocol import Reset
from untwine.errors import EnvError
from untwine.records import Episode, Group, Observation, Step, TaskRef

_MAX_LOST = 20


def play_random(
    pool: EnvPool,
    refs: Sequence[TaskRef],
    max_steps: int,
    seed: int,
    on_turn: Callable[[int, int], None] | None = None,
) -> list[Group]:
    """One episode of every ref. The pool's environments must list their commands with every
    observation (option `list_commands`)."""
    rng = random.Random(seed)
    waiting = list(enumerate(refs))[::-1]
    finished: dict[int, Episode] = {}
    running: dict[int, tuple[int, Observation, str, list[Step]]] = {}
    lost = 0
    while waiting or running:
        if on_turn:
            on_turn(len(finished), len(refs))
        free = [slot for slot in range(pool.slots) if slot not in running][: len(waiting)]
        starting = {slot: waiting.pop() for slot in free}
        starts = pool.call(
            {s: ResetRequest(ref.task, ref.variation) for s, (_, ref) in starting.items()}
        )
        for slot, start in starts.items():
            if isinstance(start, Reset):
                running[slot] = (starting[slot][0], start.observation, start.goal, [])
            else:
                waiting.append(starting[slot])
                lost += 1
        commands = {slot: _choose(now, rng) for slot, (_, now, _, _) in running.items()}
        answers = pool.call({slot: StepRequest(c) for slot, c in commands.items()})
        for slot, answer in answers.items():
            index, now, goal, steps = running.pop(slot)
            if isinstance(answer, Lost):
                waiting.append((index, refs[index]))
                lost += 1
                continue
            assert isinstance(answer, Observation)
            steps.append(Step.played(len(steps), now, commands[slot], answer))
            if answer.done or len(steps) >= max_steps:
                finished[index] = _episode(refs[index], index, goal, steps, answer)
            else:
                running[slot] = (index, answer, goal, steps)
        if lost > _MAX_LOST:
            raise EnvError("environment workers keep dying; see `untwine doctor`")
    return [Group(ref, (finished[i],)) for i, ref in enumerate(refs)]


def _choose(observation: Observation, rng: random.Random) -> str:
    if not observation.admissible:
        raise EnvError("the random agent needs an environment that lists its commands")
    return rng.choice(observation.admissible)


def _episode(ref: TaskRef, index: int, goal: str, steps: list[Step], last: Observation) -> Episode:
    ended = "limit" if not last.done else "success" if last.success else "failure"
    return Episode(
        id=f"random-{index:04d}",
        ref=ref,
        goal=goal,
        steps=tuple(steps),
        outcome=last.outcome,
        score=last.score,
        success=last.success,
        ended=ended,  # type: ignore[arg-type]
    )
