"""Arms of runs that no sweep has named: what is trained alike, and what to call it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from untwine.config import Recipe
from untwine.config.keys import leaves
from untwine.training.run_dir import run_recipe

_NEUTRAL = {
    "name": ...,
    "seed": ...,
    "checkpoint": ...,
    "evaluate": ...,
    "diagnose": ...,
    "policy": {"threads", "device"},
    "cold_start": {"threads"},
    "env": {"workers", "sessions", "timeout_s"},
}
"""Keys that do not make an arm: seed, names, and how and where the work is done."""

COLD_FOLDER = "cold"
"""Where a sweep keeps the cold starts that arms share: cold/KIND/seed-N."""

_MODEL = "policy.model"
_MADE = "another run's"
"""What a model is called that a run made."""


def arm_labels(recipes: Mapping[Path, tuple[Recipe, str]]) -> dict[str, str]:
    """A name for each arm, by its key: the name its runs share, or else the keys that differ.

    recipes  of the runs, each with the key of its arm
    """
    names: dict[str, set[str]] = {}
    for recipe, key in recipes.values():
        names.setdefault(key, set()).add(_without_seed(recipe.name))
    shared = [next(iter(own)) for own in names.values() if len(own) == 1]
    if len(shared) == len(names) == len(set(shared)):
        return dict(zip(names, shared, strict=True))
    if len(names) == 1:
        return {key: sorted(own)[0] for key, own in names.items()}
    return differences(names)


def differences(arms: Iterable[str]) -> dict[str, str]:
    """`key=value, ...` for each arm, given by its key: what is not the same in all of them."""
    trees: dict[str, dict[str, str]] = {}
    for arm in arms:
        tree = {leaf: str(value) for leaf, value in leaves(json.loads(arm))}
        trees[arm] = tree if _MODEL in tree else tree | {_MODEL: _MADE}
    everything = sorted({leaf for tree in trees.values() for leaf in tree})
    differing = [k for k in everything if _differs(k, trees.values())]
    return {
        arm: ", ".join(f"{k}={tree[k]}" for k in differing if k in tree)
        for arm, tree in trees.items()
    }


def _without_seed(name: str) -> str:
    """The name of a run without what a sweep adds to that of its arm."""
    return re.sub(r", seed \d+$", "", name)


def _differs(key: str, trees: Iterable[Mapping[str, str]]) -> bool:
    """Whether arms have different values. A key of the run that made a model is one of the arms
    that have such a model."""
    if key.startswith(f"{_MODEL}."):
        trees = [tree for tree in trees if tree[_MODEL] == _MADE]
    return len({tree.get(key) for tree in trees}) > 1


def arm_key(recipe: Recipe, run: Path | None = None, later: tuple[Path, ...] = ()) -> str:
    """Equal for the runs of one arm. A model that another run made stands for that run's recipe, so
    that cold starts of different seeds are alike.

    run    directory of the run; a cold start that its sweep made is found beside it, wherever the
           sweep is now
    later  the runs that this one made the model for
    UntwineError when the recipe of such a run cannot be read.
    """
    tree = recipe.model_dump(mode="json")
    for section, keys in _NEUTRAL.items():
        if keys is ...:
            tree.pop(section)
        else:
            tree[section] = {k: v for k, v in tree[section].items() if k not in keys}  # type: ignore[operator]
    origin = Path(recipe.policy.model).parent
    shared = origin.parts[-3:] if origin.parts[-3:-2] == (COLD_FOLDER,) else ()
    places = [origin.resolve()]
    if shared and run is not None:
        places += [above.joinpath(*shared) for above in run.resolve().parents]
    found = next((place for place in places if is_run(place)), None)
    if found and found not in later:
        tree["policy"]["model"] = json.loads(arm_key(run_recipe(found), found, (*later, found)))
    elif shared:  # it is gone: of its place all but the seed
        tree["policy"]["model"] = "/".join(shared[:-1])
    return json.dumps(tree, sort_keys=True)


def is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and (path / "run.json").is_file()
