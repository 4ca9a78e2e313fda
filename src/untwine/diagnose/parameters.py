"""Which parameters a Gram is over, and the optimizer's metric on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from untwine.errors import ConfigError, UntwineError, nearest

ParameterChoice = Callable[[str, nn.Parameter], bool] | Sequence[str] | None


def select_parameters(model: Any, choice: ParameterChoice = None) -> dict[str, nn.Parameter]:
    """Name -> parameter of those that are trained (`requires_grad`) and chosen.

    choice  None: all; a function of (name, parameter); or patterns such as `*.mlp.*`. Tied
            parameters appear once, under the first of their names. ConfigError when nothing fits.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if choice is None:
        chosen = trained
    elif callable(choice):
        chosen = {n: p for n, p in trained.items() if choice(n, p)}
    else:
        for pattern in choice:
            if not any(fnmatchcase(n, pattern) for n in trained):
                raise ConfigError(
                    f"no trained parameter fits the pattern {pattern!r}.{nearest(pattern, trained)}"
                )
        chosen = {n: p for n, p in trained.items() if any(fnmatchcase(n, c) for c in choice)}
    if not chosen:
        raise ConfigError("no parameter is chosen: all are frozen, or the choice fits none")
    return chosen


def adam_preconditioner(
    model: Any, optimizer: torch.optim.Optimizer, *, bias_correction: bool = True
) -> dict[str, torch.Tensor]:
    """Adam's diagonal P = 1 / (sqrt(v_hat) + eps) of every parameter `optimizer` has stepped, by
    name (Kingma & Ba, arXiv 1412.6980, alg. 1), frozen at the optimizer's present state.

    The step Adam would take on gradient g, were its moments to stay as they are, is lr * P * g.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in state or id(parameter) not in names:
                continue
            decay = group["betas"][1] ** float(state["step"]) if bias_correction else 0.0
            v_hat = state["exp_avg_sq"] / (1.0 - decay)
            found[names[id(parameter)]] = 1.0 / (v_hat.sqrt() + group["eps"])
    if not found:
        raise UntwineError("the optimizer holds no second moments: it is no Adam, or took no step")
    return found


def check_preconditioner(
    chosen: Mapping[str, nn.Parameter], preconditioner: Mapping[str, torch.Tensor]
) -> None:
    """Every chosen parameter needs an entry of its shape, without a negative number."""
    for name, parameter in chosen.items():
        if name not in preconditioner:
            raise UntwineError(f"the preconditioner has no entry for parameter {name}")
        entry = preconditioner[name]
        if entry.shape != parameter.shape:
            raise UntwineError(
                f"the preconditioner of {name} has shape {tuple(entry.shape)}, "
                f"the parameter {tuple(parameter.shape)}"
            )
        if not bool((entry >= 0).all()):
            raise UntwineError(f"the preconditioner of {name} has a negative number or NaN")


@contextlib.contextmanager
def only_these_need_gradients(model: Any, chosen: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Eval mode, and `requires_grad` for `chosen` alone; all of it is put back, `.grad` too."""
    wanted = {id(p) for p in chosen}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        yield
    finally:
        for parameter, needed, grad in before:
            parameter.requires_grad_(needed)
            parameter.grad = grad
        for module, training in modes:
            module.training = training
