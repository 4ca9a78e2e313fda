"""Sampling with kept keys and values against plain forward passes."""

from __future__ import annotations

import random

import pytest
import torch

from untwine.config import SamplingConfig
from untwine.policy.loading import Policy, check_exactness
from untwine.policy.sampler import Sampler, _nucleus


def plain_logprobs(
    policy: Policy, prompt: list[int], reply: list[int], temperature: float
) -> torch.Tensor:
    """Independent reference: one row, no cache, no mask, full projection by the model itself."""
    ids = torch.tensor([prompt + reply])
    with torch.no_grad():
        logits = policy.model(input_ids=ids, use_cache=False).logits[0].double() / temperature
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(-1, torch.tensor(reply)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_fresh_forward_over_many_turns(policy: Policy, temperature: float) -> None:
    rng = random.Random(0)
    config = SamplingConfig(temperature=temperature, max_new_tokens=7)
    sampler = Sampler(policy, config, torch.Generator().manual_seed(0))
    vocabulary = len(policy.tokenizer)
    prompts = {
        s: [rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, 30))] for s in range(5)
    }
    for turn in range(5):
        live = [s for s in prompts if (s + turn) % 4]  # some rows sit a turn out
        for slot, sample in sampler.sample({s: prompts[s] for s in live}).items():
            expected = plain_logprobs(policy, prompts[slot], list(sample.ids), temperature)
            torch.testing.assert_close(
                torch.tensor(sample.logprobs, dtype=torch.float64), expected, atol=1e-5, rtol=0
            )
            prompts[slot] += [
                *sample.ids,
                *(rng.randrange(3, vocabulary) for _ in range(rng.randrange(9))),
            ]
        if turn == 2:  # an episode ends and another begins in its row
            sampler.forget(1)
            prompts[1] = [rng.randrange(3, vocabulary) for _ in range(12)]
    assert sampler.computed_tokens < sampler.prompt_tokens / 2


def test_rewritten_prompt_keeps_only_the_common_head(policy: Policy) -> None:
    sampler = Sampler(policy, SamplingConfig(max_new_tokens=2), torch.Generator())
    first, second = [5, 6, 7, 8, 9, 10], [5, 6, 7, 20, 21]
    sampler.sample({0: first})
    before = sampler.computed_tokens
    sample = sampler.sample({0: second})[0]
    assert sampler.computed_tokens - before == 2
    expected = plain_logprobs(policy, second, list(sample.ids), 1.0)
    torch.testing.assert_close(
        torch.tensor(sample.logprobs, dtype=torch.float64), expected, atol=1e-5, rtol=0
    )


def test_greedy_equals_generate(policy: Policy) -> None:
    prompt = [9, 30, 44, 12, 80]
    config = SamplingConfig(max_new_tokens=12)
    sample = Sampler(policy, config, torch.Generator(), greedy=True).sample({0: prompt})[0]
    with torch.no_grad():
        expected = policy.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(policy.chat.end_ids),
            pad_token_id=0,
        )[0, len(prompt) :]
    assert list(sample.ids) == expected.tolist()


def test_the_same_seed_draws_the_same_reply_and_another_does_not(policy: Policy) -> None:
    config = SamplingConfig(max_new_tokens=16)

    def draw(seed: int) -> tuple[int, ...]:
        return (
            Sampler(policy, config, torch.Generator().manual_seed(seed)).sample({0: [5, 6]})[0].ids
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_sampled_frequencies_follow_the_distribution(policy: Policy) -> None:
    sampler = Sampler(policy, SamplingConfig(max_new_tokens=1), torch.Generator().manual_seed(0))
    n = 4000
    drawn = [s.ids[0] for s in sampler.sample({i: [7, 8, 9] for i in range(n)}).values()]
    with torch.no_grad():
        probs = policy.model(input_ids=torch.tensor([[7, 8, 9]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probs))
    # Pearson's statistic over the 400 tokens has mean 399 and deviation 28 if the draw is right.
    statistic = float(((counts - n * probs) ** 2 / (n * probs)).sum())
    assert statistic < 399 + 6 * 28


def test_nucleus_keeps_the_smallest_set() -> None:
    probs = torch.tensor([[0.1, 0.5, 0.3, 0.1]])
    assert _nucleus(probs, 0.75)[0].tolist() == pytest.approx([0.0, 0.5, 0.3, 0.0])
    assert _nucleus(probs, 0.4)[0].tolist() == pytest.approx([0.0, 0.5, 0.0, 0.0])


def test_exactness_check_accepts_this_model_and_refuses_a_wrong_cache(policy: Policy) -> None:
    from untwine.errors import ModelError

    probe = Sampler(policy, SamplingConfig(), torch.Generator())
    check_exactness(policy, probe.logits_piecewise)
    with pytest.raises(ModelError, match="other logits"):
        check_exactness(policy, lambda ids: probe.logits_piecewise(list(ids)[::-1]))
