"""The last layer, computed only where its output is read.

Training reads the last hidden states at the tokens that predict an action, sampling at the last
token of each row: a sixth of an agent's tokens, or fewer. Of the other tokens the last layer needs
keys and values only. Queries, attention, output projection and MLP are left out there, which is
exact and saves most of one layer: half of a model of two layers, a tenth of one of eight.

It is done for the families whose decoder layer is known to be built like Llama's; other models run
their last layer over all tokens, with the same results.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_LIKE_LLAMA = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


def narrow_last_layer(model: Any) -> None:
    """Let the last layer of `model` do so in passes whose plan (attention.py) says what is wanted;
    nothing happens to models of other families, nor in other passes."""
    layer = _last_layer(getattr(model, "base_model", model))
    if type(layer).__name__ in _LIKE_LLAMA:
        layer.__class__ = _narrowed(type(layer))  # type: ignore[arg-type]


def narrows(base_model: Any) -> bool:
    """Whether passes give the hidden states of the wanted tokens alone."""
    return hasattr(_last_layer(base_model), "untwine_narrows")


def _last_layer(base_model: Any) -> Any:
    layers: Any = getattr(base_model, "layers", ())
    return layers[-1] if len(layers) else None


@functools.cache
def _narrowed(kind: type[Any]) -> type[Any]:
    """A class of decoder layers with `_forward` where a plan says what is wanted."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = kwargs.get("untwine_plan")
        if plan is None or plan.wanted is None:
            return kind.forward(self, hidden_states, *args, **kwargs)
        return _forward(self, hidden_states, plan, kwargs["position_embeddings"])

    return type(f"Narrowed{kind.__name__}", (kind,), {"forward": forward, "untwine_narrows": True})


def _forward(
    layer: Any,
    hidden_states: torch.Tensor,
    plan: Any,
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Hidden states (1, N, D) of all tokens to those of the wanted ones (1, U, D)."""
    attention, wanted = layer.self_attn, plan.wanted
    normed = layer.input_layernorm(hidden_states)
    asking = normed if plan.all_queries else normed[:, wanted]
    cos, sin = rotary

    def heads(x: torch.Tensor, name: str) -> Any:
        """(1, M, D) to (1, heads, M, head size)."""
        projected = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{name}_norm", None)  # Qwen3 norms queries and keys
        return (projected if norm is None else norm(projected)).transpose(1, 2)

    query, key, value = heads(asking, "q"), heads(normed, "k"), heads(normed, "v")
    key = _rotated(key, cos, sin)
    if not plan.all_queries:
        cos, sin = cos[:, wanted], sin[:, wanted]
    query = _rotated(query, cos, sin)
    config = attention.config
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    mixed, _ = ALL_ATTENTION_FUNCTIONS[config._attn_implementation](
        attention,
        query,
        key,
        value,
        None,
        scaling=attention.scaling,
        untwine_plan=plan,
        sliding_window=window,
    )
    if plan.all_queries:
        mixed = mixed[:, wanted]
    after = hidden_states[:, wanted] + attention.o_proj(mixed.flatten(2))
    return after + layer.mlp(layer.post_attention_layernorm(after))  # type: ignore[no-any-return]


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al., arXiv 2104.09864) with halves as pairs: x (1, H, M, D),
    cos and sin (1, M, D)."""
    one, two = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None]
