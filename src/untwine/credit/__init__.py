"""Credit: from a group of episodes to one advantage per step. One file per method.

A method is a function `Group -> rows of advantages (G rows, one value per step)`, registered by
name, or named as `module:function`. `None` means that the step is not trained on.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

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
    """The method `name` with its options bound: a function that fills in the advantages.

    name  a registered one, or `module:function`
    ConfigError when there is no such method, or an option is not what its signature says.
    """
    method = _find(name)
    known = _option_types(method)
    bound = {}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"credit method {name!r} has no option {key!r}.{nearest(key, known)}")
        bound[key] = _read(key, value, known[key])

    def apply(group: Group) -> Group:
        return group.with_advantages(method(group, **bound))

    return apply


def _find(name: str) -> CreditMethod:
    if ":" in name:
        return _imported(name)
    if name not in _METHODS:
        raise ConfigError(
            f"unknown credit method {name!r}.{nearest(name, _METHODS)} A method of your own is "
            "named as module:function"
        )
    return _METHODS[name]


def _imported(name: str) -> CreditMethod:
    """The function `module:function`, from a module that Python finds."""
    module, _, function = name.partition(":")
    try:
        method = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a module of somebody else's does
        raise ConfigError(
            f"credit method {name!r} cannot be imported ({error}); a module beside your recipe is "
            "found when its folder is in PYTHONPATH"
        ) from error
    if not callable(method):
        raise ConfigError(f"credit method {name!r} is not a function but {method!r}")
    found: CreditMethod = method
    return found


def _option_types(method: CreditMethod) -> dict[str, Any]:
    """What each option of a method may be; anything where its signature does not say."""
    try:
        parameters = inspect.signature(method, eval_str=True).parameters
    except NameError:  # annotations that only a type checker can read
        return {key: Any for key in inspect.signature(method).parameters if key != "group"}
    return {
        key: Any if parameter.annotation is parameter.empty else parameter.annotation
        for key, parameter in parameters.items()
        if key != "group"
    }


def _read(key: str, value: Any, wanted: Any) -> Any:
    """The value of an option as its annotation wants it, numbers finite."""
    config = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        return TypeAdapter(wanted, config=config).validate_python(value)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise ConfigError(
            f"credit.options.{key}: {said[0].lower() + said[1:]} (got {value!r})"
        ) from error
