"""Environment families by name. A family is imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from untwine.envs.protocol import Env, EnvFamily
from untwine.errors import EnvError, nearest

# name -> "module:attribute" of an EnvFamily
_FAMILIES = {
    "rooms": "untwine.envs.rooms:FAMILY",
    "scienceworld": "untwine.envs.scienceworld:FAMILY",
}


def register_family(name: str, target: str) -> None:
    """Add an environment family of your own: `target` is "module:attribute" of an EnvFamily."""
    _FAMILIES[name] = target


def family_names() -> tuple[str, ...]:
    return tuple(sorted(_FAMILIES))


def get_family(name: str) -> EnvFamily:
    """The family called `name`; EnvError with the nearest known name otherwise."""
    if name not in _FAMILIES:
        known = ", ".join(family_names())
        raise EnvError(f"unknown environment {name!r}; known are {known}.{nearest(name, _FAMILIES)}")
    module, _, attribute = _FAMILIES[name].partition(":")
    family = getattr(importlib.import_module(module), attribute)
    assert isinstance(family, EnvFamily)
    return family


def make_env(name: str, options: Mapping[str, Any] | None = None) -> Env:
    """A live environment of the family `name`."""
    family = get_family(name)
    options = dict(options or {})
    for key in options:
        if key not in family.option_names:
            hint = nearest(key, family.option_names)
            raise EnvError(f"environment {name!r} has no option {key!r}.{hint}")
    return family.make(options)
