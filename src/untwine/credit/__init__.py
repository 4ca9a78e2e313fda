"""Credit: from a group of episodes to one advantage per step. One file per method.

A method is a function `Group -> rows of advantages (G rows, one value per step)`, registered by
name. `None` means that the step is not trained on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from untwine.config import PromptConfig
from untwine.credit.grpo import grpo
from untwine.credit.rlvmr import rlvmr
from untwine.errors import ConfigError, nearest
from untwine.records import Group

CreditMethod = Callable[..., Sequence[Sequence[float | None]]]

_METHODS: dict[str, CreditMethod] = {"grpo": grpo, "rlvmr": rlvmr}
_READ_TAGS = {"rlvmr"}  # methods that reward reasoning tags


def register_credit(name: str, method: CreditMethod) -> None:
    """Add a method of your own: `method(group, **options)`."""
    _METHODS[name] = method


def check_credit(name: str, prompt: PromptConfig) -> None:
    """ConfigError when the replies do not hold what the method rewards."""
    if name in _READ_TAGS and not prompt.tags:
        raise ConfigError(f"credit method {name!r} rewards reasoning tags; set prompt.tags to true")


def credit_names() -> tuple[str, ...]:
    return tuple(sorted(_METHODS))


def credit_method(name: str, options: Mapping[str, Any]) -> Callable[[Group], Group]:
    """The method `name` with its options bound: a function that fills in the advantages."""
    if name not in _METHODS:
        raise ConfigError(f"unknown credit method {name!r}.{nearest(name, _METHODS)}")
    method = _METHODS[name]
    known = [p for p in inspect.signature(method).parameters if p != "group"]
    for key in options:
        if key not in known:
            raise ConfigError(f"credit method {name!r} has no option {key!r}.{nearest(key, known)}")

    def apply(group: Group) -> Group:
        return group.with_advantages(method(group, **options))

    return apply
