"""The command line. Every command is thin: it reads its arguments and calls one function."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from untwine.diagnose.cli import app as diagnose
from untwine.errors import ConfigError, UntwineError
from untwine.theory.cli import app as theory

_MORE_MEMORY = (
    "(lower env.sessions, rl.microbatch_tokens or prompt.max_tokens, or set policy.dtype=bfloat16, "
    "policy.gradient_checkpointing=true or policy.lora.rank=8; what was saved is kept)"
)

app = typer.Typer(
    name="untwine",
    help="Train language agents with GRPO, see why a flawed action survives, and train against it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as rl.iterations=5."),
]


@app.command()
def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe, such as recipes/smoke.yaml."),
    ] = None,
    overrides: Overrides = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Run directory \\[default: runs/NAME].")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Continue this run exactly.")
    ] = None,
) -> None:
    """Train a policy.

    untwine train recipes/smoke.yaml

    untwine train recipes/scienceworld-grpo.yaml rl.iterations=50 seed=1 --run runs/grpo-1

    untwine train --resume runs/grpo-1
    """
    from untwine.config import load_recipe
    from untwine.progress import Display
    from untwine.training.loop import train as run_training
    from untwine.training.run_dir import resumed_recipe

    changes = list(overrides or [])
    if resume is not None:
        if recipe is not None:
            if "=" not in str(recipe):
                raise ConfigError("--resume takes the recipe from the run; leave the recipe out")
            changes.insert(0, str(recipe))
        if run is not None:
            raise ConfigError("--resume goes on in the run's own folder; leave --run out")
        settings, path = resumed_recipe(resume, changes), resume
    elif recipe is None:
        raise ConfigError("name a recipe (recipes/smoke.yaml is the smallest) or --resume RUN")
    else:
        settings = load_recipe(recipe, changes)
        path = run or Path("runs") / settings.name
    with Display() as display:
        model = run_training(settings, path, display, resume=resume is not None)
    display.line(f"finished: policy in {model}; look at it with `untwine report {path}`")


@app.command()
def evaluate(
    run: RunArgument,
    overrides: Overrides = None,
    sets: Annotated[
        str, typer.Option("--sets", help="Sets of the split file, separated by commas.")
    ] = "",
    episodes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Episodes per set \\[default: evaluate.episodes of the run's recipe]."
        ),
    ] = None,
    greedy: Annotated[bool | None, typer.Option(help="Take the most likely token.")] = None,
    both: Annotated[bool, typer.Option("--both", help="Sampled, and greedy as well.")] = False,
    model: Annotated[
        str, typer.Option(help="A checkpoint, another model folder or id, or `random`.")
    ] = "",
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sampling \\[default: that of the run].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Play the fixed evaluation sets with the policy of a run; kept in RUN/evaluations.jsonl.

    untwine evaluate runs/smoke --sets L0,L1 --episodes 100

    untwine evaluate runs/smoke --model random
    """
    from untwine.evaluate.command import evaluate_run, print_table
    from untwine.evaluate.identity import DECODINGS
    from untwine.progress import Display
    from untwine.training.run_dir import run_recipe

    recipe = run_recipe(run, list(overrides or []))
    names = _names(sets) or recipe.evaluate.sets
    if greedy is None:
        greedy = recipe.evaluate.greedy and model != "random"
    decodings = DECODINGS if both else (DECODINGS[greedy],)
    with Display() as display:
        rows = evaluate_run(
            run,
            recipe,
            names,
            recipe.evaluate.episodes if episodes is None else episodes,
            display,
            model=model,
            decodings=decodings,
            seed=recipe.seed if seed is None else seed,
        )
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)


