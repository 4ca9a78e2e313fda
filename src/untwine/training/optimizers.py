"""Optimizers: AdamW, or Muon for the matrices of the layers and AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from untwine.config import OptimizerConfig
from untwine.policy.loading import Policy
from untwine.policy.lora import is_adapter


def make_optimizer(
    config: OptimizerConfig, policy: Policy, parameters: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """An optimizer for some of the parameters of the policy, and others beside them."""
    if config.name == "muon":
        known = set(map(id, layer_matrices(policy)))
        matrices = [p for p in parameters if id(p) in known]
        if matrices:
            return Muon(matrices, [p for p in parameters if id(p) not in known], config)
    return _adamw(parameters, config)


def layer_matrices(policy: Policy) -> list[torch.nn.Parameter]:
    """The weight matrices that are neither embeddings, nor the output head, nor adapters."""
    ends = (policy.model.get_input_embeddings(), policy.model.get_output_embeddings())
    excluded = {id(p) for end in ends if end is not None for p in end.parameters()}
    return [
        parameter
        for name, parameter in policy.model.named_parameters()
        if parameter.ndim == 2 and id(parameter) not in excluded and not is_adapter(name)
    ]


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest.

    matrices  parameters with two dimensions
    others    parameters for AdamW
    """

    def __init__(
        self,
        matrices: Sequence[torch.nn.Parameter],
        others: Sequence[torch.nn.Parameter],
        config: OptimizerConfig,
    ) -> None:
        self._parts: list[torch.optim.Optimizer] = [OrthogonalMomentum(matrices, config)]
        if others:
            self._parts.append(_adamw(others, config))
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps of all parts, with the state and the learning rates that this optimizer holds."""
        loss = None if closure is None else closure()
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss


class OrthogonalMomentum(torch.optim.Optimizer):
    """Nesterov momentum that is made orthogonal before the step (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon), with steps as large as AdamW's (Liu et al. 2025,
    arXiv 2502.16982, equation 4), so that one learning rate serves both.

    It is `torch.optim.Muon` but for two things: matrices of one shape are turned together, and on
    the CPU in float32. PyTorch turns one after the other in bfloat16, which few CPUs multiply: for
    fourteen small matrices a quarter of the time of a training step (docs/log.md).
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter], config: OptimizerConfig) -> None:
        defaults = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": 0.95}
        super().__init__(matrices, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            alike: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                turned = orthogonal(torch.stack([self._moved(p, group) for p in parameters]))
                size = 0.2 * max(shape) ** 0.5 * group["lr"]
                for parameter, step in zip(parameters, turned, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(step, alpha=-size)
        return loss

    def _moved(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(momentum, group["momentum"])


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (B, M, N) with singular values near 1 in the place of their own, by five steps of
    the Newton-Schulz iteration of Jordan et al."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x.bfloat16() if x.is_cuda else x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    return (x if wide else x.mT).to(matrices.dtype)


def _adamw(
    parameters: Sequence[torch.nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
