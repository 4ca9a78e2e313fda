"""What a sweep consists of: arms, seeds, and cold starts that arms share.

OUT/sweep.json               the planned runs: folder, arm, seed
OUT/cold/KIND/seed-0/        a run directory: the cold start of one seed
OUT/arms/ARM/seed-0/         a run directory; beside it seed-0.yaml, seed-0.log, seed-0.lock
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untwine.compare.arms import COLD_FOLDER
from untwine.compare.runs import COLD_ARM, SWEEP_FILE, read_sweep
from untwine.config import Recipe, load_recipe, make_recipe
from untwine.config.keys import leaves
from untwine.errors import CheckpointError, ConfigError, UntwineError
from untwine.evaluate.identity import decoding_name
from untwine.evaluate.protocol import evaluation_refs
from untwine.sweep.crew import Job
from untwine.training.checking import check_recipe
from untwine.training.run_dir import run_recipe

FORMAT = "untwine-sweep-1"
LOCK = "sweep.lock"
AFTER_COLD_START = (
    *("rl", "credit", "loss", "gcd", "correction", "evaluate"),
    *("diagnose", "checkpoint", "name"),
)
_BEFORE = ("correction.sentences", "rl.microbatch_tokens")
"""Sections of a recipe that do not touch its cold start, but for these keys (what is told, and how
long an expert episode may be): arms that differ in nothing else share one."""

_ONE_THREAD = "but every run of a sweep has one thread, so that it can be repeated"
_NO_ARM = {
    "policy.threads": _ONE_THREAD,
    "cold_start.threads": _ONE_THREAD,
    "name": "which changes nothing; name the arm instead",
}
"""Keys that a sweep sets itself."""

_LONGEST_NAME = 80


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train: a name, and `section.key=value` overrides of the recipe.

    seeds  how many, where it is not as many as the sweep has (0)
    """

    name: str
    overrides: tuple[str, ...] = ()
    seeds: int = 0

    def __post_init__(self) -> None:
        if self.name.startswith(COLD_ARM):
            raise ConfigError(
                f"arm {self.name!r} has the name of the cold starts that arms share; choose another"
            )
        for key, why in _NO_ARM.items():
            if any(_key(override) == key for override in self.overrides):
                raise ConfigError(f"arm {self.name!r} sets {key}, {why}")
        if any(_key(override) == "seed" for override in self.overrides):
            raise ConfigError(
                f"arm {self.name!r} sets seed, but every arm is trained with the same seeds, from "
                "the recipe's on; say how many with --seeds, or `seeds:` in a plan file"
            )

    @property
    def before(self) -> tuple[str, ...]:
        """The overrides that change the cold start."""
        return tuple(
            o
            for o in self.overrides
            if _section(o) not in AFTER_COLD_START or _key(o).startswith(_BEFORE)
        )


@dataclass(frozen=True, slots=True)
class Planned:
    """A job with its place in the comparison."""

    job: Job
    arm: str
    seed: int


def vary(options: Sequence[str]) -> list[Arm]:
    """Arms from options `key=a,b`: every combination of their values, the last option fastest.
    Commas within brackets or quotes do not separate."""
    choices: list[list[str]] = []
    for option in options:
        key, equals, text = option.partition("=")
        values = split_values(text)
        if not equals or not key.strip() or not all(values):
            raise ConfigError(f"--vary {option!r} is not of the form section.key=value,value")
        if len(set(values)) < len(values):
            raise ConfigError(f"--vary {option!r} names a value twice")
        choices.append([f"{key.strip()}={value}" for value in values])
    if len({option.partition("=")[0].strip() for option in options}) < len(options):
        raise ConfigError("--vary names a key twice; put all its values into one option")
    return [Arm(", ".join(combination), combination) for combination in itertools.product(*choices)]


