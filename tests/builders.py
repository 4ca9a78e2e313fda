"""Hand-made records for tests."""

from __future__ import annotations

from collections.abc import Sequence

from untwine.records import Episode, Group, Label, Step, TaskRef

REF = TaskRef("rooms", "fetch", 0)


def make_step(
    index: int = 0,
    *,
    state: str = "s0",
    after: str = "s1",
    command: str | None = "go north",
    invalid: str | None = None,
    prompt: Sequence[int] = (1, 2, 3),
    action: Sequence[int] = (4, 5),
    reward: float = 0.0,
    done: bool = False,
    advantage: float | None = None,
    labels: tuple[Label, ...] = (),
    allowed: tuple[tuple[int, ...], ...] | None = None,
) -> Step:
    return Step(
        index=index,
        state_key=state,
        observation=f"observation of {state}",
        prompt_ids=tuple(prompt),
        action_ids=tuple(action),
        logprobs=tuple(-0.5 - 0.1 * i for i in range(len(action))),
        text=command or "gibberish",
        thought=None,
        command=command,
        invalid=invalid,
        next_state_key=after,
        feedback=f"observation of {after}",
        score=0.0,
        outcome=0.0,
        reward=reward,
        done=done,
        allowed=allowed,
        labels=labels,
        advantage=advantage,
    )


def make_episode(
    outcome: float,
    steps: Sequence[Step],
    *,
    id: str = "e0",
    ref: TaskRef = REF,
    success: bool | None = None,
) -> Episode:
    solved = outcome == 1.0 if success is None else success
    return Episode(
        id=id,
        ref=ref,
        goal="fetch the apple",
        steps=tuple(steps),
        outcome=outcome,
        score=100 * outcome,
        success=solved,
        ended="success" if solved else "limit",
    )


def make_group(outcomes: Sequence[float], lengths: Sequence[int] | None = None) -> Group:
    lengths = lengths or [2] * len(outcomes)
    episodes = [
        make_episode(
            r, [make_step(t, state=f"s{t}", after=f"s{t + 1}") for t in range(n)], id=f"e{g}"
        )
        for g, (r, n) in enumerate(zip(outcomes, lengths, strict=True))
    ]
    return Group(REF, tuple(episodes))
