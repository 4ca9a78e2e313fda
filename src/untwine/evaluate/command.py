"""`untwine evaluate`: the fixed sets, played by a run's policy, another model, or at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from untwine.config import Recipe
from untwine.cost import cost_text
from untwine.diagnose.recorded import load_recorded_policy
from untwine.envs.protocol import EnvInfo
from untwine.envs.registry import get_catalogue
from untwine.errors import CheckpointError, ConfigError, EnvError
from untwine.evaluate.identity import agent_changes, decoding_name, set_identity
from untwine.evaluate.protocol import evaluation_refs, examine_set, summarise
from untwine.evaluate.random_agent import play_random
from untwine.evaluate.recorded import record_evaluation
from untwine.progress import Display
from untwine.records import Group
from untwine.training.checkpoint import list_checkpoints
from untwine.training.run_dir import run_cost, run_info, run_recipe
from untwine.workshop import make_collector, open_pool


def evaluate_run(
    run: Path,
    recipe: Recipe,
    sets: Sequence[str],
    episodes: int,
    display: Display,
    *,
    model: str = "",
    decodings: Sequence[str] = ("sampled",),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row of numbers per set and decoding (`sampled`, `greedy`); see `summarise` for the keys.
    Rows of the run's own policy carry what it cost, and are added to RUN/evaluations.jsonl; where
    `recipe` makes another agent of it than the run has, with these `overrides`.

    model  `random`, a checkpoint of the run, a model folder or an id; empty: the run's own policy
    CheckpointError when the run is not finished, so that it has no policy of its own yet.
    """
    if not sets:
        raise ConfigError("evaluate.sets is empty, so there is nothing to play; use --sets L0,L1")
    if not episodes:
        raise ConfigError("evaluate.episodes is 0, so there is nothing to play; use --episodes N")
    if model == "random":
        if "greedy" in decodings:
            raise ConfigError(
                "random commands have no most likely token; leave out --greedy, --both"
            )
        return evaluate_random(recipe, sets, episodes, display, seed)
    played = {name: evaluation_refs(recipe.env, name, episodes) for name in sets}  # all there?
    folder = model or str(_own_policy(run))
    own, cost = run_recipe(run), run_cost(run)  # before anything is played, which may take long
    rows = []
    with open_pool(recipe.env, list_commands=recipe.lists_commands) as pool:
        policy = load_recorded_policy(run, recipe, 0, folder).policy
        collector = make_collector(policy, pool, recipe)
        for name, refs in played.items():
            for decoding in decodings:
                greedy = decoding == "greedy"
                with display.bar(f"evaluate {name}, {decoding}", len(refs), "episode") as bar:
                    groups, identity = examine_set(
                        collector, recipe, name, refs, seed, greedy=greedy, on_turn=bar.update
                    )
                rows.append(_row(folder, groups, collector.info, identity))
                if not model:
                    changes = agent_changes(own, recipe, identity["decoding"])
                    rows[-1] |= cost | ({"overrides": changes} if changes else {})
                    record_evaluation(run, rows[-1])
    if any("overrides" in row for row in rows):
        display.line(
            "[yellow]another agent:[/yellow] it was played with overrides, so `untwine compare` "
            "does not take the result as the run's own"
        )
    return rows


def _own_policy(run: Path) -> Path:
    """The folder of the policy that a run has ended with. CheckpointError until it has."""
    folder = run / "model"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{run} holds no trained model yet; continue it with --resume")
    status = run_info(run).get("status", "unknown")
    if status != "finished":
        kept = list_checkpoints(run / "checkpoints")
        or_newest = f", or play its newest checkpoint with `--model {kept[-1]}`" if kept else ""
        raise CheckpointError(
            f"{run} is not finished (its status is {status!r}), so {folder} is not what it has "
            f"learned; go on with `untwine train --resume {run}`{or_newest}"
        )
    return folder


def evaluate_random(
    recipe: Recipe, sets: Sequence[str], episodes: int, display: Display, seed: int = 0
) -> list[dict[str, Any]]:
    """The same for an agent that takes random admissible commands."""
    env = recipe.env
    info = get_catalogue(env.name, env.options).info
    if not info.lists_commands:
        raise EnvError(f"environment {env.name!r} does not list its commands")
    rows = []
    with open_pool(env, list_commands=True) as pool:
        for name, refs in {name: evaluation_refs(env, name, episodes) for name in sets}.items():
            with display.bar(f"random on {name}", len(refs), "episode") as bar:
                groups = play_random(pool, refs, env.max_steps, seed, bar.update)
            identity = set_identity(env, name, refs, decoding=decoding_name(False, None), seed=seed)
            rows.append(_row("random", groups, info, identity))
    return rows


def _row(
    policy: str, groups: Sequence[Group], info: EnvInfo, identity: Mapping[str, Any]
) -> dict[str, Any]:
    head = {"environment": info.title, "set": identity["set"], "policy": policy}
    decoding = {"decoding": identity["decoding"]}
    return {**head, **decoding, **summarise(groups, info), "identity": identity}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The rows of one policy as a table on the terminal, under the name of the environment and of
    the policy; intervals in brackets."""
    title, policy, episodes = (
        ", ".join(dict.fromkeys(str(row[key]) for row in rows))
        for key in ("environment", "policy", "episodes")
    )
    table = Table(
        title=f"{title}, {episodes} episodes each\n{Path(policy).as_posix()}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("set", no_wrap=True)
    for column in ("score", "success", "length", "flawed", "invalid", "repeated"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["set"] if row["decoding"] == "sampled" else f"{row['set']}, {row['decoding']}",
            with_interval(row["outcome_mean"], row["outcome_interval"]).replace(" [", "\n["),
            with_interval(row["success_rate"], row["success_interval"]).replace(" [", "\n["),
            f"{row['episode_length']:.1f}",
            f"{100 * row['flawed_rate']:.0f} %",
            f"{100 * row['invalid_rate']:.0f} %",
            f"{100 * row['repeated_rate']:.0f} %",
        )
    console = Console()
    console.print(table)
    for cost in dict.fromkeys(text for row in rows if (text := cost_text(row))):
        console.print(f"training cost {cost}", highlight=False, soft_wrap=True)


def with_interval(value: float, interval: Sequence[float]) -> str:
    """`43.1 [38.0, 48.2]`, in percent."""
    low, high = interval
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