def plan_sweep(
    recipe_path: Path,
    overrides: Sequence[str],
    arms: Sequence[Arm],
    seeds: int,
    out: Path,
    *,
    pair: bool = True,
) -> list[Planned]:
    """The runs in the order in which they are begun: all arms of the first seed, then the next, so
    that pairs are complete early. Seeds count from the recipe's.

    pair  make the cold start of each seed once, and begin every arm that differs only in keys after
          the cold start with its policy; without, every run does its own
    """
    base = load_recipe(recipe_path, overrides)
    recipes = {arm: load_recipe(recipe_path, [*overrides, *arm.overrides]) for arm in arms}
    colds = {
        arm: load_recipe(
            recipe_path,
            [*overrides, *arm.before, *_examined_alike(arm, arms), "rl.iterations=0"],
        )
        for arm, recipe in recipes.items()
        if pair and recipe.cold_start.episodes and recipe.rl.iterations
    }
    planned: dict[Path, Planned] = {}
    most = max([seeds, *(arm.seeds for arm in arms)])
    for number, seed in enumerate(range(base.seed, base.seed + most)):
        for arm, recipe in recipes.items():
            if number >= (arm.seeds or seeds):
                continue
            name = arm.name or base.name
            own = _changed(recipe, f"{name}, seed {seed}", seed)
            start = None
            if arm in colds:
                kind = ", ".join(arm.before)
                start = out / COLD_FOLDER / (folder_name(kind) or "base") / f"seed-{seed}"
                title = f"{COLD_ARM} ({kind})" if kind else COLD_ARM
                cold = _changed(colds[arm], f"{title}, seed {seed}", seed)
                planned.setdefault(start, Planned(Job(cold.name, cold, start), title, seed))
                own = make_recipe(
                    {
                        **own.model_dump(),
                        "policy": {**own.policy.model_dump(), "model": str(start / "model")},
                        "cold_start": {**own.cold_start.model_dump(), "episodes": 0},
                    }
                )
            run = out / "arms" / (folder_name(name) or "base") / f"seed-{seed}"
            planned[run] = Planned(Job(own.name, own, run, start), name, seed)
    return list(planned.values())


def _examined_alike(arm: Arm, arms: Sequence[Arm]) -> list[str]:
    """The overrides of `evaluate` of all arms that share the cold start of `arm`; it is examined
    so, too."""
    sharing = [other for other in arms if other.before == arm.before]
    return [
        override
        for override in arm.overrides
        if _section(override) == "evaluate" and all(override in a.overrides for a in sharing)
    ]


def check_arms(planned: Sequence[Planned]) -> None:
    """What training would say, for the first arm that cannot be trained."""
    for arm, recipe in {one.arm: one.job.recipe for one in planned}.items():
        try:
            check_recipe(recipe)
        except UntwineError as error:
            raise type(error)(f"arm {arm!r}: {error}") from error


def check_examined(planned: Sequence[Planned]) -> None:
    """ConfigError when the arms have no evaluation set in common, so that the sweep could not end
    in a comparison."""
    shared: dict[str, str] | None = None
    first = ""
    recipes = {one.arm: one.job.recipe for one in planned}
    for arm in sorted(recipes, key=lambda arm: arm.startswith(COLD_ARM)):
        recipe = recipes[arm]
        config, env = recipe.evaluate, recipe.env
        if not config.sets or not config.episodes:
            key = "episodes is 0" if config.sets else "sets is empty"
            raise ConfigError(
                f"evaluate.{key} (arm {arm!r}), and a sweep ends in a comparison of evaluations; "
                "set it, or train the runs one by one"
            )
        played = [evaluation_refs(env, name, config.episodes) for name in config.sets]
        decoding = decoding_name(config.greedy, config.temperature)
        own = {
            name: repr((env.name, env.options, env.max_steps, decoding, refs))
            for name, refs in zip(config.sets, played, strict=True)
        }
        if shared is None:
            shared, first = own, arm
        shared = {name: seen for name, seen in shared.items() if own.get(name) == seen}
        if not shared:
            raise ConfigError(
                f"arms {first!r} and {arm!r} have no evaluation set in common, so they could not "
                "be compared; give all arms the same evaluate.sets, evaluate.episodes, decoding, "
                "env.max_steps and games"
            )


def check_folder(out: Path) -> None:
    """ConfigError when `out` holds something, and that is no sweep."""
    if out.is_file():
        raise ConfigError(f"{out} is a file; choose another --out")
    names = {entry.name for entry in out.iterdir()} if out.exists() else set()
    if names - {LOCK} and SWEEP_FILE not in names:
        raise ConfigError(f"{out} holds something else than a sweep; choose another --out")


