"""`untwine diagnose labels`: what each label source says, against branching truth.

Truth is three-valued: flawed, good, or neutral, which is also said of steps with too few branches.
With w the number of steps that a judged step stands for, and sums over judged steps:

    coverage            sum of w over labelled steps / sum of w over all
    precision(verdict)  sum of w where label and truth say `verdict` / where the label does
    recall(verdict)     the same sum / where the truth does
    accuracy            sum of w where they agree / where the step is labelled and not neutral

`branch` is asked anew like the others: each judged step is branched from once more, with the pairs
that `gcd.branch` allows in training and other random numbers.

A label on a neutral step counts against precision; `decided` precision leaves neutral steps out.
Intervals are Wilson's at the effective sample size (sum w)^2 / sum w^2 (Kish, 1965).

    worth               weighted mean A* of the steps called flawed, of those called good, and good
                        minus flawed

It is of all steps, neutral ones included, so it is clear long before single steps are; intervals
are bootstraps over groups (calibration.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untwine.config import Recipe
from untwine.diagnose.branching import Verdict3
from untwine.diagnose.calibration import SIGNS, Judged, means_by_verdict
from untwine.diagnose.output import results_folder, to_json, write_text
from untwine.diagnose.population import recorded_steps
from untwine.diagnose.recorded import chosen_files, load_recorded_policy, read_recorded
from untwine.diagnose.truth import TruthFinder, questions
from untwine.diagnose.truth_file import (
    Truth,
    TruthRow,
    branch_label,
    files_with_truth,
    read_truth,
    truth_path,
)
from untwine.envs.pool import EnvPool
from untwine.evaluate.statistics import wilson_interval
from untwine.gcd.sources import Bench, Labeller, check_sources
from untwine.gcd.sources.branch import branch_costs, branch_settings
from untwine.progress import Display
from untwine.records import Group, Verdict
from untwine.workshop import make_collector, open_pool

_FREE = ("rule", "group")
_OTHER_NUMBERS = 500_009
"""Added to the seed of the truth for branches that are drawn anew."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One judged step.

    truth, advantage  what branching found: the verdict, and A*
    weight            how many steps it stands for
    said              by a source; None: nothing
    group             (iteration, group)
    """

    truth: Verdict3
    advantage: float
    weight: float
    said: Verdict | None
    group: tuple[int, int] = (0, 0)


def find_label_quality(
    run: Path,
    recipe: Recipe,
    display: Display,
    *,
    iteration: int | None = None,
    sources: Sequence[str] = (),
) -> dict[str, Any]:
    """Quality of label sources on the judged steps of a run; also written to diagnose/labels.json.

    iteration  by default all that have a truth file
    sources    asked anew; by default `rule` and `group`. Other sources whose labels are on record
               are measured as they are
    """
    names = list(dict.fromkeys(sources or _FREE))
    check_sources(names)
    files = chosen_files(run, iteration)
    iterations = files_with_truth(run, files, "train with branch in gcd.labels")
    costs: dict[str, float] = defaultdict(float)
    truths = {k: read_truth(truth_path(run, k), file) for k, file in iterations.items()}
    judged = {(row.episode, row.step) for truth in truths.values() for row in truth.rows}
    with open_pool(recipe.env, list_commands=recipe.lists_commands) as pool:
        bench = Bench(recipe, pool, None, run, display, wanted=judged)
        asking = [name for name in names if name != "branch"]
        labeller = Labeller(asking, bench, recipe.gcd.min_confidence)  # as the run used them
        said: dict[int, dict[str, dict[tuple[str, int], Verdict]]] = {}
        for k, file in iterations.items():
            groups = read_recorded(file, recipe)
            asked, counts = labeller.label(groups, k)
            anew = _labels(asked)
            said[k] = _labels(groups) | {name: anew.get(name, {}) for name in asking}
            said[k].pop("branch", None)  # on record it is the truth itself
            spent = [counts]
            if "branch" in names:
                said[k]["branch"], counts = branch_anew(
                    run, recipe, k, groups, truths[k], pool, display
                )
                spent.append(counts)
            for counts in spent:
                for name, value in counts.items():
                    costs[name] += value
    known = {name for labels in said.values() for name in labels}
    compared = {
        name: [x for k in said for x in compare(truths[k].rows, said[k].get(name, {}), k)]
        for name in sorted(known, key=lambda name: (name == "branch", name))
    }
    numbers = {
        "format": "untwine-labels-1",
        "iterations": sorted(iterations),
        "steps": sum(len(truth.rows) for truth in truths.values()),
        "asked": names,
        "sources": {name: quality(steps) for name, steps in compared.items()},
        "cost": dict(costs),
    }
    write_text(results_folder(run) / "labels.json", to_json(numbers))
    return numbers


def branch_anew(
    run: Path,
    recipe: Recipe,
    iteration: int,
    groups: Sequence[Group],
    truth: Truth,
    pool: EnvPool,
    display: Display,
) -> tuple[dict[tuple[str, int], Verdict], dict[str, float]]:
    """What `branch` labels of `gcd.branch.branches` pairs say of the steps that `truth` judges, by
    (episode, step), and what they cost. Drawn independently of the truth, from the same policy.

    CheckpointError when that policy is no longer there.
    """
    at = {(row.episode, row.step): row.weight for row in truth.rows}
    policy = load_recorded_policy(run, recipe, iteration, truth.header.get("checkpoint", "")).policy
    population = recorded_steps(groups, pool.info)
    drawn = [(s, at[key]) for s in population if (key := (s.episode.id, s.t)) in at]
    settings = branch_settings(recipe, truth.header["settings"]["seed"] + _OTHER_NUMBERS)
    finder = TruthFinder(recipe, make_collector(policy, pool, recipe), settings, display)
    rows = finder.rows(drawn, questions(population, drawn, pooled=True))
    labels = {(row.episode, row.step): branch_label(row) for row in rows}
    least = recipe.gcd.min_confidence
    sure = {key: x.verdict for key, x in labels.items() if x is not None and x.confidence >= least}
    return sure, branch_costs(rows, finder)


def compare(
    rows: Sequence[TruthRow], labels: Mapping[tuple[str, int], Verdict], iteration: int
) -> list[Compared]:
    """The judged steps of an iteration beside the labels of one source, by (episode, step)."""
    return [
        Compared(
            row.label,
            row.advantage,
            row.weight,
            labels.get((row.episode, row.step)),
            (iteration, row.group),
        )
        for row in rows
    ]


def quality(steps: Sequence[Compared]) -> dict[str, Any]:
    """Coverage, precision, recall, accuracy and worth of one source, and the table of counts they
    are from. A share or a mean of nothing is None."""
    labelled = [s for s in steps if s.said is not None]
    clear = [s for s in labelled if s.truth != "neutral"]
    counts = {
        truth: {
            said: sum(s.truth == truth and (s.said or "none") == said for s in steps)
            for said in ("good", "flawed", "none")
        }
        for truth in ("good", "flawed", "neutral")
    }
    return {
        "coverage": share(steps, [s.said is not None for s in steps]),
        "accuracy": share(clear, [s.said == s.truth for s in clear]),
        **{verdict: _class(steps, verdict) for verdict in ("good", "flawed")},
        "worth": _worth(steps),
        "counts": counts,
    }


def _worth(steps: Sequence[Compared]) -> dict[str, Any]:
    return means_by_verdict(
        Judged.of(
            [s.advantage for s in steps],
            [SIGNS[s.said or "neutral"] for s in steps],
            weights=[s.weight for s in steps],
            groups=[s.group for s in steps],
        )
    )


def share(steps: Sequence[Compared], hits: Sequence[bool]) -> dict[str, Any]:
    """Weighted share of the steps that are hits, with its interval and the number of steps."""
    total = math.fsum(s.weight for s in steps)
    if not total:
        return {"value": None, "interval": None, "steps": 0}
    value = math.fsum(s.weight for s, hit in zip(steps, hits, strict=True) if hit) / total
    size = total**2 / math.fsum(s.weight**2 for s in steps)
    n = max(1, round(size))
    return {
        "value": value,
        "interval": list(wilson_interval(min(value, 1.0) * n, n)),
        "steps": len(steps),
    }


def _class(steps: Sequence[Compared], verdict: str) -> dict[str, Any]:
    said = [s for s in steps if s.said == verdict]
    true = [s for s in steps if s.truth == verdict]
    decided = [s for s in said if s.truth != "neutral"]
    return {
        "precision": share(said, [s.truth == verdict for s in said]),
        "precision_decided": share(decided, [s.truth == verdict for s in decided]),
        "recall": share(true, [s.said == verdict for s in true]),
    }


def _labels(groups: Sequence[Group]) -> dict[str, dict[tuple[str, int], Verdict]]:
    """Verdicts by source, then by (episode, step)."""
    found: dict[str, dict[tuple[str, int], Verdict]] = defaultdict(dict)
    for group in groups:
        for episode in group.episodes:
            for step in episode.steps:
                for label in step.labels:
                    found[label.source][episode.id, step.index] = label.verdict
    return found
