"""`untwine diagnose calibration`: every credit method on the recorded groups of a run, against the
truth files, or against labels where there is no truth."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from untwine.config import PromptConfig, Recipe
from untwine.credit import (
    AS_TRAINED,
    check_credit,
    credit_method,
    credit_names,
    trained_credit,
)
from untwine.diagnose.calibration import SIGNS, Floats, Judged, calibrate, lemma_advantage
from untwine.diagnose.output import results_folder, to_json, write_text
from untwine.diagnose.plan_kinds import PlanKinds, plan_kinds
from untwine.diagnose.population import UNKNOWN_KIND, RecordedStep, in_order, recorded_steps
from untwine.diagnose.recorded import (
    chosen_files,
    is_foreign,
    read_recorded,
    recorded_info,
)
from untwine.diagnose.truth_file import TruthRow, files_with_truth, read_truth, truth_path
from untwine.envs.protocol import EnvInfo
from untwine.errors import ConfigError, UntwineError, nearest
from untwine.gcd.labels import is_plain, label_group, label_sources
from untwine.gcd.sources import source_names
from untwine.progress import Display
from untwine.records import Episode, Group, Step, Verdict

_EPS = 1e-6
Credit = Callable[[Group], Group]


@dataclass(frozen=True, slots=True)
class _Item:
    """A judged step: where it is, what is known of it.

    iteration         number of its file
    row               what branching found; None where only a label is known
    frequency         share of the group's visits to its state that took its action
    deviation         standard deviation of the group's returns
    """

    iteration: int
    step: RecordedStep
    verdict: str
    weight: float
    row: TruthRow | None
    frequency: float
    deviation: float

    @property
    def at(self) -> tuple[int, str, int]:
        return self.iteration, self.step.episode.id, self.step.t


def calibrate_run(
    run: Path,
    recipe: Recipe,
    display: Display,
    *,
    iteration: int | None = None,
    labels: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Measures of every method, in all and by kind and position, saved as
    RUN/diagnose/calibration.json; keys are explained in docs/diagnose/calibration.md.

    Where the environment can plan anew, it is asked about steps of no other kind.

    iteration  by default all that have a truth file (with `labels`: all)
    labels     whose labels to take instead of the truth
    """
    info = recorded_info(run, recipe)
    files = _files(run, iteration, labels)
    groups = {k: read_recorded(file, recipe) for k, file in files.items()}
    items: list[_Item] = []
    chance = 0.0
    for k, file in files.items():
        if labels:
            items += _labelled(k, groups[k], info, labels)
        else:
            truth = read_truth(truth_path(run, k), file)
            items += _judged(k, groups[k], info, truth.rows)
            chance += float(truth.header.get("flawed_by_chance", 0.0))
    if not items:
        raise ConfigError(
            _no_label(run, labels)
            if labels
            else f"the truth files of {run} hold no step; run `untwine diagnose truth` again"
        )
    items, plans = _with_plan_kinds(items, recipe, info, display)
    numbers = {
        "format": "untwine-calibration-1",
        "source": labels or "truth",
        "note": _note(labels),
        "iterations": sorted(files),
        "steps": len(items),
        "flawed": sum(item.verdict == "flawed" for item in items),
        "good": sum(item.verdict == "good" for item in items),
        "flawed_by_chance": None if labels else chance,
        "plans": {
            "steps": sum(item.at in plans.kinds for item in items),
            "env_steps": plans.env_steps,
            "mismatches": plans.mismatches,
            "abstained": plans.abstained or None,
        },
        "methods": _methods(recipe, groups, items, seed, foreign=is_foreign(run)),
    }
    write_text(results_folder(run) / "calibration.json", to_json(numbers))
    return numbers


def _with_plan_kinds(
    items: Sequence[_Item], recipe: Recipe, info: EnvInfo, display: Display
) -> tuple[list[_Item], PlanKinds]:
    """The same items; those of no kind have the one that plans give them, where they do."""
    episodes: dict[int, dict[str, Episode]] = {}
    for item in items:
        if item.step.kind == UNKNOWN_KIND:
            own = episodes.setdefault(item.iteration, {})
            own[item.step.episode.id] = item.step.episode
    wanted = {k: list(own.values()) for k, own in episodes.items()}
    plans = plan_kinds(recipe, info, wanted, display) if wanted else PlanKinds()

    def renamed(item: _Item) -> _Item:
        kind = plans.kinds.get(item.at)
        if kind is None or item.step.kind != UNKNOWN_KIND:
            return item
        return dataclasses.replace(item, step=dataclasses.replace(item.step, kind=kind))

    return [renamed(item) for item in items], plans


