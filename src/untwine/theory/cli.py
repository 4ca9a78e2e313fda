"""`untwine theory`: the exact small models from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from untwine.errors import ConfigError, nearest

app = typer.Typer(
    name="theory",
    help="Exact small models of why a flawed action survives training, with figures. They need "
    "no model and no environment, and take seconds.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder of the figure; a figure there is replaced."),
]
FormatName = Annotated[str, typer.Option("--format", help="Format of the figure: svg or png.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn at random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")]


@app.command()
def calibration(
    group_sizes: Annotated[
        str, typer.Option("--group-sizes", help="Group sizes G, separated by commas.")
    ] = "2,4,8,16",
    groups: Annotated[
        int, typer.Option(min=100, max=1_000_000, help="Sampled groups per point of the grid.")
    ] = 10_000,
    draws: Annotated[
        int, typer.Option(min=1, max=100_000, help="Random cases with graded returns.")
    ] = 2000,
    tasks: Annotated[
        int, typer.Option(min=1, max=20_000, help="Random tasks of several steps.")
    ] = 2000,
    seed: Seed = 0,
    out: Out = None,
    format: FormatName = "svg",
    as_json: AsJson = False,
) -> None:
    """Does outcome reward misjudge a flawed action?

    A flawed action with probability q that costs r has the advantage -r (1 - q) and pushes its
    own logit by q r (q - 1), never up. Checked over a grid of p, q, r and G: exactly, and with
    sampled GRPO. Then graded returns and several steps, where more can go wrong.

    untwine theory calibration

    untwine theory calibration --group-sizes 2,8,64 --json
    """
    from untwine.theory import calibration as model
    from untwine.theory import figures, horizon, tables
    from untwine.theory.advantage import check_group_size

    sizes = [check_group_size(int(n)) for n in _numbers("--group-sizes", group_sizes)]
    path = _figure_path(out, "calibration", format)
    numbers = model.study(sizes, groups, draws, seed)
    numbers["horizon"] = horizon.study(tasks, 3, 3, 5, 8, seed)
    shown = horizon.random_tasks(tasks, 3, 3, 5, seed)
    figures.draw_calibration(path, sizes, groups, seed, shown)
    _show(numbers, path, tables.calibration_tables, tables.calibration_verdict, as_json)


@app.command()
def squeezing(
    ratios: Annotated[
        str, typer.Option(help="Risk of the mild over that of the worst action, r3 / r2.")
    ] = "0.05,0.1,0.25,0.5,0.75,0.9",
    good_worst: Annotated[
        float, typer.Option(help="Overlap of the features of the good and the worst action.")
    ] = 0.0,
    good_mild: Annotated[float, typer.Option(help="The same for the good and the mild one.")] = 0.0,
    flawed: Annotated[float, typer.Option(help="The same for the two flawed ones.")] = 0.0,
    points: Annotated[
        int, typer.Option(min=4, max=200, help="Points per side of the grid of starts.")
    ] = 30,
    horizon: Annotated[float, typer.Option(help="End of the flow, in units of 1 / r2.")] = 400.0,
    features: Annotated[
        int, typer.Option(min=0, max=10_000, help="Random shared features to try.")
    ] = 200,
    seed: Seed = 0,
    out: Out = None,
    format: FormatName = "svg",
    as_json: AsJson = False,
) -> None:
    """Does correcting one flawed action feed another?

    Softmax over a good, a mildly flawed and a worst action; exact gradient flow from a grid of
    starts, for several risks and features, and sampled GRPO beside it. Tells where a single
    flawed action rises for a while, and whether the two together do.

    untwine theory squeezing

    untwine theory squeezing --good-mild 0.6 --ratios 0.05,0.5
    """
    from untwine.theory import figures, tables
    from untwine.theory import squeezing as model

    gram = model.overlaps(good_worst, good_mild, flawed)
    chosen = _numbers("--ratios", ratios)
    path = _figure_path(out, "squeezing", format)
    numbers = model.study(gram, chosen, points, horizon, features, seed)
    figures.draw_squeezing(path, gram, chosen, seed)
    _show(numbers, path, tables.squeezing_tables, tables.squeezing_verdict, as_json)


@app.command()
def regions(
    risk: Annotated[float, typer.Option(help="r, what the action costs where it is flawed.")] = 0.3,
    gain: Annotated[float, typer.Option(help="r', what it gains where it is good.")] = 0.3,
    overlap: Annotated[float, typer.Option(help="κ, overlap of the features, 0 to 1.")] = 0.8,
    success: Annotated[
        float, typer.Option(help="Success probability without the action where it is flawed.")
    ] = 0.6,
    success_other: Annotated[
        float, typer.Option("--success-other", help="The same where it is good.")
    ] = 0.3,
    group_size: Annotated[int, typer.Option(min=2, max=1000, help="G of sampled GRPO.")] = 8,
    points: Annotated[
        Path | None,
        typer.Option(
            "--points",
            metavar="RUN",
            help="Measured points to lay over the plot: a run with `untwine diagnose coupling` "
            'done, its coupling.json, or a file with one {"q": 0.9, "push": 0.01} per line, '
            '"q_other" and "label" being optional.',
        ),
    ] = None,
    starts: Annotated[
        int, typer.Option(min=3, max=100, help="Points per side of the grid of starts.")
    ] = 20,
    horizon: Annotated[float, typer.Option(help="End of the flow.")] = 3000.0,
    seed: Seed = 0,
    out: Out = None,
    format: FormatName = "svg",
    as_json: AsJson = False,
) -> None:
    """When does the push from other states beat the correction?

    One action, flawed in a state (it costs r) and good in another (it gains r'), whose features
    overlap by κ. Field, boundary, flows and the time spent near q = 1; sampled GRPO beside it.
    In a point, q is the probability of a flawed action and push its coupled term as dz/dt, in the
    units of r q (1 - q).

    untwine theory regions --overlap 0.9

    untwine theory regions --points runs/smoke

    untwine theory regions --points probes.jsonl --risk 0.2
    """
    from untwine.theory import figures, tables
    from untwine.theory import regions as model

    two = model.TwoStates(risk, gain, overlap, success, success_other)
    measured = model.read_points(points) if points else []
    path = _figure_path(out, "regions", format)
    numbers = model.study(two, starts, horizon, group_size, seed)
    if measured:
        numbers["measured"] = model.judge_points(two, measured)
    figures.draw_regions(path, two, horizon, measured)
    _show(numbers, path, tables.regions_tables, tables.regions_verdict, as_json)


def _numbers(option: str, text: str) -> list[float]:
    """Numbers from a list with commas."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or (option == "--group-sizes" and any(v % 1 for v in values)):
        kind = "whole numbers" if option == "--group-sizes" else "numbers"
        raise ConfigError(f"{option} takes {kind} separated by commas, not {text!r}")
    return values


def _figure_path(out: Path | None, name: str, format: str) -> Path:
    if format not in ("svg", "png"):
        hint = nearest(format, ("svg", "png"))
        raise ConfigError(f"--format must be svg or png, not {format!r}.{hint}")
    folder = out if out is not None else Path("runs") / f"theory-{name}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; choose another --out")
    return folder / f"{name}.{format}"


def _show(
    numbers: dict[str, Any],
    path: Path,
    tables: Callable[[dict[str, Any]], Sequence[Table]],
    verdict: Callable[[dict[str, Any]], str],
    as_json: bool,
) -> None:
    """Tables and verdict for people, or everything for machines."""
    if as_json:
        whole = {**numbers, "verdict": verdict(numbers), "figure": str(path)}
        print(json.dumps(whole, indent=2, ensure_ascii=False))
        return
    console = Console()
    for table in tables(numbers):
        console.print(table)
    console.print(escape(verdict(numbers)), highlight=False)
    Console(stderr=True).print(f"figure: {path}", highlight=False, soft_wrap=True, markup=False)
