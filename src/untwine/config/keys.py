"""The keys of a recipe, read off its sections; for error messages and the docs."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key in dotted form, sections included."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if below := _section(field.annotation):
            keys += all_keys(below, f"{prefix}{name}.")
    return keys


def keys_below(model: type[BaseModel], parents: Sequence[str]) -> list[str]:
    """The keys of one section, without prefix; none where there is no such section."""
    for parent in parents:
        below = section_at(model, parent)
        if below is None:
            return []
        model = below
    return list(model.model_fields)


def section_at(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that a key holds; None where it holds a value, or is not there."""
    field = model.model_fields.get(key)
    return _section(field.annotation) if field else None


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree by dotted key; an empty section is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        if found := _section(argument):
            return found
    return None
