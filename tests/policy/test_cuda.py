"""The whole way on a GPU, against the CPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from untwine.batch import completion_row
from untwine.config import PolicyConfig, SamplingConfig, TinyConfig
from untwine.errors import ModelError
from untwine.policy.loading import Policy, check_exactness, load_policy
from untwine.policy.sampler import Sampler
from untwine.scoring import score

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


def test_heads_that_are_too_narrow_are_said(policy: Policy, tmp_path: Path) -> None:
    tiny = TinyConfig(hidden_size=32, layers=1, heads=4, kv_heads=2, intermediate_size=48)
    texts = [policy.tokenizer.decode(range(3, len(policy.tokenizer)))]
    load_policy(PolicyConfig(model="tiny", device="cpu", tiny=tiny), lambda: texts).save(tmp_path)
    with pytest.raises(ModelError, match="have 8 dimensions"):
        on("cuda", tmp_path)
