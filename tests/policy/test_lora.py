"""Low-rank adapters: what is trained, what is written, what a checkpoint continues."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("peft", reason="needs the lora extra")


from tests.exercises import plain_exercise
from untwine.batch import completion_row
from untwine.config import LoRAConfig, LossConfig, OptimizerConfig, PolicyConfig
from untwine.errors import ModelError
from untwine.policy.loading import Policy, load_policy
from untwine.policy.lora import has_lora, without_lora
from untwine.training.checkpoint import Position, load_optimizer, load_weights, save_checkpoint
from untwine.training.update import Updater

LORA = LoRAConfig(rank=2, alpha=8, target_modules=["q_proj", "down_proj"])
IDS = torch.tensor([[5, 9, 30, 17]])


def adapted(folder: Path, seed: int = 0) -> Policy:
    return load_policy(PolicyConfig(model=str(folder), lora=LORA), tuple, seed)


def trainer(policy: Policy) -> Updater:
    config = OptimizerConfig(lr=1e-2)
    return Updater(policy, config, LossConfig(kl=0.1), temperature=1.0, microbatch_tokens=999)


def train(updater: Updater, steps: int) -> None:
    row = completion_row([5, 9], [30, 17, 8], 1.0)
    for _ in range(steps):
        updater.step([row], plain_exercise(updater.policy, [row]), 1.0)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_only_the_adapters_are_trained_and_they_begin_at_zero(
    policy: Policy, tmp_path: Path
) -> None:
    policy.save(tmp_path)
    small = adapted(tmp_path)
    trained = {n for n, p in small.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # layers, modules, A and B
    assert all("lora_" in name for name in trained)
    hidden, inner = 48, 96
    assert small.parameters == 2 * 2 * ((hidden + hidden) + (inner + hidden))
    torch.testing.assert_close(logits(small.model), logits(policy.model))
    frozen = {n: p.clone() for n, p in small.model.named_parameters() if n not in trained}
    train(trainer(small), 2)
    assert not torch.allclose(logits(small.model), logits(policy.model), atol=1e-3)
    for name, parameter in small.model.named_parameters():
        assert name in trained or torch.equal(parameter, frozen[name])


def test_folders_hold_an_ordinary_model(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "base")
    small = adapted(tmp_path / "base")
    train(trainer(small), 3)
    small.save(tmp_path / "trained")
    assert has_lora(small.model)  # saving leaves the adapters where they are
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert not has_lora(plain)
    torch.testing.assert_close(logits(plain), logits(small.model), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in plain.parameters()) == policy.parameters


def test_a_checkpoint_continues_exactly(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "base")
    unbroken = adapted(tmp_path / "base")
    worker = trainer(unbroken)
    train(worker, 2)
    unbroken.save(tmp_path / "initial")
    reference = without_lora(unbroken.model)
    position = Position("rl", 0, 2, 0, torch.zeros(8, dtype=torch.uint8), random.getstate(), 0)
    saved = save_checkpoint(tmp_path / "c", unbroken.model, worker.optimizer, position, 1)
    train(worker, 2)

    resumed = adapted(tmp_path / "initial", seed=7)
    again = trainer(resumed)
    # The reference of the KL term is the same model, bit for bit.
    assert again.reference is not None
    assert torch.equal(logits(again.reference.model), logits(reference))
    load_weights(saved, resumed.model)
    load_optimizer(saved, again.optimizer)
    again.steps, again.reference = 2, worker.reference
    train(again, 2)
    for (name, a), b in zip(
        resumed.model.named_parameters(), unbroken.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_the_seed_decides_where_adapters_begin(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)

    def first(seed: int) -> torch.Tensor:
        parameters = dict(adapted(tmp_path, seed).model.named_parameters())
        return next(p.detach() for n, p in parameters.items() if "lora_A" in n)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_a_layer_that_is_not_there_is_named(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    config = PolicyConfig(model=str(tmp_path), lora=LoRAConfig(rank=1, target_modules=["c_attn"]))
    with pytest.raises(ModelError, match=r"'c_attn', but .* down_proj, gate_proj"):
        load_policy(config, tuple)
