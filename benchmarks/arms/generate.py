"""Replies from Hugging Face `generate`: histories padded on the left, read anew at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from arms.turns import cut, left_padded


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    pad: int,
    ends: frozenset[int] = frozenset(),
    greedy: bool = False,
) -> list[tuple[int, ...]]:
    """A reply to each prompt, at temperature 1 or greedy.

    ends   tokens that end a reply; without any, the model's configuration must name none either
    """
    ids, width = left_padded(prompts, pad)
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    options: dict[str, Any] = {"eos_token_id": sorted(ends)} if ends else {}
    if not greedy:
        options |= {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    rows = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=new_tokens,
        do_sample=not greedy,
        pad_token_id=pad,
        use_cache=True,
        **options,
    )
    return [cut(row[width:], ends) for row in rows.tolist()]
