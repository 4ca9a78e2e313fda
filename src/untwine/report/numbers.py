"""The numbers of a report as plain values, shared by the page and by `--json`.

Everything is computed from the rows on disk. A key that a run did not write stays `None` or is
left out; nothing is guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from untwine.cost import cost_text
from untwine.evaluate.statistics import wilson_interval
from untwine.report.first_look import compare_runs, first_look
from untwine.report.microscope import read_microscope
from untwine.report.run_data import Row, RunData, load_run, number

PROBE_KINDS = ["good", "flawed", "unsampled"]
RL_KEYS = [
    "outcome_mean",
    "success_rate",
    "episode_length",
    "flawed_rate",
    "invalid_rate",
    "advantage_good",
    "advantage_flawed",
    "policy_loss",
    "kl",
    "entropy",
    "clip_fraction",
    "grad_norm",
    "ratio_max",
    "groups_kept",
    "gcd_loss",
    "verdict_accuracy",
    "gcd_tokens",
    "policy_tokens",
    "gcd_weight",
    "gcd_ratio",
    "episodes_lost",
    "env_steps",
    "seconds_rollout",
    "seconds_update",
    "seconds_gcd",
    "seconds_diagnose",
    "diagnose_share",
    *(f"probe_{kind}" for kind in PROBE_KINDS),
    *(f"probe_{x}_{kind}" for x in ("logprob", "rank", "argmax") for kind in PROBE_KINDS),
    "calibration_good",
    "calibration_flawed",
    "calibration_difference",
    "miscalibration",
    "sign_agreement",
    "reinforced",
    "reinforced_null",
    "reinforced_punished",
    "reinforced_punished_null",
    "push_self_good",
    "push_coupled_good",
    "push_self_flawed",
    "push_coupled_flawed",
    "cosine_good_good",
    "cosine_good_flawed",
    "cosine_flawed_flawed",
]
COLD_START_KEYS = ["loss", "verdict_accuracy", "seconds"]
TOTAL_KEYS = [
    "env_steps",
    "policy_tokens",
    "gcd_tokens",
    "label_tokens",
    "label_env_steps",
    "episodes_lost",
    "seconds_rollout",
    "seconds_labels",
    "seconds_update",
    "seconds_gcd",
    "seconds_diagnose",
]
PHASES = ["initial", "start", "base", "cold_start", "rl", "final"]
MOST_OTHER_KEYS = 80
WINDOW = 10
"""Iterations at each end that a trend is averaged over, at most."""


def report_numbers(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """The numbers behind the report of these run directories, ready for `json.dumps`."""
    return numbers_of([load_run(path) for path in run_dirs])


def numbers_of(runs: Sequence[RunData]) -> dict[str, Any]:
    """`report_numbers` for runs that are already loaded."""
    labels = unique_labels(runs)
    numbers = [_run_numbers(run, label) for run, label in zip(runs, labels, strict=True)]
    return {
        "runs": numbers,
        "sets": sorted({result["set"] for run in numbers for result in run["results"]}),
        "tasks": _task_tables(numbers),
        "differences": recipe_differences(runs),
        "comparison": compare_runs(numbers),
    }


def unique_labels(runs: Sequence[RunData]) -> list[str]:
    """Run names; where two runs share one, the folder name or a number is added."""
    names = [run.name for run in runs]
    labels: list[str] = []
    for run in runs:
        label = run.name
        if names.count(label) > 1 and run.path.name != label:
            label = f"{run.name} ({run.path.name})"
        base, count = label, 2
        while label in labels:
            label, count = f"{base} #{count}", count + 1
        labels.append(label)
    return labels


def _run_numbers(run: RunData, label: str) -> dict[str, Any]:
    info = run.info
    numbers: dict[str, Any] = {
        "label": label,
        "name": run.name,
        "folder": run.path.resolve().name,
        "status": _text(info.get("status")),
        "command": _command(info.get("command")),
        "environment": _environment(run),
        "splits": _text(info.get("splits")),
        "seed": _text(info.get("seed")),
        "started": _text(info.get("started")),
        "versions": {
            key: _text(info.get(key))
            for key in ("untwine", "torch", "python", "platform")
            if info.get(key) is not None
        },
        "model_parameters": number(info.get("model_parameters")),
        "cold_start_steps": len(run.cold_start),
        "iterations": len(run.rl),
        "planned_iterations": _planned_iterations(run.recipe),
        "totals": {key: _total(run.rl, key) for key in TOTAL_KEYS},
        "trends": {
            key: trend for key, column in rl_columns(run.rl).items() if (trend := _trend(column))
        },
        "flawed_kinds": _kind_trends(run.rl),
        "results": _results(run.evaluate),
        "evaluated": _evaluated(run),
        "outcome_by_task": _training_tasks(run.rl),
        "microscope": read_microscope(run, _credit_method(run.recipe)),
        "problems": list(run.problems),
    }
    numbers["totals"]["seconds_cold_start"] = _total(run.cold_start, "seconds")
    numbers["totals"]["diagnose_share"] = _diagnose_share(numbers["totals"])
    numbers["first_look"] = first_look(numbers)
    return numbers


def rl_columns(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """The numbers of the RL iterations by key: `RL_KEYS`, then whatever else the run recorded.

    An object of numbers gives a column `key/name` for each."""
    columns: dict[str, list[float | None]] = {
        key: [number(row.get(key)) for row in rows] for key in RL_KEYS
    }
    for index, row in enumerate(rows):
        for key, value in _other_numbers(row):
            if key not in columns and len(columns) >= len(RL_KEYS) + MOST_OTHER_KEYS:
                continue
            columns.setdefault(key, [None] * len(rows))[index] = value
    return columns


def _other_numbers(row: Row) -> Iterable[tuple[str, float]]:
    for key, value in row.items():
        if key in _KNOWN_KEYS:
            continue
        if isinstance(value, Mapping):
            inside = [(f"{key}/{name}", number(cell)) for name, cell in value.items()]
        else:
            inside = [(str(key), number(value))]
        yield from ((name, found) for name, found in inside if found is not None)


_KNOWN_KEYS = {*RL_KEYS, "stage", "step", "time", "flawed_kinds", "outcome_by_task"}


def _credit_method(recipe: str) -> str:
    credit = _tree(recipe).get("credit")
    return str(credit.get("name", "grpo")) if isinstance(credit, dict) else "grpo"


def _environment(run: RunData) -> str | None:
    """What was acted in; older runs name the family only, in the recipe."""
    env = _tree(run.recipe).get("env")
    return _text(
        run.info.get("environment") or (env.get("name") if isinstance(env, dict) else None)
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _command(value: object) -> str | None:
    if isinstance(value, list):
        return " ".join(str(word) for word in value)
    return _text(value)


def _planned_iterations(recipe: str) -> int | None:
    rl = _tree(recipe).get("rl")
    planned = number(rl.get("iterations")) if isinstance(rl, dict) else None
    return None if planned is None else int(planned)


def _tree(recipe: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _total(rows: Iterable[Row], key: str) -> float | None:
    values = [value for row in rows if (value := number(row.get(key))) is not None]
    return sum(values) if values else None


def _diagnose_share(totals: Mapping[str, float | None]) -> float | None:
    """Share of the time of all iterations that went into diagnosis; None where there was none."""
    spent = totals["seconds_diagnose"]
    if not spent:
        return None
    others = ("seconds_rollout", "seconds_labels", "seconds_update")
    rest = sum(totals[key] or 0.0 for key in others)
    return spent / (spent + rest)


def _trend(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean over the first and the last few recorded values, which never overlap."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    width = max(1, min(WINDOW, len(known) // 2))
    first, last = known[:width], known[-width:]
    return {"first": sum(first) / width, "last": sum(last) / width, "window": width}


def kinds_of(rows: Iterable[Row]) -> list[str]:
    """Kinds of flawed steps, the most common first."""
    shares: dict[str, float] = {}
    for row in rows:
        kinds = row.get("flawed_kinds")
        if isinstance(kinds, Mapping):
            for kind, share in kinds.items():
                shares[str(kind)] = shares.get(str(kind), 0.0) + (number(share) or 0.0)
    return sorted(shares, key=lambda kind: (-shares[kind], kind))


def kind_values(rows: Iterable[Row], kind: str) -> list[float | None]:
    """Share of one kind per row: 0 where other kinds are named, None where none are recorded."""
    values: list[float | None] = []
    for row in rows:
        kinds = row.get("flawed_kinds")
        values.append(number(kinds.get(kind, 0.0)) if isinstance(kinds, Mapping) else None)
    return values


def _kind_trends(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    trends = {kind: _trend(kind_values(rows, kind)) for kind in kinds_of(rows)}
    return {kind: trend for kind, trend in trends.items() if trend}


def _results(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The last evaluation of every (phase, set), in the order of the phases."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        result = plain_evaluation(row)
        last[(result["phase"], result["set"])] = result
    names = list(dict.fromkeys(phase for phase, _ in last))
    order = sorted(names, key=lambda p: PHASES.index(p) if p in PHASES else len(PHASES))
    return sorted(last.values(), key=lambda r: (order.index(r["phase"]), r["set"]))


def _evaluated(run: RunData) -> list[dict[str, Any]]:
    """What `untwine evaluate` found for the policy the run ends with: the last row of every set,
    way of playing and number of episodes."""
    last: dict[tuple[object, ...], dict[str, Any]] = {}
    for row in run.evaluated:
        changes = row.get("overrides")
        result = plain_evaluation(row) | {
            "phase": "rl" if run.rl else "cold_start",
            "decoding": str(row.get("decoding", "sampled")),
            "overrides": [f"{key}={value}" for key, value in changes.items()]
            if isinstance(changes, Mapping)
            else [],
            **{
                key: number(row.get(key))
                for key in ("flawed_rate", "invalid_rate", "repeated_rate")
            },
        }
        key = result["set"], result["decoding"], *result["overrides"], result["episodes"]
        last.pop(key, None)
        last[key] = result
    return sorted(last.values(), key=lambda r: (r["set"], r["decoding"] != "sampled"))


def plain_evaluation(row: Row) -> dict[str, Any]:
    """One evaluation row; a missing interval of the success rate is Wilson's."""
    episodes, success = number(row.get("episodes")), number(row.get("success_rate"))
    return {
        "set": str(row.get("set", "all")),
        "phase": str(row.get("phase", "evaluate")),
        "step": number(row.get("step")),
        "episodes": None if episodes is None else int(episodes),
        "outcome_mean": number(row.get("outcome_mean")),
        "outcome_interval": _interval(row.get("outcome_interval")),
        "success_rate": success,
        "success_interval": _interval(row.get("success_interval")) or _wilson(success, episodes),
        "cost": cost_text(row),
        "by_task": _by_task(row.get("by_task"), row.get("per_instance")),
    }


