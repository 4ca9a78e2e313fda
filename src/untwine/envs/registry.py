"""Environment families by name. A family is imported only when it is asked for."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from untwine.envs.protocol import Catalogue, Env, EnvFamily, Planner, Reset, Searcher
from untwine.errors import EnvError, nearest
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
    return _FAMILIES.get(name)


def family_names() -> tuple[str, ...]:
    return tuple(sorted(_FAMILIES))


def get_family(name: str) -> EnvFamily:
    """The family called `name`; EnvError with the nearest known name otherwise."""
    if name not in _FAMILIES:
        known, hint = ", ".join(family_names()), nearest(name, _FAMILIES)
        raise EnvError(f"unknown environment {name!r}; known are {known}.{hint}")
    module, _, attribute = _FAMILIES[name].partition(":")
    family = getattr(importlib.import_module(module), attribute)
    assert isinstance(family, EnvFamily)
    return family


def get_catalogue(name: str, options: Mapping[str, Any] | None = None) -> Catalogue:
    """What the family `name` offers with these options. EnvError for unknown or wrong options."""
    family, options, _ = _chosen(name, options)
    return family.catalogue if family.catalogue_for is None else family.catalogue_for(options)


def make_env(name: str, options: Mapping[str, Any] | None = None) -> Env:
    """A live environment of the family `name`.

    Every family that lists its commands also takes the option `list_commands`: each observation
    then carries the admissible commands.
    """
    family, options, listing = _chosen(name, options)
    if listing and not family.catalogue.info.lists_commands:
        raise EnvError(f"environment {name!r} cannot list its commands; drop list_commands")
    env = family.make(options)
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


class _Listing:
    """An environment whose observations carry the admissible commands."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self.admissible = env.admissible
        self.snapshot = env.snapshot
        self.expert = env.expert
        if isinstance(env, Planner):
            self.plan = env.plan
        if isinstance(env, Searcher):
            self.search = env.search
        self.close = env.close

    def reset(self, task: str, variation: int) -> Reset:
        goal, observation = self._env.reset(task, variation)
        return Reset(goal, self._listed(observation))

    def step(self, command: str) -> Observation:
        return self._listed(self._env.step(command))

    def restore(self, snapshot: Any) -> Observation:
        return self._listed(self._env.restore(snapshot))

    def _listed(self, observation: Observation) -> Observation:
        if observation.done or observation.admissible is not None:
            return observation
        return dataclasses.replace(observation, admissible=self._env.admissible())
