"""Group relative policy optimisation (Shao et al., arXiv 2402.03300, section 4.1)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from untwine.records import Group

AboveZero = Annotated[float, Field(gt=0)]
"""What keeps a divisor from being 0."""
AtLeastZero = Annotated[float, Field(ge=0)]
"""A weight or a penalty, which turns nothing round."""


def grpo(
    group: Group, normalise: Literal["std", "none"] = "std", eps: AboveZero = 1e-6
) -> list[list[float | None]]:
    """A_g = (R_g - mean R) / (std R + eps), given to every step of episode g.

    Statistics are over the G returns of the group, each episode once. `std` is the unbiased
    standard deviation (as in verl 0.9.1); `normalise="none"` leaves it out (Dr. GRPO, arXiv
    2503.20783). A group of one has no baseline: its advantage is 0.

    Returns G rows, one value per step.
    """
    returns_G = group.returns_G
    n = len(returns_G)
    mean = math.fsum(returns_G) / n
    scale = 1.0
    if normalise == "std" and n > 1:
        variance = math.fsum((r - mean) ** 2 for r in returns_G) / (n - 1)
        scale = math.sqrt(variance) + eps
    advantages_G = [(r - mean) / scale if n > 1 else 0.0 for r in returns_G]
    return [
        [advantage] * episode.length
        for advantage, episode in zip(advantages_G, group.episodes, strict=True)
    ]
