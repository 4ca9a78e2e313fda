"""`untwine diagnose ...`. Every command is thin: it reads its arguments and calls one function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

app = typer.Typer(help="See why a flawed action survives training.", no_args_is_help=True)

RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run directory, or a folder of another program with episodes/ and model/.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as env.workers=4."),
]
Iteration = Annotated[int | None, typer.Option(min=0, help="Which episodes \\[default: the last].")]
Checkpoint = Annotated[
    str,
    typer.Option(
        help="Policy: a model folder or a checkpoint \\[default: the one that played the episodes "
        "if it is still there, otherwise RUN/model]."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draw of samples.")]
Chunk = Annotated[int, typer.Option(min=1, help="Samples per forward pass; memory, not results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def truth(
    run: RunArgument,
    overrides: Overrides = None,
    iteration: Iteration = None,
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Policy that plays on: a model folder or a checkpoint \\[default: the one that "
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
    from untwine.diagnose.output import to_json
    from untwine.diagnose.recorded import recorded_recipe
    from untwine.diagnose.tables import print_truth
    from untwine.diagnose.truth import Draw, find_truth
    from untwine.progress import Display

    recipe = recorded_recipe(run, list(overrides or []), to_play=True)
    settings = Settings(delta=delta, error=round(1 - confidence, 9), branches=branches, seed=seed)
    draw = Draw(steps, stratified or "", pooled)
    with Display() as display:
        found = find_truth(
            run, recipe, draw, settings, display, iteration=iteration, checkpoint=checkpoint
        )
    if as_json:
        print(to_json(found.numbers()))
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
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare the advantages of every credit method with the truth.

    untwine diagnose calibration runs/smoke

    untwine diagnose calibration runs/smoke --labels group

    Prints tables, and writes RUN/diagnose/calibration.json.
    """
    from untwine.diagnose.measure_calibration import calibrate_run
    from untwine.diagnose.recorded import recorded_recipe
    from untwine.diagnose.tables import print_calibration
    from untwine.progress import Display

    recipe = recorded_recipe(run, list(overrides or []))
    with Display() as display:
        result = calibrate_run(run, recipe, display, iteration=iteration, labels=labels, seed=seed)
    _show(run, "calibration", result, print_calibration, as_json)


@app.command()
def labels(
    run: RunArgument,
    overrides: Overrides = None,
    iteration: Iteration = None,
    sources: Annotated[
        str,
        typer.Option(
            help="Sources to ask, separated by commas; expert, judge and branch work too."
        ),
    ] = "rule,group",
    as_json: AsJson = False,
) -> None:
    """Measure label sources against the truth: coverage, precision, recall.

    untwine diagnose labels runs/smoke

    untwine diagnose labels runs/smoke --sources rule,group,expert

    Other labels that are on record are measured too. All of it is written to
    RUN/diagnose/labels.json. Needs truth files: `untwine diagnose truth` makes them.
    """
    from untwine.diagnose.label_quality import find_label_quality
    from untwine.diagnose.tables import print_label_quality
    from untwine.progress import Display
    from untwine.training.run_dir import run_recipe

    recipe = run_recipe(run, list(overrides or []))
    names = [name.strip() for name in sources.split(",") if name.strip()]
    with Display() as display:
        numbers = find_label_quality(run, recipe, display, iteration=iteration, sources=names)
    _show(run, "labels", numbers, print_label_quality, as_json)


