"""The attention function `untwine`, registered with transformers.

A call that carries a plan attends as the plan says: along a packed trie (tree_attention.py) or over
kept rows (row_cache.py). Any other call is transformers' own SDPA, with the masks that belong to
it. Nothing is kept between calls, so sampling, plain forward passes and training may use one model
side by side.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from untwine.errors import ModelError
from untwine.policy.last_layer import narrow_last_layer, narrows

NAME = "untwine"
_UNKNOWN = ("softcap", "s_aux", "position_bias")  # attention that is not computed here


class Plan(Protocol):
    """How packed tokens attend in one forward pass, the same in all layers.

    longest      tokens of the longest sequence that is read
    wanted       (U,) the packed tokens whose last hidden states are read, sorted; None: all
    all_queries  whether `attend` needs all queries, or takes the wanted ones alone as well
    """

    longest: int
    wanted: torch.Tensor | None
    all_queries: bool

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Query (1, H, N, D) or that of the wanted tokens (1, H, U, D), key and value (1, K, N, D)
        to (1, N, H, D) or (1, U, H, D)."""


def adopt(model: Any) -> None:
    """Let `model` attend through this module. Models that cannot are found by `check_exactness`."""
    model.set_attn_implementation(NAME)
    narrow_last_layer(model)


def adopted(model: Any) -> bool:
    """Whether `model` attends through this module."""
    return bool(model.config._attn_implementation == NAME)


def packed_hidden_states(
    base_model: Any, ids_N: np.ndarray, positions_N: np.ndarray, plan: Plan, device: torch.device
) -> torch.Tensor:
    """Last hidden states of packed tokens, (N, D), or of those that the plan wants, (U, D); an
    adopted model without its head."""
    hidden_ND = base_model(
        input_ids=torch.from_numpy(ids_N)[None].to(device),
        position_ids=torch.from_numpy(positions_N)[None].to(device),
        # Any 4D mask keeps transformers from making one of N x N; the plan stands for it.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        use_cache=False,
        untwine_plan=plan,
    ).last_hidden_state[0]
    if plan.wanted is None or narrows(base_model):
        return hidden_ND  # type: ignore[no-any-return]
    return hidden_ND[plan.wanted]  # type: ignore[no-any-return]


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    untwine_plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query (B, H, M, D), key and value (B, K, M, D) give
    (B, M, H, D). With `untwine_plan` B is 1, M is N, and the mask is ignored; ModelError for
    attention that reads its past in another way."""
    if untwine_plan is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    odd = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    window = kwargs.get("sliding_window")
    if odd or (window is not None and untwine_plan.longest > window):
        what = odd[0] if odd else f"a sliding window of {window} tokens, fewer than a sequence has"
        raise ModelError(
            f"the model's attention has {what}, with which it cannot be computed exactly here; "
            "Llama-, Qwen- and Mistral-like models work, with prompt.max_tokens below their window"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        half = torch.get_autocast_dtype(kind)
        query, key, value = query.to(half), key.to(half), value.to(half)
    return untwine_plan.attend(module.layer_idx, query, key, value, scale), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
