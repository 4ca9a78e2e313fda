"""The numbers of a comparison as plain values, shared by table, figure, page and `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from untwine.compare.runs import Evaluation, Found, Run, common_evaluations, find_runs, paired
from untwine.errors import ConfigError, nearest
from untwine.evaluate.aggregate import (
    Array,
    Strata,
    bootstrap,
    paired_difference,
    performance_profile,
    probability_of_improvement,
)
from untwine.evaluate.statistics import iqm
from untwine.report.run_data import number

MEASURES: dict[str, tuple[str, str]] = {
    "success": ("success_rate", "success rate"),
    "score": ("outcome_mean", "mean outcome"),
}
"""Key in the evaluation rows, and what it is called."""

STEP_MEASURES = ("episode_length", "invalid_rate", "repeated_rate", "flawed_rate")
UPDATE_TOKENS = ("policy_tokens", "gcd_tokens")
SECONDS = ("seconds_rollout", "seconds_labels", "seconds_update")
_OVERHEAD_TOKENS = ("gcd_tokens", "gcd_sampled_tokens", "label_tokens")
_OVERHEAD_SECONDS = ("seconds_gcd", "seconds_labels")
_STRATA: dict[str, Strata] = {"interval": "runs", "interval_by_task": "tasks"}
"""What the intervals are called, and what stays together in them (see aggregate.py)."""
THRESHOLDS_T: Array = np.linspace(0.0, 1.0, 51)


def compare_runs(
    paths: Sequence[Path],
    *,
    measure: str = "success",
    sets: Sequence[str] = (),
    baseline: str = "",
) -> dict[str, Any]:
    """Compare the arms found in `paths`; JSON values.

    baseline  the arm that the others are compared with; by default the first one

    arms     label, seeds, runs (folders); means of a run over its iterations: tokens (of the
             updates), seconds, overhead_tokens and overhead_seconds (verdicts and labels)
    sets     one entry per evaluation set: its identity; for each arm `arms` with iqm and mean,
             and the performance profile, each with intervals over whole runs and, as in the paper,
             by task (see aggregate.py), and means of length and rates; and `against` the baseline:
             probability of improvement, with both intervals, and paired difference
    notes    a sentence for everything that was left out or lacks something
    """
    if measure not in MEASURES:
        raise ConfigError(f"unknown measure {measure!r}; it is {' or '.join(MEASURES)}")
    found = find_runs(paths)
    evaluations, left_out = common_evaluations(found, sets)
    arms = list(found.arms)
    if baseline and baseline not in arms:
        raise ConfigError(
            f"there is no arm {baseline!r}; the arms are {', '.join(arms)}."
            f"{nearest(baseline, arms)}"
        )
    chosen = baseline or arms[0]
    return {
        "measure": measure,
        "measure_name": MEASURES[measure][1],
        "baseline": chosen,
        "arms": [_arm(label, runs) for label, runs in found.arms.items()],
        "sets": [_set(evaluation, found, measure, chosen) for evaluation in evaluations],
        "notes": [*found.notes, *left_out],
    }


def _arm(label: str, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "label": label,
        "seeds": [run.seed for run in runs],
        "runs": [str(run.path) for run in runs],
        "tokens": _mean(run.total(*UPDATE_TOKENS) for run in runs),
        "seconds": _mean(run.total(*SECONDS) for run in runs),
        "overhead_tokens": _mean(run.total(*_OVERHEAD_TOKENS) for run in runs),
        "overhead_seconds": _mean(run.total(*_OVERHEAD_SECONDS) for run in runs),
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _set(evaluation: Evaluation, found: Found, measure: str, baseline: str) -> dict[str, Any]:
    scores = {arm: _scores(evaluation, runs, measure) for arm, runs in found.arms.items()}
    identity = evaluation.identity
    return {
        "set": evaluation.set,
        "decoding": evaluation.decoding,
        "title": evaluation.title,
        "identity": {k: v for k, v in identity.items() if k != "seed"},
        "tasks": sorted(next(iter(evaluation.rows.values()))["by_task"]),
        "thresholds": THRESHOLDS_T.tolist(),
        "arms": [_arm_numbers(evaluation, arm, found, own) for arm, own in scores.items()],
        "against": [
            _against(evaluation, arm, baseline, found, scores, measure)
            for arm in scores
            if arm != baseline
        ],
    }


def _scores(evaluation: Evaluation, runs: Sequence[Run], measure: str) -> Array:
    """scores_NM of an arm: runs by tasks."""
    key = MEASURES[measure][0]
    tables = [evaluation.rows[run.path]["by_task"] for run in runs]
    return np.array([[table[task][key] for task in sorted(table)] for table in tables])


def _arm_numbers(
    evaluation: Evaluation, arm: str, found: Found, scores_NM: Array
) -> dict[str, Any]:
    rows = [evaluation.rows[run.path] for run in found.arms[arm]]
    several = len(scores_NM) > 1
    profile: dict[str, Any] = {
        "values": performance_profile(scores_NM, THRESHOLDS_T).tolist(),
        **dict.fromkeys(_STRATA),
    }
    for suffix, strata in _STRATA.items() if several else ():
        low, high = bootstrap(
            lambda own: performance_profile(own, THRESHOLDS_T),
            scores_NM,
            strata=strata,
            resamples=1000,
        )
        profile[suffix] = [low.tolist(), high.tolist()]
    numbers: dict[str, Any] = {"label": arm, "runs": len(rows), "scores": scores_NM.tolist()}
    for name, statistic in (("iqm", iqm), ("mean", np.mean)):
        numbers[name] = float(statistic(scores_NM))
        for suffix, strata in _STRATA.items():
            ends = bootstrap(statistic, scores_NM, strata=strata) if several else None
            numbers[f"{name}_{suffix}"] = [float(end) for end in ends] if ends else None
    steps = {key: [number(row.get(key)) for row in rows] for key in STEP_MEASURES}
    known = {key: [v for v in values if v is not None] for key, values in steps.items()}
    return {
        **numbers,
        **{key: _mean(values) if values else None for key, values in known.items()},
        "profile": profile,
    }


def _against(
    evaluation: Evaluation,
    arm: str,
    baseline: str,
    found: Found,
    scores: dict[str, Array],
    measure: str,
) -> dict[str, Any]:
    """One arm against the baseline: all runs against all, and pair by pair."""
    ours, theirs = scores[arm], scores[baseline]
    several = min(len(ours), len(theirs)) > 1
    intervals: dict[str, list[float] | None] = {}
    for suffix, strata in _STRATA.items():
        statistic = probability_of_improvement
        ends = bootstrap(statistic, ours, theirs, strata=strata) if several else None
        intervals[f"probability_{suffix}"] = [float(end) for end in ends] if ends else None
    return {
        "label": arm,
        "probability": probability_of_improvement(ours, theirs),
        **intervals,
        "paired": _paired(evaluation, found.arms[arm], found.arms[baseline], measure),
    }


def _paired(
    evaluation: Evaluation, ours: Sequence[Run], theirs: Sequence[Run], measure: str
) -> dict[str, Any] | None:
    """Differences of the whole set, over runs that share seed and cold start; None without any."""
    key = MEASURES[measure][0]
    pairs = paired(ours, theirs)
    if not pairs:
        return None
    rows = evaluation.rows
    x_P, y_P = (np.array([rows[pair[side].path][key] for pair in pairs]) for side in (0, 1))
    found = paired_difference(x_P, y_P)
    return {
        "pairs": found.pairs,
        "seeds": [run.seed for run, _ in pairs],
        "differences": (x_P - y_P).tolist(),
        "mean": found.mean,
        "interval": list(found.interval) if found.interval else None,
        "deviation": found.deviation,
        "p_value": found.p_value,
    }
