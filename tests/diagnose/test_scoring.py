"""Log-probabilities and sums of gradients, samples with common beginnings read once."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from tests.diagnose.reference import VOCABULARY, gradients, logprob, small_model, trained
from untwine.diagnose import scoring
from untwine.diagnose.samples import StepSample, cut_shared, in_trie_order
from untwine.diagnose.scoring import log_probabilities, weighted_gradients
from untwine.errors import UntwineError
from untwine.policy.attention import adopt
from untwine.policy.tree_attention import hidden_states_along
from untwine.policy.trie import build_trie

CPU = torch.device("cpu")


def related_samples(count: int, seed: int = 0) -> list[StepSample]:
    """Samples whose prompts begin alike, some with restricted and forced ids; one is there twice,
    and one is the beginning of another."""
    rng = random.Random(seed)

    def some(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(n))

    story = some(30)
    samples = []
    for i in range(count - 2):
        prompt, action = story[: rng.randint(4, 25)] + some(rng.randint(0, 3)), some(3)
        sets = (action[:1], (action[1], (action[1] + 5) % VOCABULARY), None)
        samples.append(StepSample(prompt, action, sets if i % 2 else None))
    return [*samples, samples[0], StepSample(samples[0].prompt_ids[:3], samples[0].prompt_ids[3:])]


def shared(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[int]:
    """Sizes of the tries that are read from now on."""
    sizes: list[int] = []

    def build(*args: Any, **kwargs: Any) -> Any:
        trie = build_trie(*args, **kwargs, **options)
        sizes.append(trie.size)
        return trie

    monkeypatch.setattr(scoring, "build_trie", build)
    return sizes


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_against_separate_backward_passes(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = small_model(family), related_samples(9)
    weights_RN = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = gradients(model, samples, trained(model), temperature=0.7)
    with torch.no_grad():
        exact = torch.stack([logprob(copy.deepcopy(model).double(), s, 0.7) for s in samples])
    for held in ("adopted", "as it comes"):
        ours = copy.deepcopy(model)
        if held == "adopted":
            adopt(ours)
        sizes = shared(monkeypatch, layout="trie")
        found = weighted_gradients(ours, samples, weights_RN, chunk=chunk, temperature=0.7)
        assert bool(sizes) == (held == "adopted")
        for direction, weights in zip(found, weights_RN.tolist(), strict=True):
            assert list(direction) == trained(model)
            for name, value in direction.items():
                true = sum(w * g[name] for w, g in zip(weights, grads, strict=True))
                error = (value.double() - true).norm() / true.norm()
                assert error < 1e-5, name
        logprobs = log_probabilities(ours, samples, chunk=chunk, temperature=0.7)
        torch.testing.assert_close(logprobs, exact, atol=1e-5, rtol=1e-6)
        assert all(p.grad is None and p.requires_grad for p in ours.parameters())
        assert ours.training


def test_common_beginnings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("llama")
    adopt(model)
    sizes = shared(monkeypatch, layout="trie")
    samples = related_samples(9)
    log_probabilities(model, samples, chunk=9)
    last_not_read = [s.prompt_ids + s.action_ids[:-1] for s in samples]
    assert sizes[-1] == len({ids[:n] for ids in last_not_read for n in range(1, len(ids) + 1)})


def test_chunks_of_distinct_tokens() -> None:
    samples = related_samples(12)
    ordered = [samples[i] for i in in_trie_order(samples)]
    longest = max(s.length for s in samples)
    chunks = cut_shared(ordered, 2, CPU)
    assert [i for c in chunks for i in c.rows] == list(range(12))
    held = []
    for c in chunks:
        rows = [ordered[i].prompt_ids + ordered[i].action_ids for i in c.rows]
        held.append(len({ids[:n] for ids in rows for n in range(1, len(ids) + 1)}))
    assert max(held) <= 2 * longest
    assert len(chunks) < 6  # two of the longest, but more that have something in common
    with pytest.raises(UntwineError, match="at least 1"):
        cut_shared(ordered, 0, CPU)


def test_attention_that_no_trie_can_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is shorter than the samples: they are read one by one, and rightly."""
    model, samples = small_model("mistral", sliding_window=8), related_samples(7)
    with torch.no_grad():
        exact = torch.stack([logprob(copy.deepcopy(model).double(), s) for s in samples])
    adopt(model)
    sizes = shared(monkeypatch)
    torch.testing.assert_close(log_probabilities(model, samples), exact, atol=1e-5, rtol=1e-6)
    assert len(sizes) == 1  # tried once, with two samples


def test_a_model_that_reads_samples_otherwise_when_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples = small_model("llama"), related_samples(7)
    adopt(model)

    def odd(*args: Any) -> torch.Tensor:
        return hidden_states_along(*args) + 0.1

    monkeypatch.setattr(scoring, "hidden_states_along", odd)
    with torch.no_grad():
        exact = torch.stack([logprob(copy.deepcopy(model).double(), s) for s in samples])
    torch.testing.assert_close(log_probabilities(model, samples), exact, atol=1e-5, rtol=1e-6)


def test_as_many_weights_as_samples() -> None:
    model, samples = small_model("llama"), related_samples(4)
    weights = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(UntwineError, match="4 samples but 3 weights"):
        weighted_gradients(model, samples, weights)
