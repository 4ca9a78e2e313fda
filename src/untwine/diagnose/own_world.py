"""The true advantage of actions in a world of your own: three callables, no run and no model.

The estimator is that of `branching.py`: with q = pi(a|s),

    A*(s, a) = (1 - q) (Q(s, a) - E[return | another action])

from pairs of episodes that go on from s, one with a and one with an action of the policy that
differs from it, until the verdict is clear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from untwine.diagnose.branching import Estimate, Settings, judge
from untwine.errors import UntwineError

State = TypeVar("State")
Seen = TypeVar("Seen")
Action = TypeVar("Action")

_DRAWS = 16  # actions drawn at a state, at most this many times the pairs wanted


def true_advantages(
    questions: Sequence[tuple[State, Action]],
    *,
    restore: Callable[[State], Seen],
    step: Callable[[Action], tuple[Seen, float, bool]],
    act: Callable[[Seen], Action],
    steps_left: int | Sequence[int],
    probabilities: Sequence[float] | None = None,
    settings: Settings | None = None,
) -> list[Estimate]:
    """Q, V and A* with intervals for each (state, action), by playing on with the policy.

    restore        puts the world into a state and returns what the policy reads there
    step           does an action: what the policy reads next, the return R in [0, 1] were the
                   episode to end now, and whether it is over
    act            draws an action of the policy
    steps_left     actions until the step limit, the judged one included
    probabilities  pi(a|s) of each question, where known: intervals are narrower
    settings       what counts as clear, and what it may cost
    UntwineError when lengths differ or a return is outside [0, 1]. Where the policy never does
    anything else at a state, the answer is neutral: its pi(a|s) is 1, and A* is 0.
    """
    settings = settings or Settings()
    count = len(questions)
    left = [steps_left] * count if isinstance(steps_left, int) else list(steps_left)
    known: list[float | None] = [None] * count if probabilities is None else list(probabilities)
    if len(left) != count or len(known) != count:
        raise UntwineError(
            f"{count} questions but {len(left)} steps_left and {len(known)} probabilities"
        )
    if any(n < 1 for n in left) or any(q is not None and not 0 <= q <= 1 for q in known):
        raise UntwineError("steps_left must be at least 1, and probabilities lie in [0, 1]")

    def play(state: State, action: Action, steps: int) -> float:
        restore(state)
        for n in range(steps):
            seen, value, over = step(action)
            if over or n == steps - 1:
                break
            action = act(seen)
        if not 0 <= value <= 1:
            raise UntwineError(f"a return must lie in [0, 1], and `step` gave {value}")
        return float(value)

    return [
        _estimate(state, action, steps, q, restore, act, play, settings)
        for (state, action), steps, q in zip(questions, left, known, strict=True)
    ]


def _estimate(
    state: State,
    action: Action,
    steps: int,
    q: float | None,
    restore: Callable[[State], Seen],
    act: Callable[[Seen], Action],
    play: Callable[[State, Action, int], float],
    settings: Settings,
) -> Estimate:
    values: list[float] = []
    after_action: list[float] = []
    same = drawn = 0
    share = 1.0 if q is None else 1.0 - q
    for planned in settings.looks():
        while len(values) < planned and drawn < _DRAWS * settings.branches:
            other = act(restore(state))
            drawn += 1
            if other != action:
                after_action.append(play(state, action, steps))
                values.append(share * (after_action[-1] - play(state, other, steps)))
                continue
            same += 1
            if q is None:
                values.append(0.0)
        shown = same / max(1, drawn) if q is None else q
        found = judge(values, after_action, shown, settings, known_q=q is not None)
        if found.clear or len(values) < planned:
            break
    return found