def _methods(
    recipe: Recipe,
    groups: Mapping[int, Sequence[Group]],
    items: Sequence[_Item],
    seed: int,
    *,
    foreign: bool,
) -> dict[str, Any]:
    """Every method by name, the recipe's own among them; where its advantages are changed by labels
    afterwards, also what training made of them. Of another program's episodes also the advantages
    it recorded."""
    found = {"recorded": _measures(_advantages(groups), {}, items, seed)} if foreign else {}
    for name in dict.fromkeys([*credit_names(), recipe.credit.name]):
        options = recipe.credit.options if name == recipe.credit.name else {}
        make = partial(_bare, name, options, recipe.prompt)
        found[name] = _method(make, options, groups, items, seed)
    if recipe.credit.penalty or recipe.credit.veto:
        changed = {key: getattr(recipe.credit, key) for key in ("penalty", "veto")}
        make = partial(trained_credit, recipe.credit, recipe.gcd.taught)
        found[AS_TRAINED] = _method(make, changed, groups, items, seed)
    return found


def _files(run: Path, iteration: int | None, labels: str) -> dict[int, Path]:
    files = chosen_files(run, iteration)
    return files if labels else files_with_truth(run, files, "take labels with --labels group")


def _note(labels: str) -> str:
    if not labels:
        return "good and flawed steps are those that branching found"
    if labels == "group":
        return (
            "no truth: good and flawed are `group` labels, made from the same returns that the "
            "methods see, so they agree more than they should"
        )
    return f"no truth: good and flawed are `{labels}` labels; there is no A* to compare with"


def _judged(
    iteration: int, groups: Sequence[Group], info: EnvInfo, rows: Sequence[TruthRow]
) -> list[_Item]:
    """The steps of a truth file."""
    context = _Context(iteration, groups, info)
    steps = {(step.episode.id, step.t): step for step in context.steps}
    return [context.item(steps[row.episode, row.step], row.label, row.weight, row) for row in rows]


def _no_label(run: Path, source: str) -> str:
    if is_plain(source):
        return (
            f"source {source!r} is sure of no step of {run}; take another source, or more episodes"
        )
    known = ", ".join(label_sources())
    return (
        f"no step of {run} has a label of source {source!r} on record, and those that can be "
        f"computed here are {known}.{nearest(source, source_names())}"
    )


def _labelled(iteration: int, groups: Sequence[Group], info: EnvInfo, source: str) -> list[_Item]:
    """The steps that have a label of `source`, computed here or on record. One's own is asked anew
    only where nothing is on record: other programs may have sources of such names."""
    known = source in label_sources()
    if known or (is_plain(source) and not _on_record(groups, source)):
        groups = [label_group(group, [source], info) for group in groups]
    context = _Context(iteration, groups, info)
    return [
        context.item(step, verdict, 1.0, None)
        for step in context.steps
        if (verdict := _verdict(step.step, source))
    ]


def _on_record(groups: Sequence[Group], source: str) -> bool:
    steps = (step for group in groups for episode in group.episodes for step in episode.steps)
    return any(label.source == source for step in steps for label in step.labels)


def _verdict(step: Step, source: str) -> Verdict | None:
    verdicts = {label.verdict for label in step.labels if label.source == source}
    return verdicts.pop() if len(verdicts) == 1 else None


class _Context:
    """What the other steps of an episode file say about one of them."""

    def __init__(self, iteration: int, groups: Sequence[Group], info: EnvInfo) -> None:
        self.steps = recorded_steps(groups, info)
        self._iteration = iteration
        self._deviations = [_deviation(group.returns_G) for group in groups]
        self._taken = Counter(step.pair for step in self.steps)
        self._visits = Counter(step.pair[:2] for step in self.steps)

    def item(self, step: RecordedStep, verdict: str, weight: float, row: TruthRow | None) -> _Item:
        return _Item(
            self._iteration,
            step,
            verdict,
            weight,
            row,
            frequency=self._taken[step.pair] / self._visits[step.pair[:2]],
            deviation=self._deviations[step.group],
        )


