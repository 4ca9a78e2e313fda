"""`untwine diagnose ...`. Every command is thin: it reads its arguments and calls one function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="See why a flawed action survives training.", no_args_is_help=True)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as env.workers=4."),
]
Iteration = Annotated[int | None, typer.Option(min=0, help="Which episodes [default: the last].")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def truth(
    run: RunArgument,
    overrides: Overrides = None,
    iteration: Iteration = None,
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Policy that plays on: a model folder or a checkpoint [default: the one that "
            "played the episodes]."
        ),
    ] = "",
    steps: Annotated[int, typer.Option(min=1, help="Steps to judge.")] = 64,
    branches: Annotated[int, typer.Option(min=2, help="Pairs of branches, at most.")] = 256,
    delta: Annotated[float, typer.Option(min=0.0, max=1.0, help="|A*| that is neutral.")] = 0.05,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="Of each interval, early stopping included.")
    ] = 0.95,
    stratified: Annotated[
        Literal["kind", "position"] | None,
        typer.Option(help="Draw equally from action kinds, or from thirds of the episode."),
    ] = None,
    pooled: Annotated[
        bool, typer.Option(help="Judge equal actions in equal states together.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of drawing and sampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Find the true advantage of steps by playing on from their states.

    untwine diagnose truth runs/smoke --steps 64 --branches 256

    The result lies beside the episodes, in RUN/diagnose/.
    """
    from untwine.diagnose.branching import Settings
    from untwine.diagnose.tables import print_truth
    from untwine.diagnose.truth import Draw, find_truth
    from untwine.progress import Display
    from untwine.training.run_dir import run_recipe

    recipe = run_recipe(run, list(overrides or []))
    settings = Settings(delta=delta, error=round(1 - confidence, 9), branches=branches, seed=seed)
    draw = Draw(steps, stratified or "", pooled)
    with Display() as display:
        found = find_truth(
            run, recipe, draw, settings, display, iteration=iteration, checkpoint=checkpoint
        )
    if as_json:
        from dataclasses import asdict

        print(json.dumps({**found.header, "rows": [asdict(row) for row in found.rows]}, indent=2))
    else:
        print_truth(found)


@app.command()
def calibration(
    run: RunArgument,
    overrides: Overrides = None,
    iteration: Iteration = None,
    labels: Annotated[
        str, typer.Option(help="Without truth files: whose labels to take, such as group.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare the advantages of every credit method with the truth.

    untwine diagnose calibration runs/smoke

    untwine diagnose calibration runs/smoke --labels group
    """
    from untwine.diagnose.calibrate import calibrate_run
    from untwine.diagnose.tables import print_calibration
    from untwine.training.run_dir import run_recipe

    recipe = run_recipe(run, list(overrides or []))
    result = calibrate_run(run, recipe, iteration=iteration, labels=labels, seed=seed)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print_calibration(result)
