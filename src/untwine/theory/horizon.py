"""Several steps: what GRPO's episode advantage says about flawed steps, exactly.

A small random task: S states, A actions, at most H steps; each step may end the episode in success
(return 1) or failure (return 0), and so does the step limit. The policy has its own probabilities
for every step number t and state s, so a "state" below is a pair (t, s).

Backward recursion gives the joint distribution of return and episode length after each (t, s, a);
with the binomial number of other successes in the group (`advantage.expected_advantages`) this is
all that the expected advantage needs: nothing is sampled. For returns 0 or 1,

    E[A_hat | t, s, a] = D_G(V_0) (Q_t(s, a) - V_0),   V_0 the value of the start,

so within a state the *difference* between actions is right, and the expected gradient on the logit
of (t, s, a) is D_G(V_0) d_t(s) pi(a|t, s) A*_t(s, a): negative exactly for flawed actions. The mean
of A_hat over flawed steps is another thing: it also holds V_t(s) - V_0, which is positive for
flawed actions met on good ways. And weights 1 / T, which count every episode the same, break
the affine relation: then the gradient itself can have the wrong sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from untwine.theory.advantage import Array, Normaliser, expected_advantages

Unit = Literal["step", "episode"]
UNITS: tuple[Unit, ...] = ("step", "episode")

FLAWED = 1e-9
"""A step is flawed when its true advantage is below minus this, good when above this."""


@dataclass(frozen=True)
class Tasks:
    """N tasks with their policies.

    moves_NSAX: probabilities of going to state 0..S-1, to success (S), to failure (S + 1).
    policy_NHSA: probabilities of actions at step t in state s.
    start_NS: distribution of the first state.
    """

    moves_NSAX: Array
    policy_NHSA: Array
    start_NS: Array


@dataclass(frozen=True)
class Judgement:
    """What is expected at every (task, step, state, action); arrays (N, H, S, A) unless said.

    visit is d_t(s) pi(a|t, s); truth the true advantage A*; estimate the expected GRPO advantage;
    weighted that of A_hat times the weight of its step (1 or 1 / T); weight the expected weight.
    start_value (N,).
    """

    visit: Array
    truth: Array
    estimate: Array
    weighted: Array
    weight: Array
    gradient: Array
    start_value: Array


def random_tasks(n: int, states: int, actions: int, horizon: int, seed: int) -> Tasks:
    """Tasks with Dirichlet transitions and policies; about a third of the steps end an episode."""
    rng = np.random.default_rng(seed)
    concentration_X = np.r_[np.full(states, 0.6), np.full(2, 0.15 * states)]
    return Tasks(
        rng.dirichlet(concentration_X, size=(n, states, actions)),
        rng.dirichlet(np.ones(actions), size=(n, horizon, states)),
        rng.dirichlet(np.ones(states), size=n),
    )


def ends(tasks: Tasks) -> Array:
    """P(return R, length T | t, s, a) as (N, H, S, A, 2, H + 1), by backward recursion."""
    N, H, S, A = tasks.policy_NHSA.shape
    ends_NHSART = np.zeros((N, H, S, A, 2, H + 1))
    ahead_NSRT = np.zeros((N, S, 2, H + 1))
    ahead_NSRT[:, :, 0, H] = 1.0  # the step limit: failure after H steps
    for t in reversed(range(H)):
        now = np.einsum("nsax,nxrt->nsart", tasks.moves_NSAX[..., :S], ahead_NSRT)
        now[..., 1, t + 1] += tasks.moves_NSAX[..., S]
        now[..., 0, t + 1] += tasks.moves_NSAX[..., S + 1]
        ends_NHSART[:, t] = now
        ahead_NSRT = np.einsum("nsa,nsart->nsrt", tasks.policy_NHSA[:, t], now)
    return ends_NHSART


def visits(tasks: Tasks) -> Array:
    """d_t(s) pi(a | t, s): the probability that step t exists and is (s, a); (N, H, S, A)."""
    N, H, S, A = tasks.policy_NHSA.shape
    visits_NHSA = np.zeros((N, H, S, A))
    here_NS = tasks.start_NS
    for t in range(H):
        visits_NHSA[:, t] = here_NS[..., None] * tasks.policy_NHSA[:, t]
        here_NS = np.einsum("nsa,nsax->nx", visits_NHSA[:, t], tasks.moves_NSAX[..., :S])
    return visits_NHSA


def judge(tasks: Tasks, group_size: int, normaliser: Normaliser, unit: Unit) -> Judgement:
    """Everything expected under GRPO with groups of `group_size`, in the limit of many groups."""
    ends_NHSART = ends(tasks)
    policy, visit = tasks.policy_NHSA, visits(tasks)
    q_NHSA = ends_NHSART[..., 1, :].sum(axis=-1)
    v_NHS = (policy * q_NHSA).sum(axis=-1)
    value_N = (tasks.start_NS * v_NHS[:, 0]).sum(axis=-1)
    advantage_NR = np.stack(expected_advantages(value_N, group_size, normaliser), axis=-1)
    lengths_T = np.arange(ends_NHSART.shape[-1], dtype=np.float64)
    weight_T = np.ones_like(lengths_T) if unit == "step" else 1 / np.maximum(lengths_T, 1)
    estimate = np.einsum("nhsart,nr->nhsa", ends_NHSART, advantage_NR)
    weighted = np.einsum("nhsart,nr,t->nhsa", ends_NHSART, advantage_NR, weight_T)
    baseline_NHS1 = (policy * weighted).sum(axis=-1, keepdims=True)
    return Judgement(
        visit=visit,
        truth=q_NHSA - v_NHS[..., None],
        estimate=estimate,
        weighted=weighted,
        weight=ends_NHSART.sum(axis=-2) @ weight_T,
        gradient=visit * (weighted - baseline_NHS1),
        start_value=value_N,
    )


def mean_over(judgement: Judgement, chosen_NHSA: NDArray[np.bool_]) -> Array:
    """Weighted mean of A_hat over the chosen steps of each task; (N,), NaN where there are none."""
    mass = judgement.visit * chosen_NHSA
    with np.errstate(invalid="ignore"):
        total_N = (mass * judgement.weighted).sum(axis=(1, 2, 3))
        return np.asarray(total_N / (mass * judgement.weight).sum(axis=(1, 2, 3)))


def fork() -> Tasks:
    """A counter-example to work out by hand: flawed actions live on the good way only.

    A coin decides between a hopeless state (always failure) and a good one, where the sound action
    always succeeds and the flawed one fails every fifth time; the policy takes both equally often.
    So V_0 = .45, the flawed action has Q = .8 and A* = -.1, and E[A_hat | flawed] is
    (G - 1) / G * (.8 - .45) > 0.
    """
    moves = np.zeros((1, 2, 2, 4))
    moves[0, 0, :, 3] = 1.0
    moves[0, 1, 0, 2] = 1.0
    moves[0, 1, 1, 2:] = 0.8, 0.2
    return Tasks(moves, np.full((1, 1, 2, 2), 0.5), np.full((1, 2), 0.5))


def detour() -> Tasks:
    """A counter-example for weights 1 / T: the flawed action fails slowly.

    In the first state the sound action succeeds with probability .55 and else fails, at once. The
    flawed one succeeds with .5 at once and else goes to a state from which the episode fails after
    two steps more. Its failures weigh a third, so counted per episode it is reinforced.
    """
    moves = np.zeros((1, 3, 2, 5))
    moves[0, 0, 0, 3:] = 0.55, 0.45
    moves[0, 0, 1, 3], moves[0, 0, 1, 1] = 0.5, 0.5
    moves[0, 1, :, 2] = 1.0
    moves[0, 2, :, 4] = 1.0
    return Tasks(moves, np.full((1, 3, 3, 2), 0.5), np.array([[1.0, 0.0, 0.0]]))


def study(
    n: int, states: int, actions: int, horizon: int, group_size: int, seed: int
) -> dict[str, Any]:
    """How often the mean over flawed steps, and the gradient on their logits, have a wrong sign."""
    tasks = random_tasks(n, states, actions, horizon, seed)
    rows = []
    for normaliser in ("none", "std"):
        for unit in UNITS:
            judgement = judge(tasks, group_size, normaliser, unit)
            rows.append({"normaliser": normaliser, "unit": unit, **_summary(judgement)})
    examples = {}
    for name, task in (("fork", fork()), ("detour", detour())):
        for unit in UNITS:
            judgement = judge(task, group_size, "none", unit)
            flawed = (judgement.truth < -FLAWED) & (judgement.visit > 0)
            examples[f"{name}, {unit}"] = {
                "mean_over_flawed": float(mean_over(judgement, flawed)[0]),
                "gradient_on_flawed": float(judgement.gradient[flawed].sum()),
            }
    return {"tasks": n, "group_size": group_size, "rows": rows, "examples": examples}


def _summary(judgement: Judgement) -> dict[str, Any]:
    flawed = (judgement.truth < -FLAWED) & (judgement.visit > 0)
    good = (judgement.truth > FLAWED) & (judgement.visit > 0)
    mean_flawed, mean_good = mean_over(judgement, flawed), mean_over(judgement, good)
    wrong = flawed & (judgement.gradient > 1e-15)
    worst = int(np.nanargmax(mean_flawed))
    everything = np.ones_like(judgement.visit, dtype=np.bool_)
    return {
        "mean_over_all": float(np.mean(mean_over(judgement, everything))),
        "mean_over_flawed": float(np.nanmean(mean_flawed)),
        "mean_over_good": float(np.nanmean(mean_good)),
        "tasks_flawed_mean_positive": int((mean_flawed > 0).sum()),
        "tasks_flawed_above_good": int((mean_flawed > mean_good).sum()),
        "worst_task": worst,
        "worst_mean_over_flawed": float(mean_flawed[worst]),
        "flawed_places": int(flawed.sum()),
        "flawed_places_pushed_up": int(wrong.sum()),
        "flawed_places_pushed_up_share": float(wrong.sum() / flawed.sum()),
    }
