"""Rows, micro-batches and the policy gradient against step-by-step fp64 references."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.builders import REF, make_episode, make_step
from untwine.batch import LossMean, completion_row, microbatches, policy_rows
from untwine.config import LossConfig, OptimizerConfig
from untwine.credit.grpo import grpo
from untwine.policy.loading import Policy
from untwine.records import Episode, Group, Step
from untwine.scoring import score
from untwine.training.update import Updater


def chat_episode(
    rng: random.Random, id: str, outcome: float, grow: bool, vocabulary: int, constrained: bool
) -> Episode:
    """An episode whose prompts grow (append) or are drawn anew (window). With `constrained`, about
    every other action is a choice among a few ids, some of them after tokens that were free."""
    steps = []
    prompt = [rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, 12))]
    for t in range(rng.randrange(1, 5)):
        action = [rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, 5))]
        allowed = None
        if constrained and rng.random() < 0.6:
            others = [rng.sample(range(3, vocabulary), rng.randrange(4)) for _ in action]
            free = rng.choice([0, 0, 1, 2])
            allowed = tuple(
                () if i < free else tuple({a, *more})
                for i, (a, more) in enumerate(zip(action, others, strict=True))
            )
        steps.append(make_step(t, prompt=prompt, action=action, allowed=allowed))
        tail = [rng.randrange(3, vocabulary) for _ in range(rng.randrange(0, 8))]
        prompt = [*prompt, *action, *tail] if grow else [*prompt[:2], *tail, 7]
    return make_episode(outcome, steps, id=id)


def random_group(
    seed: int, grow: bool, vocabulary: int, constrained: bool = False, size: int = 4
) -> Group:
    rng = random.Random(seed)
    episodes = [
        chat_episode(rng, f"e{g}", rng.choice([0.0, 0.3, 1.0]), grow, vocabulary, constrained)
        for g in range(size)
    ]
    return Group(REF, tuple(episodes))


def reference_gradient(policy: Policy, groups: list[Group], mean: str) -> dict[str, torch.Tensor]:
    """One forward and backward pass per step, in double precision, straight from the definition."""
    model: Any = copy.deepcopy(policy.model).double()
    trained = [[s for s in e.steps if s.advantage is not None] for g in groups for e in g.episodes]
    vocabulary = len(policy.tokenizer)

    def among(step: Step, i: int) -> list[int]:
        """The ids among which a token was chosen."""
        own = step.allowed[i] if step.allowed else ()
        return list(own) if own else list(range(vocabulary))

    def chosen(step: Step) -> list[int]:
        """Indices of the tokens that were not forced."""
        return [i for i in range(len(step.action_ids)) if len(among(step, i)) > 1]

    trained = [[step for step in steps if chosen(step)] for steps in trained]
    trained = [steps for steps in trained if steps]
    all_tokens = sum(len(chosen(s)) for steps in trained for s in steps)
    all_steps = sum(len(steps) for steps in trained)
    for steps in trained:
        episode_tokens = sum(len(chosen(s)) for s in steps)
        for step in steps:
            n, picked = len(step.action_ids), chosen(step)
            unit = {
                "token": 1 / all_tokens,
                "step": 1 / (all_steps * len(picked)),
                "episode": 1 / (len(trained) * episode_tokens),
            }[mean]
            ids = torch.tensor([step.prompt_ids + step.action_ids])
            logits = model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1]
            logps = []
            for i in picked:
                ids_C = among(step, i)
                restricted = logits[i, ids_C].log_softmax(-1)
                logps.append(restricted[ids_C.index(step.action_ids[i])])
            old = torch.tensor(step.logprobs, dtype=torch.float32).double()[picked]
            ratio = (torch.stack(logps) - old).exp()
            clipped = ratio.clamp(0.8, 1.2)
            a = step.advantage
            (-torch.minimum(ratio * a, clipped * a).sum() * unit).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def updater_gradient(
    policy: Policy, groups: list[Group], mean: Any, budget: int
) -> dict[str, torch.Tensor]:
    updater = Updater(
        policy,
        OptimizerConfig(lr=1e-12, grad_clip=1e9),
        LossConfig(mean=mean),
        temperature=1.0,
        microbatch_tokens=budget,
    )
    updater.step(policy_rows(groups, mean))
    return {name: p.grad.double() for name, p in policy.model.named_parameters()}


@pytest.mark.parametrize("mean", ["token", "step", "episode"])
@pytest.mark.parametrize("grow", [True, False])
@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("budget", [40, 100_000])
def test_gradient_equals_separate_steps_in_double_precision(
    policy: Policy, mean: str, grow: bool, constrained: bool, budget: int
) -> None:
    vocabulary = len(policy.tokenizer)
    groups = [random_group(seed, grow, vocabulary, constrained) for seed in range(3)]
    groups = [g.with_advantages(grpo(g)) for g in groups]
    got, want = (
        updater_gradient(policy, groups, mean, budget),
        reference_gradient(policy, groups, mean),
    )
    gap = sum(float(((got[n] - want[n]) ** 2).sum()) for n in want) ** 0.5
    size = sum(float((want[n] ** 2).sum()) for n in want) ** 0.5
    assert size > 0
    assert gap / size < 1e-5


TERMS: Any = {"clip_low": 0.1, "clip_high": 0.4, "kl": 0.3, "entropy": 0.1}
HEAT = 0.7


def heated_logprobs(model: Any, step: Step) -> torch.Tensor:
    """Log-probabilities (n, V) at the tokens of a reply, at the temperature."""
    ids = torch.tensor([step.prompt_ids + step.action_ids])
    n = len(step.action_ids)
    logits = model(input_ids=ids, use_cache=False).logits[0, -n - 1 : -1]
    return (logits / HEAT).log_softmax(-1)


def full_loss_gradient(
    model: Any, frozen: Any, groups: list[Group], mean: str
) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """The whole loss from its definition, step by step in double precision: clipped surrogate, k3
    to the reference, entropy bonus; and every (ratio, advantage)."""
    episodes = [e for g in groups for e in g.episodes]
    all_tokens = sum(len(s.action_ids) for e in episodes for s in e.steps)
    seen = []
    for episode in episodes:
        own_tokens = sum(len(s.action_ids) for s in episode.steps)
        for step in episode.steps:
            unit = {"token": 1 / all_tokens, "episode": 1 / (len(episodes) * own_tokens)}[mean]
            logprobs = heated_logprobs(model, step)
            picked = torch.tensor(step.action_ids)[:, None]
            own = logprobs.gather(-1, picked)[:, 0]
            with torch.no_grad():
                gap = heated_logprobs(frozen, step).gather(-1, picked)[:, 0] - own
            a = step.advantage
            assert a is not None
            ratio = (own - torch.tensor(step.logprobs).double()).exp()
            surrogate = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.4) * a)
            gap = gap + own.detach() - own  # its gradient goes through the policy
            spread = -(logprobs.exp() * logprobs).sum(-1)
            loss = surrogate + 0.3 * (gap.exp() - gap - 1) - 0.1 * spread
            (loss.sum() * unit).backward()
            seen += [(float(r), a) for r in ratio.detach()]
    return {name: p.grad for name, p in model.named_parameters()}, seen


@pytest.mark.parametrize("mean", ["token", "episode"])
@pytest.mark.parametrize("budget", [60, 100_000])
def test_every_term_of_the_loss_equals_separate_steps_in_double_precision(
    policy: Policy, mean: Any, budget: int
) -> None:
    """At a temperature, with unequal clips, of a policy that has moved away from its reference, and
    with ratios on either side of the clips for good and for bad actions."""
    updater = Updater(
        policy,
        OptimizerConfig(lr=1e-12, grad_clip=1e9),
        LossConfig(mean=mean, **TERMS),
        temperature=HEAT,
        microbatch_tokens=budget,
    )
    frozen = copy.deepcopy(policy.model).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.model.parameters():
            p += 0.02 * torch.randn_like(p)
    moved, rng = copy.deepcopy(policy.model).double(), random.Random(0)

    def sampled(step: Step) -> Step:
        with torch.no_grad():
            found = heated_logprobs(moved, step)
        own = found[range(len(step.action_ids)), step.action_ids].tolist()
        return dataclasses.replace(step, logprobs=tuple(x + rng.gauss(0, 0.4) for x in own))

    groups = []
    for seed in range(3):
        group = random_group(seed, True, len(policy.tokenizer))
        group = group.with_advantages(grpo(group))
        episodes = [
            dataclasses.replace(e, steps=tuple(map(sampled, e.steps))) for e in group.episodes
        ]
        groups.append(dataclasses.replace(group, episodes=tuple(episodes)))
    want, seen = full_loss_gradient(moved, frozen, groups, mean)
    for sign in (-1, 1):
        ratios = [r for r, a in seen if sign * a > 0]
        assert min(ratios) < 0.9
        assert max(ratios) > 1.4
        assert any(0.9 < r < 1.4 for r in ratios)
    updater.step(policy_rows(groups, mean))
    got = {name: p.grad.double() for name, p in policy.model.named_parameters()}
    gap = sum(float(((got[n] - want[n]) ** 2).sum()) for n in want) ** 0.5
    size = sum(float((want[n] ** 2).sum()) for n in want) ** 0.5
    assert gap / size < 1e-5


def test_a_growing_chat_becomes_one_row_and_a_window_stays_apart(policy: Policy) -> None:
    grown = random_group(1, True, 100).episodes[0]
    apart = random_group(1, False, 100).episodes[0]
    assert min(grown.length, apart.length) > 1

    def rows_of(episode: Episode) -> int:
        group = Group(REF, (episode,)).with_advantages([[1.0] * episode.length])
        return len(policy_rows([group], "token"))

    assert rows_of(grown) == 1
    assert rows_of(apart) == apart.length


def test_steps_without_advantage_are_context_only() -> None:
    episode = make_episode(
        1.0,
        [make_step(0, prompt=[1, 2], action=[3]), make_step(1, prompt=[1, 2, 3, 4], action=[5, 6])],
    )
    group = Group(REF, (episode,)).with_advantages([[None, 0.5]])
    (row,) = policy_rows([group], "token")
    assert row.ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.targets.tolist() == [4, 5]
    assert row.weights.tolist() == [0.5, 0.5]
    assert policy_rows([group.with_advantages([[None, None]])], "token") == []


@pytest.mark.parametrize("mean", ["token", "step", "episode"])
def test_steps_whose_tokens_were_all_forced_do_not_dilute_the_mean(mean: LossMean) -> None:
    free = make_step(0, prompt=[1], action=[3, 4], allowed=((3, 5), (4,)))
    forced = make_step(1, prompt=[1, 3, 4, 2], action=[6], allowed=((6,),))
    episodes = (make_episode(1.0, [free, forced], id="a"), make_episode(0.0, [forced], id="b"))
    group = Group(REF, episodes).with_advantages([[0.5, 0.5], [-0.5]])
    (row,) = policy_rows([group], mean)
    assert row.targets.tolist() == [1]
    assert row.weights.tolist() == [1.0]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=20), st.integers(1, 200))
def test_microbatches_hold_every_row_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    rows = [completion_row([1] * (n - 1), [2], 1.0) for n in lengths]
    batches = list(microbatches(rows, budget))
    assert sorted(r.length for b in batches for r in b) == sorted(lengths)
    for batch in batches:
        distinct = {tuple(r.ids[: n + 1]) for r in batch for n in range(r.length)}
        assert len(batch) == 1 or len(distinct) <= budget


def test_scores_do_not_depend_on_the_neighbours_in_the_batch(policy: Policy) -> None:
    rows = [completion_row(list(range(5, 5 + n)), [9, 10], 1.0) for n in (3, 17, 8)]
    with torch.no_grad():
        together = score(policy, rows).logprobs_N
        alone = torch.cat([score(policy, [row]).logprobs_N for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
