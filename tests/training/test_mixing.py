"""How the verdict loss joins: gradients against separate backward passes, steps against AdamW."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import make_episode, make_step
from tests.exercises import plain_exercise
from untwine.batch import Row, completion_row
from untwine.config import (
    GCDConfig,
    LoRAConfig,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    PromptConfig,
)
from untwine.errors import ConfigError
from untwine.gcd.entering import closed_parameters
from untwine.gcd.objectives import Means, make_objective
from untwine.policy.loading import Policy, load_policy
from untwine.prompting.prompter import Prompter
from untwine.records import Label
from untwine.training.update import Updater

Gradients = dict[str, torch.Tensor]


def policy_batch() -> list[Row]:
    rows = []
    for k in range(4):
        row = completion_row([5, 6, *range(20 + k, 28 + k)], [30 + k, 31], 1 / 4)
        sign = torch.full((2,), (-1.0) ** k).numpy()
        rows.append(Row(row.ids, row.targets, row.weights, row.old_logprobs - 5, sign))
    return rows


def verdict_batch() -> list[Row]:
    return [completion_row([5, 9, *range(40, 46 + k)], [7 + k % 2], 1 / 4) for k in range(4)]


def updater(policy: Policy, lr: float = 1e-12, **gcd: Any) -> Updater:
    return Updater(
        policy,
        OptimizerConfig(lr=lr, grad_clip=1e9),
        LossConfig(),
        temperature=1.0,
        microbatch_tokens=10_000,
        gcd=GCDConfig(**gcd),
    )


def gradients(policy: Policy, rows: list[Row], verdicts: list[Row], weight: float) -> Gradients:
    """Of a joint step with fixed weight; 0 where there is none."""
    copied = Policy(
        copy.deepcopy(policy.model), policy.tokenizer, policy.chat, policy.device, policy.dtype, "x"
    )
    updater(copied).step(rows, plain_exercise(copied, verdicts) if verdicts else None, weight)
    return of(copied)


def of(policy: Policy) -> Gradients:
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in policy.model.named_parameters()
    }


def norm(gradients: Gradients) -> float:
    return float(torch.cat([g.flatten().double() for g in gradients.values()]).norm())


def test_held_ratio(policy: Policy) -> None:
    first = gradients(policy, policy_batch(), [], 0.0)
    second = gradients(policy, [], verdict_batch(), 1.0)
    weight = 0.4 * norm(first) / norm(second)
    exercise = plain_exercise(policy, verdict_batch())
    found = updater(policy, weight_of="gradient").step(policy_batch(), exercise, 0.4).values
    assert found["gcd_lambda"] == pytest.approx(weight, rel=1e-4)
    assert found["grad_norm_policy"] == pytest.approx(norm(first), rel=1e-4)
    assert found["grad_norm_gcd"] == pytest.approx(norm(second), rel=1e-4)
    for name, value in of(policy).items():
        torch.testing.assert_close(value, first[name] + weight * second[name], rtol=1e-4, atol=1e-6)


def test_the_ratio_is_that_of_the_weights_that_act(policy: Policy) -> None:
    """A head's own weights learn from the plain gradient; at 0 none passes to the policy."""
    prompter = Prompter(policy.chat, PromptConfig())
    config = GCDConfig(objective="head", weight_of="gradient")
    objective = make_objective("head", Means(policy, prompter, config))
    assert objective is not None
    head: Any = objective.module
    labels = (Label("rule", "good", "progress"), Label("rule", "flawed", "invalid"))
    steps = [make_step(t, state=f"s{t}", labels=(labels[t % 2],)) for t in range(4)]
    exercise = objective.exercise([make_episode(0.0, steps)], random.Random(0), torch.Generator())
    assert exercise is not None
    first = gradients(policy, policy_batch(), [], 0.0)

    def stepped() -> tuple[Gradients, Gradients]:
        """The gradients of a step with ratio .4 on the policy, and of the verdict loss alone."""
        for p in [*policy.model.parameters(), *head.parameters()]:
            p.grad = None
        exercise.loss(exercise.rows)[0].backward()  # type: ignore[no-untyped-call]
        alone, own = of(policy), head.weight.grad.clone()
        worker = Updater(
            policy,
            OptimizerConfig(lr=1e-12, grad_clip=1e9),
            LossConfig(),
            temperature=1.0,
            microbatch_tokens=10_000,
            gcd=config,
            module=head,
        )
        worker.step(policy_batch(), exercise, 0.4)
        torch.testing.assert_close(head.weight.grad, own)
        return of(policy), alone

    found, alone = stepped()
    assert norm(alone) == 0
    for name, value in found.items():
        torch.testing.assert_close(value, first[name])
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-0.01, 0.01, head.weight.numel())[None])
    found, alone = stepped()
    weight = 0.4 * norm(first) / norm(alone)
    for name, value in found.items():
        torch.testing.assert_close(value, first[name] + weight * alone[name], rtol=1e-4, atol=1e-6)


