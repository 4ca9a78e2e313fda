"""Where the gradient of the verdict loss enters: all weights, layers from k on, or adapters."""

from __future__ import annotations

import re
from typing import Literal

import torch

from untwine.errors import ConfigError
from untwine.policy.loading import Policy
from untwine.policy.lora import is_adapter

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def closed_parameters(
    policy: Policy, gradient: Literal["all", "layers", "lora"], from_layer: int = 0
) -> list[torch.nn.Parameter]:
    """The trained weights that the verdict loss must leave alone.

    With `layers` these are the layers before `from_layer` (counted from 0) and, unless that is 0,
    the input embedding, also where it is tied to the output; the last norm and an output layer of
    its own stay open. With `lora` all but the adapters. ConfigError when nothing would be left.
    """
    trained = [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]
    if gradient == "all":
        return []
    if gradient == "lora":
        closed = [p for name, p in trained if not is_adapter(name)]
        if len(closed) == len(trained):
            raise ConfigError("gcd.gradient: lora needs adapters; set policy.lora.rank=8 or more")
        return closed
    layers = policy.model.config.num_hidden_layers
    if from_layer >= layers:
        raise ConfigError(
            f"gcd.from_layer is {from_layer}, but this model has {layers} layers, numbered from 0; "
            f"choose at most {layers - 1}"
        )
    embedding = policy.model.get_input_embeddings().weight
    return [
        p
        for name, p in trained
        if ((match := _LAYER.search(name)) is not None and int(match[1]) < from_layer)
        or (p is embedding and from_layer > 0)
    ]