@app.command()
def play(
    env: Annotated[str, typer.Argument(help="Environment, such as rooms, or my_module:FAMILY.")],
    task: Annotated[str, typer.Argument(help="Task name; empty lists the tasks.")] = "",
    variation: Annotated[int, typer.Argument(help="Variation number.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Environment option KEY=VALUE.")
    ] = None,
) -> None:
    """Act in an environment yourself.

    untwine play rooms fetch 3

    Type a command; /help lists what else you can type.
    """
    from untwine.play import play_session

    play_session(env, task, variation, option or [])


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One or several runs.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML file \\[default: RUN/report.html].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Write one self-contained HTML page about one or several runs.

    untwine report runs/smoke

    untwine report runs/demo-DATE/grpo runs/demo-DATE/gcd --out compare.html
    """
    from untwine.report import build_report, report_numbers

    if as_json:
        if out is not None:
            raise ConfigError("--json prints the numbers and writes no page; leave --out out")
        print(json.dumps(report_numbers(runs), indent=2))
        return
    target = build_report(runs, out or runs[0] / "report.html")
    Console(stderr=True).print(f"report: {target}", highlight=False, soft_wrap=True)


@app.command()
def sweep(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="The recipe, unless a plan names it.")
    ] = None,
    overrides: Overrides = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds, from the recipe's on \\[default: 5].")
    ] = None,
    varied: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=A,B", help="Arms; several make every combination."),
    ] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar="NAME:KEY=A,KEY=B", help="An arm that sets several keys."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Recipe, arms, seeds and looks.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Runs at a time; 0: one per core.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the sweep \\[default: runs/NAME-sweep].")
    ] = None,
    pair: Annotated[
        bool, typer.Option(help="One cold start per seed for all arms that can share it.")
    ] = True,
    measure: Annotated[str, typer.Option(help="Compared: success or score.")] = "success",
) -> None:
    """Train every arm with every seed in parallel processes, and compare. Started again, the same
    command finishes what is missing.

    untwine sweep recipes/smoke.yaml --seeds 3 --vary gcd.objective=none,generative/ce

    untwine sweep recipes/smoke.yaml --arm grpo:gcd.objective=none --arm gcd:gcd.weight=0.1

    untwine sweep --plan studies/gcd/plan.yaml --out runs/study
    """
    from untwine.compare.show import print_comparison
    from untwine.config import load_recipe
    from untwine.progress import Display
    from untwine.sweep.command import run_sweep
    from untwine.sweep.plan import plan_sweep
    from untwine.sweep.plan_file import choose_plan

    changes = list(overrides or [])
    wanted = choose_plan(recipe, changes, varied or [], arms or [], plan, seeds)
    folder = out or Path("runs") / f"{load_recipe(wanted.recipe, changes).name}-sweep"
    planned = plan_sweep(wanted.recipe, changes, wanted.arms, wanted.seeds, folder, pair=pair)
    with Display() as display:
        numbers, page = run_sweep(
            planned, folder, display, jobs=jobs, measure=measure, looks=wanted.looks
        )
    print_comparison(numbers)
    Console(stderr=True).print(f"comparison: {page}", highlight=False, soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs, folders of runs, or the folder of a sweep."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for page, figure and numbers.")
    ] = None,
    measure: Annotated[str, typer.Option(help="success or score.")] = "success",
    sets: Annotated[str, typer.Option("--sets", help="Sets, separated by commas.")] = "",
    baseline: Annotated[str, typer.Option(help="Arm to compare with \\[default: the first].")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Compare arms over their seeds, with intervals; refuses unlike evaluation sets.

    untwine compare runs/sweep

    untwine compare runs/grpo-1 runs/grpo-2 runs/gcd-1 runs/gcd-2 --out runs/grpo-against-gcd
    """
    from untwine.compare.numbers import compare_runs
    from untwine.compare.show import print_comparison, write_comparison

    numbers = compare_runs(runs, measure=measure, sets=_names(sets), baseline=baseline)
    page = write_comparison(numbers, out) if out else None
    if as_json:
        print(json.dumps(numbers, indent=2))
    else:
        print_comparison(numbers)
    if page:
        Console(stderr=True).print(f"comparison: {page}", highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Tell what is installed, and what each missing extra unlocks."""
    from untwine.doctor import examine

    raise typer.Exit(examine())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/demo"),
    recipe: Annotated[Path, typer.Option(help="The recipe.")] = Path("recipes/demo.yaml"),
    overrides: Overrides = None,
) -> None:
    """Cold start, then GRPO and GRPO+GCD side by side, a table and a report."""
    from untwine.demo import run_demo

    run_demo(recipe, out, list(overrides or []))


app.add_typer(diagnose, name="diagnose")
games = typer.Typer(help="Games from elsewhere.", no_args_is_help=True)
app.add_typer(games, name="games")
app.add_typer(theory, name="theory")


@games.command("import")
def games_import(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What alfworld-download filled.")],
) -> None:
    """Check and index a folder of official ALFWorld games."""
    from untwine.envs.alfworld.importing import import_games

    import_games(folder)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import untwine

        print(f"untwine {untwine.__version__}")
        raise typer.Exit


def _names(text: str) -> list[str]:
    """`L0, L1` as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def main() -> None:
    """Entry point."""
    run_guarded(lambda: app(standalone_mode=False))


def run_guarded(work: Callable[[], object]) -> NoReturn:
    """Do the work of a process: faults become one sentence and an exit code, never a traceback."""
    # Two busy processes on a small machine ruin each other's spinning OpenMP threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = work()
    except UntwineError as error:
        _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped", 130)
    except typer.Exit as error:
        code = error.exit_code
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; it is not imported for this
            _fail(f"{str(error).splitlines()[0]} {_MORE_MEMORY}", 1)
        if not hasattr(error, "format_message"):  # not a fault of the command line
            raise
        _fail(error.format_message() + " (see --help)", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True).print(
        f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True
    )
    sys.exit(code)


if __name__ == "__main__":
    main()