@app.command()
def coupling(
    run: RunArgument,
    overrides: Overrides = None,
    iteration: Iteration = None,
    samples: Annotated[int, typer.Option(min=2, help="Distinct steps, drawn evenly.")] = 128,
    batches: Annotated[
        int, typer.Option(min=0, help="Other iterations for the mean push; 0 leaves it out.")
    ] = 16,
    metric: Annotated[
        Literal["sgd", "adam"],
        typer.Option(help="Plain, or the optimizer's own, from the checkpoint."),
    ] = "sgd",
    parameters: Annotated[
        str, typer.Option(help="Patterns of parameter names, separated by commas \\[default: all].")
    ] = "",
    checkpoint: Checkpoint = "",
    seed: Seed = 0,
    chunk: Chunk = 16,
    recompute: Annotated[
        bool, typer.Option(help="Keep less between passes, for one more forward pass.")
    ] = True,
    memory_mib: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="What may be kept in memory; more goes to a file \\[default: 1024 on a CPU].",
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="For that file \\[default: that of temporary files].")
    ] = None,
    dtype: Annotated[
        Literal["recipe", "float64"],
        typer.Option(help="Compute as the run did, or in float64: more digits, slower."),
    ] = "recipe",
    diffs: Annotated[
        int, typer.Option(min=0, help="Worst offenders shown with both prompts; 0: none.")
    ] = 3,
    as_json: AsJson = False,
) -> None:
    """Which samples' gradients lift a flawed action.

    untwine diagnose coupling runs/smoke

    untwine diagnose coupling runs/smoke --iteration 3 --samples 64 --metric adam

    Prints tables, and writes RUN/diagnose/coupling.json and coupling.safetensors (the Gram).
    """
    from untwine.diagnose.measure import CouplingOptions, find_coupling
    from untwine.diagnose.recorded import recorded_recipe
    from untwine.diagnose.tables import print_coupling
    from untwine.progress import Display

    recipe = recorded_recipe(run, list(overrides or []))
    options = CouplingOptions(
        count=samples,
        batches=batches,
        seed=seed,
        chunk=chunk,
        recompute=recompute,
        memory_mib=memory_mib,
        folder=folder,
        parameters=[p.strip() for p in parameters.split(",") if p.strip()] or None,
    )
    with Display() as display:
        numbers = find_coupling(
            run,
            recipe,
            options,
            display,
            iteration=iteration,
            checkpoint=checkpoint,
            adam=metric == "adam",
            double=dtype == "float64",
        )
    _show(run, "coupling", numbers, lambda found: print_coupling(found, diffs), as_json)


@app.command()
def separation(
    run: RunArgument,
    overrides: Overrides = None,
    iteration: Iteration = None,
    samples: Annotated[
        int, typer.Option(min=4, help="Distinct labelled steps, drawn evenly.")
    ] = 512,
    pool: Annotated[
        Literal["mean", "last"], typer.Option(help="Which of the action's tokens.")
    ] = "mean",
    distance: Annotated[
        Literal["cosine", "euclidean"], typer.Option(help="For the silhouette.")
    ] = "cosine",
    checkpoint: Checkpoint = "",
    seed: Seed = 0,
    chunk: Chunk = 16,
    as_json: AsJson = False,
) -> None:
    """Whether the hidden states of good and flawed actions are apart.

    untwine diagnose separation runs/smoke

    Prints a table by layer, and writes RUN/diagnose/separation.json and separation.safetensors
    (2-D maps).
    """
    from untwine.diagnose.measure_separation import SeparationOptions, find_separation
    from untwine.diagnose.recorded import recorded_recipe
    from untwine.diagnose.tables import print_separation
    from untwine.progress import Display

    recipe = recorded_recipe(run, list(overrides or []))
    options = SeparationOptions(samples, seed, pool, distance, chunk)
    with Display() as display:
        numbers = find_separation(
            run, recipe, options, display, iteration=iteration, checkpoint=checkpoint
        )
    _show(run, "separation", numbers, print_separation, as_json)


@app.command()
def judging(
    run: RunArgument,
    overrides: Overrides = None,
    iteration: Iteration = None,
    samples: Annotated[int, typer.Option(min=2, help="Distinct steps, drawn evenly.")] = 256,
    draws: Annotated[int, typer.Option(min=0, help="Permutations of the labels.")] = 8,
    checkpoint: Checkpoint = "",
    seed: Seed = 0,
    chunk: Chunk = 16,
    as_json: AsJson = False,
) -> None:
    """Whether learning to judge moves acting: what a step of GCD does to good and flawed steps.

    untwine diagnose judging runs/smoke

    untwine diagnose judging runs/smoke --iteration 0 gcd.objective=pairwise

    Prints a table, and writes RUN/diagnose/judging.json.
    """
    from untwine.diagnose.judging import JudgingOptions, find_judging
    from untwine.diagnose.recorded import recorded_recipe
    from untwine.diagnose.tables import print_judging
    from untwine.progress import Display

    recipe = recorded_recipe(run, list(overrides or []))
    options = JudgingOptions(samples, draws, seed, chunk)
    with Display() as display:
        numbers = find_judging(
            run, recipe, options, display, iteration=iteration, checkpoint=checkpoint
        )
    _show(run, "judging", numbers, print_judging, as_json)


def _show(
    run: Path,
    name: str,
    numbers: dict[str, Any],
    table: Callable[[dict[str, Any]], None],
    as_json: bool,
) -> None:
    """JSON, or a table and where all of it is."""
    from untwine.diagnose.output import results_folder, to_json

    if as_json:
        print(to_json(numbers))
        return
    table(numbers)
    target = results_folder(run) / f"{name}.json"
    Console(stderr=True).print(f"{name}: {target}", highlight=False, soft_wrap=True, markup=False)
