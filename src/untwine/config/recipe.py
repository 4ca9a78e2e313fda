"""A whole recipe, and how it is read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from untwine.config.acting import EnvConfig, PolicyConfig, PromptConfig, SamplingConfig
from untwine.config.base import Section
from untwine.config.gcd import GCDConfig
from untwine.config.keys import all_keys, keys_below, section_at
from untwine.config.learning import (
    CheckpointConfig,
    ColdStartConfig,
    CorrectionConfig,
    CreditConfig,
    DiagnoseConfig,
    EvaluateConfig,
    LossConfig,
    RLConfig,
)
from untwine.config.plain_yaml import read_yaml
from untwine.errors import ConfigError, closest, complaint, meant, nearest


class Recipe(Section):
    """One experiment, as resolved."""

    name: str = "run"
    seed: int = 0
    env: EnvConfig = EnvConfig()
    prompt: PromptConfig = PromptConfig()
    policy: PolicyConfig = PolicyConfig()
    sampling: SamplingConfig = SamplingConfig()
    cold_start: ColdStartConfig = ColdStartConfig()
    rl: RLConfig = RLConfig()
    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
    gcd: GCDConfig = GCDConfig()
    correction: CorrectionConfig = CorrectionConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    diagnose: DiagnoseConfig = DiagnoseConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _episodes_within_budget(self) -> Recipe:
        longest = self.prompt.max_tokens + self.sampling.max_new_tokens
        if longest > self.rl.microbatch_tokens:
            raise ValueError(
                f"a sequence may have {longest} tokens (prompt.max_tokens plus "
                f"sampling.max_new_tokens) and does not fit rl.microbatch_tokens="
                f"{self.rl.microbatch_tokens}; lower prompt.max_tokens or raise the budget"
            )
        return self

    @property
    def lists_commands(self) -> bool:
        """See the function of this name."""
        return lists_commands(self.prompt, self.sampling)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def lists_commands(prompt: PromptConfig, sampling: SamplingConfig) -> bool:
    """Whether every observation must come with the admissible commands."""
    return prompt.list_admissible or prompt.only_admissible or sampling.constrained


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, on top of the one it names as its `base`, and apply `section.key=value`
    overrides.

    Raises ConfigError with one sentence for anything that is wrong.
    """
    return make_recipe(_read_tree(Path(path), ()), str(path), overrides)


def _read_tree(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """What a recipe file and its bases say. `readers` are the files that this one is a base of."""
    tree = _read_file(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the path of a recipe, such as demo.yaml")
    readers = (*readers, path.resolve())
    below = path.parent / base
    if not below.is_file():
        raise ConfigError(f"{path}: there is no recipe {below}, which it names as its base")
    if below.resolve() in readers:
        raise ConfigError(f"{path}: base {base} leads back to this file; name another recipe")
    return _over(_read_tree(below, readers), tree, Recipe)


def _over(below: dict[str, Any], tree: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """`tree` laid over `below`: sections key by key, every other value as a whole."""
    merged = dict(below)
    for key, value in tree.items():
        part = section_at(model, key)
        if part and isinstance(value, dict) and isinstance(below.get(key), dict):
            value = _over(below[key], value, part)
        merged[key] = value
    return merged


def _read_file(path: Path) -> dict[str, Any]:
    if path.is_dir() or not path.exists():
        kind = "a folder" if path.is_dir() else "missing"
        raise ConfigError(
            f"recipe {path} is {kind}; recipes are YAML files such as recipes/smoke.yaml"
        )
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise ConfigError(f"{path} is not valid YAML{where}: {problem}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8") from error
    if tree is None:
        raise ConfigError(f"{path} is empty; it must hold sections such as `env:`")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as `env:`, not a {type(tree).__name__}")
    return tree


def make_recipe(
    tree: dict[str, Any], source: str = "recipe", overrides: Sequence[str] = ()
) -> Recipe:
    """Check a tree of plain values, with overrides applied to it; `source` names it in errors."""
    tree = _unshared(tree)
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error)}") from error


def _unshared(tree: Any) -> Any:
    """A copy in which no two keys hold the same section, as they do where YAML has an alias: an
    override of one would change the other."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {override!r} is not valid YAML") from error
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a value, not a section")
        node = child
    node[last] = value


def _such_as(section: Sequence[str]) -> str:
    """A key of a section, for an example; a list of sections is one."""
    keys = keys_below(Recipe, [part for part in section if not part.isdecimal()])
    return f", such as {'.'.join([*section, keys[0]])}" if keys else ""


def nearest_key(parents: Sequence[str], word: str) -> str:
    """A hint at the key that was meant: one of this section whose name is nearly the same, the same
    name in other sections, or whatever is most like it."""
    section = "".join(f"{parent}." for parent in parents)
    named = [parent for parent in parents if not parent.isdecimal()]
    own, everywhere = keys_below(Recipe, named), all_keys(Recipe)
    begun = [key for key in own if len(key) > 2 and word.startswith(key)]
    if near := begun[:1] or closest(word, own, 0.75):
        return meant([section + key for key in near])
    inside = [key for key in everywhere if key.startswith(section)]
    if same := [key for key in inside or everywhere if key.rpartition(".")[2] == word]:
        return meant(same[:2])
    return nearest(section + word, everywhere) or nearest(word, own)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, word = [str(part) for part in problem["loc"]]
        hint = nearest_key(parents, word)
        return f"unknown key {where!r}.{hint}"
    if not where:  # keys of several sections do not go together, and the message names them
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "list_type" and isinstance(problem["input"], str):
        return f"{where}: a list is wanted; write [{problem['input']}]"
    if problem["type"] == "model_type":
        return f"{where} is a section with keys of its own{_such_as(where.split('.'))}"
    return f"{where}: {complaint(problem)}"