def test_held_ratio_without_one_of_the_losses(policy: Policy) -> None:
    """A share of no gradient is none: the momentum of earlier steps does not go on, either."""
    worker = updater(policy, weight_of="gradient")
    for group in worker.optimizer.param_groups:
        group["lr"] = 1e-3
    worker.config = worker.config.model_copy(update={"lr": 1e-3})
    exercise = plain_exercise(policy, verdict_batch())
    begun = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    worker.step(policy_batch(), exercise, 0.4)
    assert norm(of(policy)) > 0
    stepped = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    assert all(not torch.equal(stepped[name], begun[name]) for name in begun)
    assert worker.step([], exercise, 0.4).values["gcd_lambda"] == 0.0
    assert all(torch.equal(p, stepped[name]) for name, p in policy.model.named_parameters())
    worker.step(policy_batch(), None, 0.4)
    assert norm(of(policy)) > 0


def doubled(rows: list[Row]) -> list[Row]:
    """With twice the gradient."""
    return [Row(r.ids, r.targets, 2 * r.weights, r.old_logprobs, r.advantages) for r in rows]


def test_norms_hold_until_they_are_measured_again(policy: Policy) -> None:
    first = gradients(policy, policy_batch(), [], 0.0)
    second = gradients(policy, [], verdict_batch(), 1.0)
    quotient = norm(first) / norm(second)
    worker = updater(policy, weight_of="gradient", norms_every=3)
    exercise = plain_exercise(policy, verdict_batch())
    measured, kept, other, anew = (
        worker.step(doubled(policy_batch()) if k else policy_batch(), exercise, ratio).values
        for k, ratio in enumerate((0.4, 0.4, 0.1, 0.4))
    )
    assert ["grad_norm_policy" in found for found in (measured, kept, other, anew)] == [
        *(True, False, False, True)
    ]
    weights = [found["gcd_lambda"] for found in (measured, kept, other, anew)]
    assert weights == pytest.approx(
        [0.4 * quotient, 0.4 * quotient, 0.1 * quotient, 0.8 * quotient], rel=1e-4
    )
    worker.step(policy_batch(), exercise, 0.4)  # in one backward pass
    for name, value in of(policy).items():
        expected = first[name] + 0.8 * quotient * second[name]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_where_norms_do_not_hold(policy: Policy) -> None:
    """No verdicts are taught without a policy loss, and what was measured outlasts such steps."""
    worker = updater(policy, weight_of="gradient", norms_every=5)
    exercise = plain_exercise(policy, verdict_batch())
    known = worker.step(policy_batch(), exercise, 0.4).values["gcd_lambda"]
    assert worker.step([], exercise, 0.4).values["gcd_lambda"] == 0.0
    assert norm(of(policy)) == 0.0
    assert worker.step(policy_batch(), exercise, 0.4).values["gcd_lambda"] == known
    again = updater(policy, weight_of="gradient", norms_every=5)
    again.load_extra_state(worker.extra_state())
    again.steps = worker.steps
    assert again.step(doubled(policy_batch()), exercise, 0.4).values["gcd_lambda"] == known


