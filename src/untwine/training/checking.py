"""What can be known of a recipe before any work is done."""

from __future__ import annotations

from untwine.config import Recipe
from untwine.credit import check_credit, credit_method, reads_labels
from untwine.errors import ConfigError
from untwine.evaluate.protocol import evaluation_refs
from untwine.gcd.objectives import check_objective
from untwine.gcd.sources import check_sources
from untwine.prompting.corrections import instructions
from untwine.workshop import read_splits, training_refs


def check_recipe(recipe: Recipe) -> None:
    """Looks up every name and set of a recipe, without loading a model or starting an environment.
    UntwineError with one sentence for the first that is not there."""
    credit_method(recipe.credit.name, recipe.credit.options)
    check_credit(recipe.credit.name, recipe.prompt)
    _check_labels(recipe)
    check_objective(recipe.gcd.objective)
    check_sources(recipe.gcd.labels, recipe.gcd.judge)
    instructions(recipe.correction)
    training_refs(recipe.env, read_splits(recipe.env), recipe.rl.variations)
    for name in recipe.evaluate.sets:
        evaluation_refs(recipe.env, name, recipe.evaluate.episodes)


def _check_labels(recipe: Recipe) -> None:
    """That credit which goes by labels gets some."""
    name, labels = recipe.credit.name, recipe.gcd.labels
    for key in ("penalty", "veto"):
        if getattr(recipe.credit, key) and not labels:
            raise ConfigError(
                f"credit.{key} goes by labels; name a source in gcd.labels, such as rule"
            )
    if not reads_labels(name):
        return
    if not labels:
        raise ConfigError(
            f"credit method {name!r} goes by labels; name a source in gcd.labels, such as rule"
        )
    key = "gcd.taught" if recipe.gcd.taught else "gcd.labels"
    known = recipe.gcd.taught or labels
    if unknown := set(recipe.credit.options.get("sources") or ()) - set(known):
        raise ConfigError(
            f"credit.options.sources names {', '.join(sorted(unknown))}, which {key} does "
            "not; add it there"
        )
