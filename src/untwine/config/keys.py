"""The keys of a recipe, read off its sections; for error messages and the docs."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key in dotted form, sections included."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if below := section(field.annotation):
            keys += all_keys(below, f"{prefix}{name}.")
    return keys


def keys_below(model: type[BaseModel], parents: Sequence[str]) -> list[str]:
    """The keys of one section, without prefix; none where there is no such section."""
    for parent in parents:
        field = model.model_fields.get(parent)
        below = section(field.annotation) if field else None
        if below is None:
            return []
        model = below
    return list(model.model_fields)


def section(annotation: Any) -> type[BaseModel] | None:
    """The section that a key of this type holds; None where it holds a value."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        if found := section(argument):
            return found
    return None
