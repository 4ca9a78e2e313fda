"""Optimizers: AdamW, or Muon for the matrices of the layers and AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    """Momentum whose matrices are made orthogonal before the step (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon), with steps as large as AdamW's (Liu et al. 2025,
    arXiv 2502.16982), so that one learning rate serves both; `torch.optim.Muon` does the work.

    matrices  parameters with two dimensions
    others    parameters for AdamW
    """

    def __init__(
        self,
        matrices: Sequence[torch.nn.Parameter],
        others: Sequence[torch.nn.Parameter],
        config: OptimizerConfig,
    ) -> None:
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices,
                lr=config.lr,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
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


def _adamw(
    parameters: Sequence[torch.nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
