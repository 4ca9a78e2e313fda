"""Muon: orthogonal steps for the matrices of the layers, AdamW for the rest, exact resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gcd.test_training import recipe
from tests.runs import in_one_and_in_two
from untwine.config import OptimizerConfig, Recipe
from untwine.policy.loading import Policy
from untwine.training.checkpoint import fill_optimizer, optimizer_tensors
from untwine.training.optimizers import Muon, layer_matrices, make_optimizer

CONFIG = OptimizerConfig(name="muon", lr=0.01)


def with_gradients(policy: Policy, seed: int = 0) -> list[torch.nn.Parameter]:
    """The parameters, each with a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(policy.model.parameters())
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    return parameters


def test_matrices_of_the_layers_and_nothing_else(policy: Policy) -> None:
    known = set(map(id, layer_matrices(policy)))
    for name, parameter in policy.model.named_parameters():
        assert (id(parameter) in known) == ("proj" in name), name


def test_steps_are_orthogonal_and_as_large_as_adamw_would_make_them(policy: Policy) -> None:
    """Against the singular vectors of the gradient. The Newton-Schulz iteration brings singular
    values near 1 that are not too small beside the largest; the size is .2 for the root of the mean
    square of the entries of a full-rank step."""
    parameters = with_gradients(policy)
    before = [p.detach().clone() for p in parameters]
    make_optimizer(CONFIG, policy, parameters).step()
    known = set(map(id, layer_matrices(policy)))
    seen = 0
    for p, old in zip(parameters, before, strict=True):
        if id(p) not in known:
            continue
        assert p.grad is not None
        left, sizes, right = torch.linalg.svd(p.grad.double(), full_matrices=False)
        step = (old - p.detach()).double() / (0.01 * 0.2 * max(p.shape) ** 0.5)
        turned = left.T @ step @ right.T
        values = turned.diagonal()[sizes > 0.1 * sizes[0]]
        assert len(values) > 0.8 * len(sizes)
        assert values.min() > 0.5
        assert values.max() < 1.4
        assert values.mean() == pytest.approx(0.9, abs=0.2)
        assert (turned - turned.diagonal().diag()).abs().max() < 0.1
        seen += 1
    assert seen >= 7


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_pytorch_but_for_its_rounding(policy: Policy, decay: float) -> None:
    """Ten steps against `torch.optim.Muon`, which rounds to bfloat16 (2 to the power of -8)."""
    config = CONFIG.model_copy(update={"weight_decay": decay})
    ours = layer_matrices(policy)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    optimizer = make_optimizer(config, policy, ours)
    reference = torch.optim.Muon(
        theirs, lr=0.01, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
    )
    for seed in range(10):
        with_gradients(policy, seed)
        for p, copy in zip(ours, theirs, strict=True):
            assert p.grad is not None
            copy.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, copy, old in zip(ours, theirs, before, strict=True):
        assert (p - copy).norm() < 0.02 * (copy - old).norm()


def test_everything_else_is_stepped_by_adamw(policy: Policy) -> None:
    parameters = with_gradients(policy)
    known = set(map(id, layer_matrices(policy)))
    others = [p for p in parameters if id(p) not in known]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in others]
    plain = torch.optim.AdamW(copies, lr=0.01, betas=CONFIG.betas, weight_decay=0.0)
    optimizer = make_optimizer(CONFIG, policy, parameters)
    for rate in (0.01, 0.002):
        for copy, p in zip(copies, others, strict=True):
            assert p.grad is not None
            copy.grad = p.grad.clone()
        for group in [*plain.param_groups, *optimizer.param_groups]:
            group["lr"] = rate
        plain.step()
        optimizer.step()
    for copy, p in zip(copies, others, strict=True):
        assert torch.equal(copy, p)


def test_state_that_was_saved_goes_on_the_same(policy: Policy) -> None:
    first = make_optimizer(CONFIG, policy, with_gradients(policy))
    first.step()
    kept = optimizer_tensors(first)
    assert len(kept) > len(list(policy.model.parameters()))
    weights = [p.detach().clone() for p in policy.model.parameters()]
    first_end = after_another_step(first, policy)
    with torch.no_grad():
        for p, old in zip(policy.model.parameters(), weights, strict=True):
            p.copy_(old)
    second = make_optimizer(CONFIG, policy, list(policy.model.parameters()))
    fill_optimizer(second, kept)
    for ours, theirs in zip(after_another_step(second, policy), first_end, strict=True):
        assert torch.equal(ours, theirs)


def after_another_step(optimizer: torch.optim.Optimizer, policy: Policy) -> list[torch.Tensor]:
    parameters = with_gradients(policy, seed=1)
    optimizer.step()
    return [p.detach().clone() for p in parameters]


def test_without_matrices_it_is_adamw(policy: Policy) -> None:
    vectors = [p for p in policy.model.parameters() if p.ndim == 1]
    assert isinstance(make_optimizer(CONFIG, policy, vectors), torch.optim.AdamW)
    assert isinstance(make_optimizer(OptimizerConfig(), policy, vectors), torch.optim.AdamW)
    assert isinstance(make_optimizer(CONFIG, policy, list(policy.model.parameters())), Muon)


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path: Path) -> None:
    def made(iterations: int) -> Recipe:
        muon: dict[str, Any] = {"optimizer": {"name": "muon", "lr": 1e-3}}
        cold: dict[str, Any] = {"optimizer": {"name": "muon", "lr": 1e-2}}
        return recipe(iterations, rl=muon, cold_start=cold)

    in_one_and_in_two(tmp_path, made, 2)
