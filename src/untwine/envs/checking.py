"""Checks that every environment family makes on what a recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from untwine.errors import EnvError, complaint

Options = TypeVar("Options", bound=BaseModel)


def read_options(family: str, model: type[Options], options: Mapping[str, Any]) -> Options:
    """The options of a family as its model. EnvError that names the first wrong one."""
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise EnvError(f"{family}: option {where}: {complaint(problem)}") from error


def check_variation(family: str, task: str, variation: int, count: int) -> None:
    """EnvError when a task with `count` variations, from 0 on, does not have this one."""
    if variation not in range(count):
        raise EnvError(f"{family} task {task!r} has variations 0 to {count - 1}, not {variation}")
