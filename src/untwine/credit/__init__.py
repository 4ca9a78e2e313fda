"""Credit: from a group of episodes to one advantage per step. One file per method.

A method is a function `Group -> rows of advantages (G rows, one value per step)`, registered by
name, or named as `module:function`. `None` means that the step is not trained on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nan
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from untwine.config import CreditConfig, PromptConfig
from untwine.credit.by_label import penalise, veto
from untwine.credit.grpo import grpo
from untwine.credit.labels import labels
from untwine.credit.rlvmr import rlvmr
from untwine.errors import ConfigError, complaint, nearest
from untwine.gcd.labels import only_from
from untwine.own_code import is_own, own_callable, table
from untwine.records import Group

AS_TRAINED = "as trained"
"""What `trained_credit` is called beside the bare methods."""

CreditMethod = Callable[..., Sequence[Sequence[float | None]]]

_METHODS: dict[str, CreditMethod] = {"grpo": grpo, "labels": labels, "rlvmr": rlvmr}
_READ_TAGS = {"rlvmr"}  # methods that reward reasoning tags
_READ_LABELS = {"labels"}  # methods that go by labels
_BLIND = {"grpo", "rlvmr"}  # methods that do not; those of one's own may


def register_credit(name: str, method: CreditMethod) -> None:
    """Add a method of your own: `method(group, **options)`."""
    _METHODS[name] = method


def check_credit(name: str, prompt: PromptConfig) -> None:
    """ConfigError when the replies do not hold what the method rewards."""
    if name in _READ_TAGS and not prompt.tags:
        raise ConfigError(f"credit method {name!r} rewards reasoning tags; set prompt.tags to true")


def reads_labels(name: str) -> bool:
    """Whether the method goes by the labels of the steps."""
    return name in _READ_LABELS


def may_read_labels(name: str) -> bool:
    """Whether the method may go by the labels of the steps; unknown of methods of one's own."""
    return name not in _BLIND


def trained_credit(config: CreditConfig, taught: Sequence[str] = ()) -> Callable[[Group], Group]:
    """What training gives the steps of a group: the method, then penalty and veto.

    taught  sources whose labels count in all of it; by default all
    ConfigError as in `credit_method`.
    """
    method = credit_method(config.name, config.options)

    def apply(group: Group) -> Group:
        credited = method(only_from(group, taught))
        group = group.with_advantages([[s.advantage for s in e.steps] for e in credited.episodes])
        if config.penalty:
            group = penalise(group, config.penalty, taught)
        return veto(group, config.veto, taught) if config.veto else group

    return apply


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
        return group.with_advantages(_checked(name, group, method(group, **bound)))

    return apply


def _checked(name: str, group: Group, found: Any) -> list[list[float | None]]:
    """What a method has returned, when it has a value for every step. ConfigError otherwise."""
    what, count = f"credit method {name!r}", len(group.episodes)
    rows = table(found)
    if len(rows) != count:
        raise ConfigError(
            f"{what}: it must return a row of advantages for each of {count} episodes"
        )
    for number, (episode, row) in enumerate(zip(group.episodes, rows, strict=True)):
        if len(row) != episode.length:
            raise ConfigError(
                f"{what}: episode {number} has {episode.length} steps and gets {len(row)} "
                "advantages; every step needs one, or None"
            )
    return [[_advantage(what, value) for value in row] for row in rows]


def _advantage(what: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = nan
    if not isfinite(number):
        raise ConfigError(f"{what}: the advantage {value!r} is neither a finite number nor None")
    return number


def _find(name: str) -> CreditMethod:
    if name in _METHODS:
        return _METHODS[name]
    what = f"credit method {name!r}"
    if not is_own(name):
        raise ConfigError(
            f"unknown {what}; known are {', '.join(credit_names())}, and one of your own is named "
            f"module:function, such as my_module:method.{nearest(name, _METHODS)}"
        )
    return own_callable(what, name, "method", ConfigError)


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
        raise ConfigError(f"credit.options.{key}: {complaint(error.errors()[0])}") from error