def _deviation(returns_G: Sequence[float]) -> float:
    """Unbiased, as in credit/grpo.py; 0 for a group of one."""
    n = len(returns_G)
    mean = math.fsum(returns_G) / n
    return math.sqrt(math.fsum((r - mean) ** 2 for r in returns_G) / (n - 1)) if n > 1 else 0.0


def _bare(name: str, options: Mapping[str, Any], prompt: PromptConfig) -> Credit:
    check_credit(name, prompt)
    return credit_method(name, options)


def _method(
    make: Callable[[], Credit],
    options: Mapping[str, Any],
    groups: Mapping[int, Sequence[Group]],
    items: Sequence[_Item],
    seed: int,
) -> dict[str, Any]:
    """One method's measures, or why it does not apply."""
    try:
        credit = make()
        credited = {k: [credit(group) for group in own] for k, own in groups.items()}
    except UntwineError as error:
        return {"options": options, "not_applicable": str(error)}
    return _measures(_advantages(credited), options, items, seed)


def _advantages(
    groups: Mapping[int, Sequence[Group]],
) -> dict[tuple[int, str, int], float | None]:
    return {
        (k, episode.id, step.index): step.advantage
        for k, own in groups.items()
        for group in own
        for episode in group.episodes
        for step in episode.steps
    }


def _measures(
    estimates: Mapping[tuple[int, str, int], float | None],
    options: Mapping[str, Any],
    items: Sequence[_Item],
    seed: int,
) -> dict[str, Any]:
    found = [estimates[item.at] for item in items]
    kept = [
        (item, estimate)
        for item, estimate in zip(items, found, strict=True)
        if estimate is not None
    ]
    if not kept:
        return {"options": options, "not_applicable": "it gives none of these steps an advantage"}
    judged = _arrays(kept)
    parts = {
        "by_kind": [i.step.kind for i, _ in kept],
        "by_position": [i.step.position for i, _ in kept],
    }
    return {
        "options": options,
        "without_estimate": len(found) - len(kept),
        "all": calibrate(judged, seed=seed),
        **{
            part: {
                name: calibrate(judged.where(np.array(names) == name), seed=seed)
                for name in in_order(names)
            }
            for part, names in parts.items()
        },
        "lemma": _lemma(kept),
    }


def _arrays(kept: Sequence[tuple[_Item, float]]) -> Judged:
    return Judged.of(
        [estimate for _, estimate in kept],
        [SIGNS[item.verdict] for item, _ in kept],
        advantages=[item.row.advantage if item.row else math.nan for item, _ in kept],
        weights=[item.weight for item, _ in kept],
        groups=[(item.iteration, item.step.group) for item, _ in kept],
        episodes=[(item.iteration, item.step.episode.id) for item, _ in kept],
    )


def _lemma(kept: Sequence[tuple[_Item, float]]) -> dict[str, float] | None:
    """The lemma's mean over flawed steps, in units of return and of the group's standard deviation
    (as GRPO divides), beside the measured mean; None without A*."""
    flawed = [(i, i.row, a) for i, a in kept if i.row is not None and i.verdict == "flawed"]
    if not flawed:
        return None
    weights_N = np.array([item.weight for item, _, _ in flawed])
    advantages_N = np.array([row.advantage for _, row, _ in flawed])
    policy_q_N = np.array([row.q for _, row, _ in flawed])
    deviations_N = np.array([item.deviation for item, _, _ in flawed])
    group_q_N = np.array([item.frequency for item, _, _ in flawed])
    estimates_N = np.array([estimate for _, _, estimate in flawed])

    def mean(values_N: Floats) -> float:
        return float(np.average(values_N, weights=weights_N))

    result = {"measured": mean(estimates_N)}
    for name, q_N in (("policy_q", policy_q_N), ("group_q", group_q_N)):
        predicted_N = lemma_advantage(advantages_N, policy_q_N, q_N)
        scaled_N = np.where(deviations_N > 0, predicted_N / (deviations_N + _EPS), 0.0)
        result |= {name: mean(predicted_N), f"{name}_in_deviations": mean(scaled_N)}
    return result
