"""Check JSON against a shape, so that what a page shows has the types that it expects.

A shape is `float` (finite), `share` (from 0 to 1), `int`, `str`, `bool`, `object` (anything);
`maybe(shape)`; `[shape]` for a list; `{"key": shape}` for an object of which only these keys are
kept; `each(shape)` for an object with any keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from untwine.report.run_data import number


class Misshapen(ValueError):
    """What was read is not what was expected; the message says where."""


@dataclass(frozen=True, slots=True)
class maybe:  # noqa: N801 (reads as a type in the shapes)
    """`shape`, or None, also for a key that is missing or a number that is not finite."""

    shape: Any


@dataclass(frozen=True, slots=True)
class each:  # noqa: N801
    """An object whose values all have this shape."""

    shape: Any


class share:  # noqa: N801
    """A number from 0 to 1."""


def shaped(value: Any, shape: Any, at: str = "") -> Any:
    """`value` with the keys of `shape` and nothing else; Misshapen when it does not fit."""
    if isinstance(shape, maybe):
        missing = value is None or (shape.shape is float and number(value) is None)
        return None if missing else shaped(value, shape.shape, at)
    if isinstance(shape, each):
        _demand(isinstance(value, Mapping), at, "an object")
        return {str(k): shaped(v, shape.shape, f"{at}.{k}") for k, v in value.items()}
    if isinstance(shape, Mapping):
        _demand(isinstance(value, Mapping), at, "an object")
        return {k: shaped(value.get(k), s, f"{at}.{k}") for k, s in shape.items()}
    if isinstance(shape, list):
        _demand(isinstance(value, list | tuple), at, "a list")
        return [shaped(item, shape[0], f"{at}[{i}]") for i, item in enumerate(value)]
    if shape is share:
        found = number(value)
        _demand(found is not None and 0 <= found <= 1, at, "a number from 0 to 1")
        return found
    if shape in (float, int):
        found = number(value)
        _demand(found is not None, at, "a number")
        return int(found) if shape is int and found is not None else found
    _demand(shape is object or isinstance(value, shape), at, getattr(shape, "__name__", ""))
    return value


def _demand(holds: bool, at: str, what: str) -> None:
    if not holds:
        raise Misshapen(f"{at.lstrip('.') or 'it'} is not {what}")