def write_plan(out: Path, planned: Sequence[Planned]) -> None:
    """Write OUT/sweep.json, runs of earlier plans included. ConfigError when a run that is already
    there is not the planned one."""
    for one in planned:
        if (one.job.run / "recipe.yaml").is_file():
            _check_same(one.job)
    file = out / SWEEP_FILE
    new = {one.job.run.relative_to(out).as_posix(): one for one in planned}
    runs = [{"folder": f, "arm": one.arm, "seed": one.seed} for f, one in new.items()]
    if file.exists():
        others = [entry for entry in read_sweep(out) if entry["folder"] not in new]
        _check_other_seeds(out, planned, others)
        runs += others
    out.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".partial")
    scratch.write_text(json.dumps({"format": FORMAT, "runs": runs}, indent=1), encoding="utf-8")
    scratch.replace(file)


def _check_same(job: Job) -> None:
    """ConfigError when the run that is there was not begun as the planned one."""
    if (known := _known_recipe(job.run)) is None:
        return
    one, other = (_comparable(recipe, job.after) for recipe in (known, job.recipe))
    if not job.recipe.rl.iterations:  # how a cold start is examined makes no other one of it
        one, other = (
            {key: value for key, value in tree.items() if not key.startswith("evaluate.")}
            for tree in (one, other)
        )
    if changed := _differing(one, other):
        raise ConfigError(
            f"{job.run} was begun with another recipe ({changed}); choose another --out, or take "
            "back what was changed"
        )


def _check_other_seeds(
    out: Path, planned: Sequence[Planned], others: Sequence[Mapping[str, Any]]
) -> None:
    """ConfigError when an earlier plan trained other seeds of an arm in another way."""
    own = {one.arm: one.job for one in planned if not one.arm.startswith(COLD_ARM)}
    for entry in others:
        job = own.get(entry["arm"])
        known = _known_recipe(out / entry["folder"]) if job else None
        if job is None or known is None:
            continue
        seedless = (_seedless(recipe, job.after) for recipe in (known, job.recipe))
        if changed := _differing(*seedless):
            raise ConfigError(
                f"arm {entry['arm']!r} was trained in another way with seed {entry['seed']} "
                f"({changed}); choose another --out, or name the arm otherwise"
            )


def _known_recipe(run: Path) -> Recipe | None:
    """None where there is none, or the run was killed while it was written, and begins anew."""
    try:
        return run_recipe(run)
    except (ConfigError, CheckpointError):
        return None


def _comparable(recipe: Recipe, start: Path | None) -> dict[str, str]:
    """The recipe by key; the shared cold start by its place in the sweep, which may be moved."""
    tree = {key: str(value) for key, value in leaves(recipe.model_dump(mode="json"))}
    if start is not None:
        tree["policy.model"] = "/".join(Path(recipe.policy.model).parts[-4:])
    return tree


def _seedless(recipe: Recipe, start: Path | None) -> dict[str, str]:
    """The same without what is another for every seed."""
    tree = _comparable(recipe, start)
    tree["policy.model"] = tree["policy.model"].replace(f"/seed-{recipe.seed}/", "/")
    return {key: value for key, value in tree.items() if key not in ("name", "seed")}


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    return ", ".join(sorted(k for k in {*one, *other} if one.get(k) != other.get(k)))


def _changed(recipe: Recipe, name: str, seed: int) -> Recipe:
    policy = recipe.policy.model_copy(update={"threads": 1})
    cold_start = recipe.cold_start.model_copy(update={"threads": 0})
    changes = {"name": name, "seed": seed, "policy": policy, "cold_start": cold_start}
    return recipe.model_copy(update=changes)


def folder_name(text: str) -> str:
    """A name for a folder, readable, and different for different texts."""
    plain = re.sub(r"[^A-Za-z0-9._=+-]+", "-", text).strip("-.")
    if plain == text and len(plain) <= _LONGEST_NAME:
        return plain
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{plain[:_LONGEST_NAME]}-{digest}" if text else ""


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _section(override: str) -> str:
    return _key(override).split(".")[0]


def split_values(text: str) -> list[str]:
    """`a,[b,c],"d,e"` into three values."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            values.append("")
            continue
        values[-1] += character
    return [value.strip() for value in values]
