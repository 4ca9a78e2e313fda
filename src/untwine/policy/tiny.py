"""Preset `tiny`: a Llama of a few million parameters and a BPE tokenizer, both from scratch.

The tokenizer is trained on the environment's own text, so that a command is a handful of tokens
and a room description a few dozen. The model is an ordinary `LlamaForCausalLM`: whatever works
with it works with a large one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from untwine.config import TinyConfig

PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
_SPECIAL = [PAD, START, END]  # in the order of their ids
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '\\n' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
# Words keep their leading space, digits stand alone, runs of white space stay together.
_ROLES = ["system\nuser\nassistant\n"] * 1000  # every prompt has them: let each be one token
_LOOK, _HAND_ON = 1.5, 0.5  # scales of queries and keys, of values and outputs
# How much the quickest pairs of a rotary head add to the score of the token looked back at.
_NEAR = (6.5, 2.5, 2.5, 2.5, 2.5, 2.5)
_COMMON = 0  # the column that all embeddings share
_WORDS = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Byte-level BPE tokenizer with a chat template, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain(_ROLES, texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(config: TinyConfig, tokenizer: Any, seed: int) -> Any:
    """A randomly initialised Llama for `tokenizer`; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mimetic = config.init == "mimetic"
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_dim or config.hidden_size // config.heads,
                max_position_embeddings=config.positions,
                tie_word_embeddings=True,
                initializer_range=config.hidden_size**-0.5 if mimetic else 0.02,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        if mimetic:
            _imitate_trained_attention(model)
        return model


def _imitate_trained_attention(model: Any) -> None:
    """Start attention where training tends to bring it: queries equal keys, so that a token looks
    for its own earlier copies, and values are handed on unchanged (after Trockman and Kolter,
    "Mimetic Initialization of Self-Attention Layers", arXiv 2305.09828; here with orthogonal
    matrices and without their negative identity). Where there are several layers, half of the heads
    of the first one, two at most, look at the token before, or the one before that: with them,
    what follows an earlier copy can be read (induction heads, Olsson et al., arXiv 2209.11895).
    Copying words of the task into commands is then learnt in hundreds of steps, where random
    weights had not begun after as many (docs/log.md).

    Embeddings begin as random signs, so that all tokens are equally like themselves, behind a
    column that is the same for all tokens."""
    config = model.config
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            inside = config.num_attention_heads * config.head_dim
            looks = _LOOK * max(1.0, inside / config.hidden_size) ** 0.5
            torch.nn.init.orthogonal_(attention.q_proj.weight, gain=looks)
            torch.nn.init.orthogonal_(attention.v_proj.weight, gain=_HAND_ON)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        if len(model.model.layers) > 1 and config.num_attention_heads > 1:
            _begin_alike(model)
            _look_back(model)


def _begin_alike(model: Any) -> None:
    table = model.model.embed_tokens.weight
    table.copy_(2.0 * torch.randint(0, 2, table.shape) - 1.0)
    table *= (table.shape[1] - 1) ** -0.5
    table[:, _COMMON] = 1
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight[:, _COMMON] = 0
        layer.self_attn.k_proj.weight[:, _COMMON] = 0


def _look_back(model: Any) -> None:
    """Heads of the first layer whose score depends on the distance only: they read the column that
    all embeddings share; queries turn it by the rotation of their position, keys by that of the
    position `back` later, so that they agree `back` tokens before."""
    config = model.config
    attention = model.model.layers[0].self_attn
    size = attention.head_dim
    pairs = torch.arange(min(len(_NEAR), size // 2))
    rates = _rates(config)[pairs]
    scale = (torch.tensor(_NEAR[: len(pairs)]) * size**0.5).sqrt() / _felt(config)
    for back in range(1, 1 + min(2, config.num_attention_heads // 2)):
        head = slice((back - 1) * size, back * size)
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight[head] = 0
        attention.q_proj.weight[head][pairs, _COMMON] = scale
        attention.k_proj.weight[head][pairs, _COMMON] = scale * torch.cos(back * rates)
        attention.k_proj.weight[head][pairs + size // 2, _COMMON] = scale * torch.sin(back * rates)


def _rates(config: Any) -> torch.Tensor:
    """Radians per token of each pair of a head."""
    pairs = torch.arange(config.head_dim // 2)
    rates: torch.Tensor = config.rope_parameters["rope_theta"] ** (-2.0 * pairs / config.head_dim)
    return rates


def _felt(config: Any) -> float:
    """The common column, and the length of the rest, after the norm in front of a layer."""
    return float((config.hidden_size / 2) ** 0.5)