def _interval(value: object) -> list[float] | None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else [low, high]


def _wilson(rate: float | None, episodes: float | None) -> list[float] | None:
    if rate is None or not episodes or episodes < 0 or not 0 <= rate <= 1:
        return None
    return list(wilson_interval(rate * episodes, int(episodes)))


def _by_task(value: object, per_instance: object) -> dict[str, dict[str, Any]]:
    """One task a row. Intervals take the instances as the sample, as those of whole sets do;
    episodes where a row does not tell instances apart."""
    tasks: dict[str, dict[str, Any]] = {}
    names = per_instance if isinstance(per_instance, Mapping) else ()
    instances = Counter(str(name).rpartition("/")[0] for name in names)
    for task, cell in value.items() if isinstance(value, Mapping) else ():
        if isinstance(cell, Mapping):
            episodes, rate = number(cell.get("episodes")), number(cell.get("success_rate"))
            sample = instances.get(str(task), episodes)
            tasks[str(task)] = {
                "episodes": None if episodes is None else int(episodes),
                "instances": None if sample is None else int(sample),
                "outcome_mean": number(cell.get("outcome_mean")),
                "success_rate": rate,
                "success_interval": _wilson(rate, sample),
            }
    return tasks


def _training_tasks(rows: Sequence[Row]) -> dict[str, float]:
    """Mean training outcome per task over the last iterations."""
    seen: dict[str, list[float]] = {}
    for row in rows[-WINDOW:]:
        tasks = row.get("outcome_by_task")
        for task, value in tasks.items() if isinstance(tasks, Mapping) else ():
            if (known := number(value)) is not None:
                seen.setdefault(str(task), []).append(known)
    return {task: sum(values) / len(values) for task, values in sorted(seen.items())}


