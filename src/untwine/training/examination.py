"""The evaluations of a run: after its cold start, between its iterations, at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from untwine.cost import cost_text
from untwine.evaluate.protocol import evaluation_refs, examine_set, summarise
from untwine.training.run_dir import RunDir
from untwine.workshop import Workshop


def examine(
    workshop: Workshop, run_dir: RunDir, phase: str, step: int, check: Callable[[], None]
) -> None:
    """Play the sets of the recipe with the policy as it is, and write a line of metrics for each.

    phase, step  what is over: so many steps of the cold start, or iterations
    check        called before every turn; may raise to stop
    """
    recipe, display = workshop.recipe, workshop.display
    config = recipe.evaluate
    for name in config.sets if config.episodes else []:
        refs = evaluation_refs(recipe.env, name, config.episodes)
        with display.bar(f"evaluate {name}", len(refs), "episode") as bar:

            def on_turn(done: int, total: int, bar: Any = bar) -> None:
                check()
                bar.update(done, total)

            groups, identity = examine_set(
                workshop.collector,
                recipe,
                name,
                refs,
                recipe.seed,
                greedy=config.greedy,
                on_turn=on_turn,
            )
        numbers = summarise(groups, workshop.info) | run_dir.cost()
        run_dir.log("evaluate", step, set=name, phase=phase, **numbers, identity=identity)
        low, high = numbers["success_interval"]
        display.line(
            f"{phase} on {name}: score {100 * numbers['outcome_mean']:.1f}, success "
            f"{numbers['success_rate']:.2f} [{low:.2f}, {high:.2f}] "
            f"({numbers['episodes']} episodes)"
        )
    if config.sets and config.episodes and (cost := cost_text(run_dir.cost())):
        display.line(f"  {cost}")
