"""Preset `tiny`: a Llama of a few million parameters and a BPE tokenizer, both from scratch.

The tokenizer is trained on the environment's own text, so that a command is a handful of tokens
and a room description a few dozen. The model is an ordinary `LlamaForCausalLM`: whatever works
with it works with a large one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from untwine.config import TinyConfig

PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '\\n' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
# Words keep their leading space, digits stand alone, runs of white space stay together.
_LOOK, _HAND_ON = 1.5, 0.5  # scales of queries and keys, of values and outputs
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
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
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
    matrices and without their negative identity). Copying words of the task into commands is then
    learnt in hundreds of steps, where random weights had not begun after as many (docs/log.md)."""
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            torch.nn.init.orthogonal_(attention.q_proj.weight, gain=_LOOK)
            torch.nn.init.orthogonal_(attention.v_proj.weight, gain=_HAND_ON)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
