"""The commands `untwine diagnose ...`. Thin: they open a run, call one function, print and save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from untwine.errors import CheckpointError

if TYPE_CHECKING:
    from untwine.config import Recipe
    from untwine.policy.loading import Policy

app = typer.Typer(help="See why a flawed action survives training.", no_args_is_help=True)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Iteration = Annotated[
    int | None, typer.Option(min=0, help="Iteration whose episodes are looked at [default: last].")
]
Checkpoint = Annotated[
    str,
    typer.Option(
        help="Policy: a model folder or a checkpoint [default: the one that played the episodes "
        "if it is still there, otherwise RUN/model].",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the draw of samples.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Chunk = Annotated[int, typer.Option(min=1, help="Samples per forward pass; memory, not results.")]


@app.command()
def coupling(
    run: RunArgument,
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
        str, typer.Option(help="Patterns of parameter names, separated by commas [default: all].")
    ] = "",
    checkpoint: Checkpoint = "",
    seed: Seed = 0,
    chunk: Chunk = 16,
    recompute: Annotated[bool, typer.Option(help="Less memory for one more forward pass.")] = True,
    as_json: AsJson = False,
) -> None:
    """Which samples' gradients lift a flawed action.

    untwine diagnose coupling runs/smoke

    untwine diagnose coupling runs/smoke --iteration 3 --samples 64 --metric adam

    Prints tables, and writes RUN/diagnose/coupling.json and coupling.safetensors (the Gram).
    """
    from untwine.diagnose.measure import CouplingOptions, measure_coupling
    from untwine.diagnose.output import print_coupling
    from untwine.episodes import read_groups
    from untwine.progress import Display

    recipe, files, number = _open(run, iteration)
    policy, source, state = _policy(run, recipe, number, checkpoint)
    preconditioner = _adam(state, policy, recipe) if metric == "adam" else None
    near = sorted((n for n in files if n != number), key=lambda n: abs(n - number))[:batches]
    options = CouplingOptions(
        count=samples,
        batches=batches,
        seed=seed,
        mean=recipe.loss.mean,
        temperature=recipe.sampling.temperature,
        chunk=chunk,
        recompute=recompute,
        parameters=[p.strip() for p in parameters.split(",") if p.strip()] or None,
        preconditioner=preconditioner,
    )
    with Display() as display:
        report = measure_coupling(
            policy,
            read_groups(files[number]),
            [read_groups(files[n]) for n in sorted(near)],
            options,
            display,
        )
    head = {"format": "untwine-coupling-1", "iteration": number, "policy": source, "metric": metric}
    _finish(run, "coupling", {**head, **report.numbers}, report.tensors, print_coupling, as_json)


@app.command()
def separation(
    run: RunArgument,
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
    from untwine.diagnose.measure_separation import measure_separation
    from untwine.diagnose.output import print_separation
    from untwine.episodes import read_groups
    from untwine.progress import Display

    recipe, files, number = _open(run, iteration)
    policy, source, _ = _policy(run, recipe, number, checkpoint)
    with Display() as display:
        numbers, tensors = measure_separation(
            policy,
            read_groups(files[number]),
            count=samples,
            seed=seed,
            pool=pool,
            metric=distance,
            chunk=chunk,
            display=display,
        )
    head = {"format": "untwine-separation-1", "iteration": number, "policy": source}
    _finish(run, "separation", {**head, **numbers}, tensors, print_separation, as_json)


def _open(run: Path, iteration: int | None) -> tuple[Recipe, dict[int, Path], int]:
    """The recipe, the episode files by iteration, and the iteration to look at."""
    from untwine.training.run_dir import episode_files, run_recipe

    recipe = run_recipe(run)
    files = {int(file.name[5:11]): file for file in episode_files(run)}
    if not files:
        raise CheckpointError(f"{run} holds no episodes yet; let it do an iteration first")
    number = max(files) if iteration is None else iteration
    if number not in files:
        raise CheckpointError(
            f"{run} holds no episodes of iteration {number}; it has {min(files)} to {max(files)}"
        )
    return recipe, files, number


def _policy(
    run: Path, recipe: Recipe, iteration: int, named: str
) -> tuple[Policy, str, Path | None]:
    """The policy, where it is from, and the checkpoint if it is from one."""
    from untwine.config import LoRAConfig
    from untwine.policy.loading import load_policy
    from untwine.training.checkpoint import load_weights, read_position

    checkpoints = run / "checkpoints"
    folder = Path(named) if named else checkpoints / f"rl-{iteration:06d}"
    if named and (checkpoints / named / "state.json").is_file():
        folder = checkpoints / named
    state = folder if (folder / "state.json").is_file() else None
    if state is not None:
        read_position(state)  # checks the files
    if state is not None or not named:
        folder = run / ("initial" if iteration == 0 and state is None else "model")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} holds no model; let the run do an iteration first")
    source = named if named and state is None else str(folder)
    choice = recipe.policy.model_copy(update={"model": source})
    if state is None:  # saved models hold no adapters of their own
        choice = choice.model_copy(update={"lora": LoRAConfig()})
        return load_policy(choice, tuple, recipe.seed), source, None
    policy = load_policy(choice, tuple, recipe.seed)
    load_weights(state, policy.model)
    return policy, str(state), state


def _adam(checkpoint: Path | None, policy: Policy, recipe: Recipe) -> dict[str, Any]:
    """The optimizer's diagonal at a checkpoint."""
    import torch

    from untwine.diagnose.parameters import adam_preconditioner
    from untwine.training.checkpoint import load_optimizer

    if checkpoint is None:
        raise CheckpointError(
            "--metric adam needs the checkpoint the episodes were sampled with, and it is no "
            "longer there; take the last iteration, or keep more with checkpoint.keep"
        )
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    settings = recipe.rl.optimizer
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=settings.betas)
    load_optimizer(checkpoint, optimizer)
    if not optimizer.state:
        raise CheckpointError(
            f"--metric adam needs an optimizer that has taken a step, and at {checkpoint.name} it "
            "has taken none; take a later iteration"
        )
    return adam_preconditioner(policy.model, optimizer)


def _finish(
    run: Path, name: str, numbers: dict[str, Any], tensors: Any, table: Any, as_json: bool
) -> None:
    from rich.console import Console

    from untwine.diagnose.output import save_results, to_json

    target = save_results(run / "diagnose", name, numbers, tensors)
    if as_json:
        print(to_json(numbers))
        return
    table(numbers, Console())
    Console(stderr=True).print(f"{name}: {target}", highlight=False, soft_wrap=True)
