"""Environment families by name. A family is imported only when it is asked for.

A name is one of those below, one given to `register_family`, or "module:attribute" of a family of
one's own, whose module is looked for in the current folder as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from untwine.envs.answers import CheckedEnv
from untwine.envs.protocol import Catalogue, Env, EnvFamily
from untwine.envs.wrapper import Wrapper
from untwine.errors import EnvError, nearest
from untwine.own_code import is_own, own_module, place_of
from untwine.records import Observation

# name -> "module:attribute" of an EnvFamily
_FAMILIES = {
    "alfworld": "untwine.envs.alfworld:FAMILY",
    "babyai": "untwine.envs.babyai:FAMILY",
    "rooms": "untwine.envs.rooms:FAMILY",
    "scienceworld": "untwine.envs.scienceworld:FAMILY",
    "textworld": "untwine.envs.textworld:FAMILY",
}


def register_family(name: str, target: str) -> None:
    """Add an environment family of your own: `target` is "module:attribute" of an EnvFamily."""
    _FAMILIES[name] = target


def family_target(name: str) -> str | None:
    """Where the family called `name` is defined ("module:attribute"), or None."""
    return _FAMILIES.get(name, name if is_own(name) else None)


def family_names() -> tuple[str, ...]:
    return tuple(sorted(_FAMILIES))


def get_family(name: str) -> EnvFamily:
    """The family called `name`. EnvError with the nearest known name when there is none, and with
    what is wrong when its module cannot be imported or holds no such family."""
    target = family_target(name)
    if target is None:
        known, hint = ", ".join(family_names()), nearest(name, _FAMILIES)
        raise EnvError(
            f"unknown environment {name!r}; known are {known}, and one of your own is named "
            f"module:attribute, such as my_module:FAMILY.{hint}"
        )
    what = f"environment {name!r}"
    module, attribute = own_module(what, target, "FAMILY", EnvError, here=target == name)
    family = getattr(module, attribute, None)
    if not isinstance(family, EnvFamily):
        raise EnvError(f"{what}: {_no_family(module, attribute)}")
    return family


def _no_family(module: ModuleType, attribute: str) -> str:
    """That the attribute is no family, and what to do about it."""
    where = place_of(module)
    if hasattr(module, attribute):
        kind = type(getattr(module, attribute)).__name__
        wrong = f"{attribute!r} of {where} is of type {kind}, not EnvFamily"
    else:
        wrong = f"{where} has no attribute {attribute!r}"
    families = [key for key, value in vars(module).items() if isinstance(value, EnvFamily)]
    if families:
        return f"{wrong}; name {' or '.join(map(repr, families))} instead"
    return f"{wrong}; add FAMILY = EnvFamily(catalogue, make, option_names) to it and name FAMILY"


def get_catalogue(name: str, options: Mapping[str, Any] | None = None) -> Catalogue:
    """What the family `name` offers with these options. EnvError for unknown or wrong options."""
    family, options, _ = _chosen(name, options)
    return family.catalogue if family.catalogue_for is None else family.catalogue_for(options)


def make_env(name: str, options: Mapping[str, Any] | None = None) -> Env:
    """A live environment of the family `name`.

    Every family that lists its commands also takes the option `list_commands`: each observation
    then carries the admissible commands. Answers of families from outside untwine are checked.
    """
    family, options, listing = _chosen(name, options)
    if listing and not family.catalogue.info.lists_commands:
        raise EnvError(
            f"environment {name!r} cannot list its commands; drop what needs them: "
            "sampling.constrained, prompt.list_admissible or prompt.only_admissible in a recipe, "
            "the option list_commands elsewhere"
        )
    env = family.make(options)
    if not (family_target(name) or "").startswith("untwine."):
        env = CheckedEnv(name, env)
    return _Listing(env) if listing else env


def _chosen(name: str, options: Mapping[str, Any] | None) -> tuple[EnvFamily, dict[str, Any], bool]:
    """The family, its own options, and whether to list commands. EnvError for unknown options."""
    family = get_family(name)
    own = dict(options or {})
    listing = bool(own.pop("list_commands", False))
    for key in own:
        if key not in family.option_names:
            hint = nearest(key, family.option_names)
            raise EnvError(f"environment {name!r} has no option {key!r}.{hint}")
    return family, own, listing


class _Listing(Wrapper):
    """An environment whose observations carry the admissible commands."""

    def seen(self, observation: Observation, method: str) -> Observation:
        if observation.done or observation.admissible is not None:
            return observation
        return dataclasses.replace(observation, admissible=self._env.admissible())