def _task_tables(runs: Sequence[Row]) -> list[dict[str, Any]]:
    """Per set: the tasks with one cell per run, from each run's last phase that has that set."""
    tables = []
    for name in sorted({result["set"] for run in runs for result in run["results"]}):
        columns: list[Mapping[str, Any]] = []
        phases: list[str | None] = []
        for run in runs:
            found = [r for r in run["results"] if r["set"] == name and r["by_task"]]
            columns.append(found[-1]["by_task"] if found else {})
            phases.append(found[-1]["phase"] if found else None)
        tables.append({"set": name, "phases": phases, "rows": _task_rows(columns)})
    if not any(table["rows"] for table in tables):
        columns = [
            {task: {"outcome_mean": mean} for task, mean in run["outcome_by_task"].items()}
            for run in runs
        ]
        tables = [{"set": None, "phases": ["rl"] * len(runs), "rows": _task_rows(columns)}]
    return [table for table in tables if table["rows"]]


def _task_rows(columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    def height(task: str) -> float:
        cells = [column[task] for column in columns if task in column]
        values = [c.get("success_rate") or c.get("outcome_mean") or 0.0 for c in cells]
        return sum(values) / len(values)

    tasks = dict.fromkeys(task for column in columns for task in column)
    return [
        {"task": task, "cells": [column.get(task) for column in columns]}
        for task in sorted(tasks, key=lambda task: (-height(task), task))
    ]


def recipe_differences(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Recipe keys whose values are not the same in all runs."""
    if len(runs) < 2:
        return []
    flat = [dict(_flatten(_tree(run.recipe))) for run in runs]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    rows = [{"key": key, "values": [tree.get(key, "–") for tree in flat]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
