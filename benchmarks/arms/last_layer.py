"""What other programs do: every layer over every token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def last_layer_everywhere(model: Any) -> Iterator[None]:
    """The last decoder layer as transformers has it (policy/last_layer.py changes its class)."""
    layer = model.base_model.layers[-1]
    ours = type(layer)
    layer.__class__ = ours.__bases__[0]
    try:
        yield
    finally:
        layer.__class__ = ours
