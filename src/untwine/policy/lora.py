"""Low-rank adaptation (Hu et al., arXiv 2106.09685): W + (alpha / rank) B A with W frozen.

The adapters are put into the model in place, so everything else sees an ordinary causal LM whose
trainable parameters are A and B. What is written as a model folder is the sum, an ordinary model;
checkpoints keep W, A and B apart and continue exactly.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from untwine.config import LoRAConfig
from untwine.errors import ModelError, install


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is A or B."""
    return "lora_" in name


def add_lora(model: Any, config: LoRAConfig, seed: int) -> None:
    """Put adapters beside the linear layers whose name ends as asked, and freeze the rest of
    `model` if asked to.

    ModelError when peft is missing or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ModelError(f"policy.lora needs peft: {install('lora')}") from error
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if _is_linear(m)}
    missing = [name for name in config.target_modules if name not in names]
    if missing:
        raise ModelError(
            f"policy.lora.target_modules names {missing[0]!r}, but the linear layers of this model "
            f"are {', '.join(sorted(names))}"
        )
    adapters = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.target_modules),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(adapters, model)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or not config.freeze)
    model.eval()


def has_lora(model: Any) -> bool:
    """Whether adapters were put into `model`."""
    return any(hasattr(module, "get_delta_weight") for module in model.modules())


def without_lora(model: Any) -> Any:
    """A copy with the adapters added to the weights; a plain copy where there are none."""
    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if hasattr(module, "get_delta_weight"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, module.get_base_layer())
    return merged


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear)
