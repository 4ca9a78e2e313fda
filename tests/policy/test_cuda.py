"""The whole way on a GPU, against the CPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exercises import plain_exercise
from untwine.batch import completion_row
from untwine.config import (
    GCDConfig,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    TinyConfig,
)
from untwine.errors import ModelError
from untwine.policy.loading import Policy, check_exactness, load_policy
from untwine.policy.sampler import Sampler
from untwine.scoring import score
from untwine.training.update import Updater

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = {0: [5, 9, 30, 17], 1: [5, 9, 30, 17, 44, 80, 12], 2: [7]}


def on(device: str, folder: Path, **changes: Any) -> Policy:
    return load_policy(PolicyConfig(model=str(folder), device=device, **changes), tuple)


@pytest.fixture
def folder(policy: Policy, tmp_path: Path) -> Path:
    """A tiny model whose heads are wide enough for the kernels of a GPU."""
    tiny = TinyConfig(hidden_size=64, layers=2, heads=4, kv_heads=2, intermediate_size=96)
    texts = [policy.tokenizer.decode(range(3, len(policy.tokenizer)))]
    load_policy(PolicyConfig(model="tiny", device="cpu", tiny=tiny), lambda: texts).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("dtype", "near"), [("float32", 2e-3), ("bfloat16", 0.1)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_replies_scores_and_gradients(
    folder: Path, dtype: Any, near: float, checkpointing: bool
) -> None:
    theirs = on("cpu", folder)
    ours = on("cuda", folder, dtype=dtype, gradient_checkpointing=checkpointing)
    check_exactness(ours, Sampler(ours, SamplingConfig(), torch.Generator()).logits_piecewise)
    sampler = Sampler(ours, SamplingConfig(max_new_tokens=9), torch.Generator().manual_seed(0))
    prompts = {slot: list(prompt) for slot, prompt in PROMPTS.items()}
    for _ in range(2):  # the second turn reads kept keys and values
        samples = sampler.sample(prompts)
        rows = [completion_row(prompts[s], x.ids, 1 / len(x.ids)) for s, x in samples.items()]
        sampled = torch.tensor([p for x in samples.values() for p in x.logprobs])
        found = []
        for policy in (theirs, ours):
            policy.model.zero_grad()
            targets = score(policy, rows)
            torch.testing.assert_close(
                targets.logprobs_N.detach().float().cpu(), sampled, atol=near, rtol=0
            )
            (targets.weights_N * targets.logprobs_N).sum().backward()
            grads = [p.grad.float().cpu().flatten() for p in policy.model.parameters()]
            found.append(torch.cat(grads))
        assert (found[1] - found[0]).norm() <= near * 5 * found[0].norm()
        prompts = {s: [*prompts[s], *x.ids, 21, 22, 23] for s, x in samples.items()}


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "lora"])
@pytest.mark.parametrize(
    "mixing",
    [{}, {"weight_of": "gradient", "weight": 0.3}, {"step": "own"}],
    ids=["fixed", "held", "own"],
)
def test_optimizer_steps_of_both_losses(folder: Path, mixing: Any, rank: int) -> None:
    """Verdict and policy loss, apart where their norms are measured: as on the CPU. Long and short
    batches, so that more than one kernel is compiled."""
    found = []
    for device in ("cpu", "cuda"):
        policy = on(device, folder, lora={"rank": rank})
        worker = Updater(
            policy,
            OptimizerConfig(lr=1e-2),
            LossConfig(kl=0.1, entropy=0.01),
            temperature=1.0,
            microbatch_tokens=300,
            gcd=GCDConfig(objective="generative/ce", **mixing),
        )
        measures = []
        for length in (8, 200):
            rows = [
                completion_row([5, 6, *range(9, length), 9 + k], [30 + k, 31], 1 / 4)
                for k in range(4)
            ]
            for k, row in enumerate(rows):
                row.advantages[:] = (-1.0) ** k
            asked = [
                completion_row([*row.ids[:-1], 7], [40 + k % 2], 1 / 4)
                for k, row in enumerate(rows)
            ]
            exercise = plain_exercise(policy, asked)
            measures.append(worker.step(rows, exercise, 0.3).values)
        found.append(measures)
    for ours, theirs in zip(found[1], found[0], strict=True):
        for key in ("policy_loss", "gcd_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-2, abs=1e-4)


def test_budgets_are_halved_when_memory_is_short(folder: Path) -> None:
    """Memory that really ends: what is free is taken but for a little."""
    policy = on("cuda", folder, dtype="float32")
    worker = Updater(
        policy, OptimizerConfig(), LossConfig(), temperature=1.0, microbatch_tokens=10**6
    )
    positions = policy.max_positions - 8
    rows = [
        completion_row([5 + k % 90, *([9 + k % 80] * (positions - 40))], [30] * 8, 1 / 64)
        for k in range(64)
    ]
    for k, row in enumerate(rows):
        row.advantages[:] = (-1.0) ** k
    worker.step(rows[:1])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    worker.step(rows[:8])
    need = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    share = (torch.cuda.memory_allocated() + need) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        with pytest.warns(UserWarning, match="out of memory with .* tokens at once"):
            measures = worker.step(rows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert measures.values["out_of_memory"] >= 1
    assert worker.microbatch_tokens < 10**6


def test_heads_that_are_too_narrow_are_said(policy: Policy, tmp_path: Path) -> None:
    tiny = TinyConfig(hidden_size=32, layers=1, heads=4, kv_heads=2, intermediate_size=48)
    texts = [policy.tokenizer.decode(range(3, len(policy.tokenizer)))]
    load_policy(PolicyConfig(model="tiny", device="cpu", tiny=tiny), lambda: texts).save(tmp_path)
    with pytest.raises(ModelError, match="have 8 dimensions"):
        on("cuda", tmp_path)
