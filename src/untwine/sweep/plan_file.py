"""Arms that tie several keys together: `--arm` options, and plan files.

A plan file is a sweep as YAML (docs/sweeps.md): a recipe, seeds, named arms, levels at which they
are trained, and looks through the microscope that are taken of every finished run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from untwine.config.base import Positive
from untwine.config.keys import keys_below
from untwine.config.plain_yaml import read_yaml
from untwine.errors import ConfigError, complaint, nearest
from untwine.sweep.looks import Look
from untwine.sweep.plan import Arm, split_values, vary

Changes = dict[str, Any]
"""Values by dotted key of a recipe."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _ArmEntry(_Part):
    set: Changes = Field(default_factory=dict)
    seeds: Positive | dict[str, Positive] = Field(default_factory=dict)
    levels: list[str] = Field(default_factory=list)

    def is_at(self, level: str) -> bool:
        """Without levels of its own an arm is trained at all of them."""
        return not self.levels or level in self.levels


class _LookEntry(_Part):
    command: list[str] = Field(min_length=1)
    arms: list[str] = Field(default_factory=list)


class _PlanEntry(_Part):
    recipe: str
    seeds: Positive = 5
    levels: dict[str, Changes] = Field(default_factory=dict)
    arms: dict[str, _ArmEntry] = Field(min_length=1)
    looks: dict[str, _LookEntry] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A plan as read: `recipe` is beside the plan file, arms have names such as `weak.grpo`."""

    recipe: Path
    seeds: int
    arms: tuple[Arm, ...]
    looks: tuple[Look, ...]


def read_plan(path: Path) -> PlanFile:
    """Read a plan file. ConfigError with one sentence for anything that is wrong; keys of the
    recipe are checked when the recipe is resolved."""
    try:
        entry = _PlanEntry.model_validate(read_yaml(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"plan {path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "not readable"
        raise ConfigError(f"plan {path} is not valid YAML: {problem}") from error
    except ValidationError as error:
        raise ConfigError(f"plan {path}: {_first_problem(error)}") from error
    levels = entry.levels or {"": {}}
    for name, arm in entry.arms.items():
        counts = arm.seeds if isinstance(arm.seeds, dict) else {}
        _check_known(f"plan {path}: seeds of arm {name!r}", counts, entry.levels)
        _check_known(f"plan {path}: levels of arm {name!r}", arm.levels, entry.levels)
    for name, look in entry.looks.items():
        _check_known(f"plan {path}: look {name!r}", look.arms, entry.arms)
    return PlanFile(
        path.parent / entry.recipe,
        entry.seeds,
        tuple(
            Arm(_arm_name(level, name), _overrides(changes | arm.set), _seeds(arm, level))
            for level, changes in levels.items()
            for name, arm in entry.arms.items()
            if arm.is_at(level)
        ),
        tuple(
            Look(name, tuple(look.command), _arm_names(levels, look.arms))
            for name, look in entry.looks.items()
        ),
    )


def choose_plan(
    recipe: Path | None,
    changes: list[str],
    varied: Sequence[str],
    named: Sequence[str],
    plan: Path | None,
    seeds: int | None,
) -> PlanFile:
    """The sweep that the command line asks for: a plan file, or a recipe with `--vary` or `--arm`.

    changes  overrides; with a plan, `recipe` is one of them when it looks like one, and is added
    ConfigError when the options do not go together.
    """
    if plan is None:
        if recipe is None:
            raise ConfigError("name a recipe, such as recipes/smoke.yaml, or --plan FILE")
        if varied and named:
            raise ConfigError("--vary and --arm both make arms; use one of the two")
        return PlanFile(recipe, seeds or 5, tuple(named_arms(named) or vary(varied)), ())
    if recipe is not None and "=" not in str(recipe):
        raise ConfigError("--plan names the recipe; leave the recipe out")
    if varied or named or seeds:
        raise ConfigError("--plan holds arms and seeds; leave --vary, --arm and --seeds out")
    if recipe is not None:
        changes.insert(0, str(recipe))
    return read_plan(plan)


def named_arms(options: Sequence[str]) -> list[Arm]:
    """Arms from options `name:key=v,key=v`; commas within brackets or quotes do not separate.
    `name:` is the recipe as it is."""
    arms = []
    for option in options:
        name, colon, text = option.partition(":")
        changes = split_values(text) if text.strip() else []
        if not colon or not name.strip() or not all("=" in change for change in changes):
            raise ConfigError(f"--arm {option!r} is not of the form name:key=value,key=value")
        arms.append(Arm(name.strip(), tuple(changes)))
    if len({arm.name for arm in arms}) < len(arms):
        raise ConfigError("--arm names an arm twice; give each a name of its own")
    return arms


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"]][:3]  # beyond, pydantic names kinds of values
    where, parents = ".".join(place), place[:1] if len(place) > 1 else []
    known = keys_below(_PlanEntry, parents)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {where!r}; known are {', '.join(known)}.{nearest(place[-1], known)}"
    if problem["type"] == "missing":
        return f"the key {where!r} is missing"
    if problem["type"] == "model_type":
        below = ", ".join(keys_below(_PlanEntry, place[:1]))
        return f"{where or 'the file'} must hold keys, of {below}; see docs/sweeps.md"
    return f"{where}: {complaint(problem)}"


def _arm_name(level: str, name: str) -> str:
    return f"{level}.{name}" if level else name


def _arm_names(levels: Mapping[str, Changes], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(_arm_name(level, name) for level in levels for name in names)


def _overrides(changes: Changes) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value)}" for key, value in changes.items())


def _seeds(arm: _ArmEntry, level: str) -> int:
    """0 stands for as many as the sweep has."""
    return arm.seeds.get(level, 0) if isinstance(arm.seeds, dict) else arm.seeds


def _check_known(what: str, names: Sequence[str] | Mapping[str, int], known: Any) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{what} names {name!r}, which is not there.{nearest(name, known)}")