def test_own_steps_are_two_adams(policy: Policy) -> None:
    """Two optimizers of torch, fed with gradients of separate backward passes."""
    other = copy.deepcopy(policy.model)
    copied = Policy(other, policy.tokenizer, policy.chat, policy.device, policy.dtype, "reference")
    adams = [torch.optim.AdamW(other.parameters(), lr=x, betas=(0.9, 0.98), weight_decay=0.0)
             for x in (1e-3, 0.3e-3)]  # fmt: skip
    worker = updater(policy, lr=1e-3, step="own")
    for _ in range(3):
        measures = worker.step(policy_batch(), plain_exercise(policy, verdict_batch()), 0.3)
        assert {"grad_norm", "grad_norm_gcd"} <= measures.values.keys()
        both = [
            gradients(copied, policy_batch(), [], 1.0),
            gradients(copied, [], verdict_batch(), 1.0),
        ]
        for adam, found in zip(adams, both, strict=True):
            for name, p in other.named_parameters():
                p.grad = found[name]
            adam.step()
    assert worker.steps == 3
    for ours, theirs in zip(policy.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_own_steps_survive_a_checkpoint(policy: Policy) -> None:
    """The moments of the second optimizer come back bit for bit."""
    worker = updater(policy, lr=1e-3, step="own")
    exercise = plain_exercise(policy, verdict_batch())
    worker.step(policy_batch(), exercise, 0.3)
    again = updater(policy, lr=1e-3, step="own")
    again.load_extra_state(worker.extra_state())
    assert worker.own is not None
    assert again.own is not None
    ours, theirs = again.own.state_dict()["state"], worker.own.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert len(theirs) > 5
    for key, values in theirs.items():
        for name, value in values.items():
            assert torch.equal(ours[key][name], value)


def test_from_a_layer_on(policy: Policy) -> None:
    """Layers before it and the embedding get nothing, the others exactly what they get anyhow."""
    whole = gradients(policy, [], verdict_batch(), 1.0)
    worker = updater(policy, gradient="layers", from_layer=1)
    worker.step([], plain_exercise(policy, verdict_batch()), 1.0)
    found = of(policy)
    opened = 0
    for name, value in found.items():
        if "layers.0." in name or "embed_tokens" in name:
            assert not value.any(), name
        else:
            torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-7)
            opened += 1
    assert opened > 5
    assert all(p.requires_grad for p in policy.model.parameters())


def test_the_policy_loss_still_enters_everywhere(policy: Policy) -> None:
    whole = gradients(policy, policy_batch(), [], 0.0)
    worker = updater(policy, gradient="layers", from_layer=1)
    worker.step(policy_batch(), plain_exercise(policy, verdict_batch()), 1.0)
    found = of(policy)
    first = [name for name in found if "layers.0." in name]
    assert first
    for name in first:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-8)


def test_layers_that_are_not_there(policy: Policy) -> None:
    assert closed_parameters(policy, "layers", 0) == []
    with pytest.raises(ConfigError, match="2 layers, numbered from 0; choose at most 1"):
        updater(policy, gradient="layers", from_layer=2)


def test_adapters_only(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set policy\.lora\.rank=8"):
        updater(policy, gradient="lora")
    policy.save(tmp_path)
    lora = LoRAConfig(rank=2, target_modules=["q_proj"], freeze=False)
    both = load_policy(PolicyConfig(model=str(tmp_path), lora=lora), tuple)
    worker = updater(both, gradient="lora")
    worker.step([], plain_exercise(both, verdict_batch()), 1.0)
    moved = {name for name, value in of(both).items() if value.any()}
    assert moved
    assert all("lora_" in name for name in moved)
    worker.step(policy_batch(), None, 1.0)
    assert any("lora_" not in name and value.any() for name, value in of(both).items())


def test_an_own_step_holds_no_ratio() -> None:
    with pytest.raises(ValueError, match="an own step has nothing to hold a ratio to"):
        GCDConfig(step="own", weight_of="gradient")
