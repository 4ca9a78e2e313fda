"""Which kinds of steps become rarer in training, and which do not (docs/study-scienceworld.md).

    S=runs/gcd-scienceworld-second
    python studies/gcd/kinds.py $S --arm wrong.grpo --out $S/kinds

Counts the steps that were sampled in the first and in the last iterations (--iterations of each)
of every run, by the kind that the rules give them and, where a command was not understood, by its
first word: share of the steps, number per episode, mean probability of the command where it was
given, mean advantage. Means over runs at either end, and of the difference with Student's 95 %
interval, each run counting once; runs without such steps at either end are left out of the last
two. Where the look `coupling-before` was taken (the Gram of the first iteration, before training):
how many of the flawed steps with an advantage below 0 that first batch makes more likely, beside
how many it would with permuted weights; and who lifts these steps (`lifts` of the look), in units
of what they do to themselves. Writes kinds.json, with the values of each run, kinds.svg and
lifters.svg. No claim rests on it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis import read_numbers, runs_of, summary, with_interval

from untwine.cli import run_guarded
from untwine.diagnose.lift_table import LEAST, lift_rows
from untwine.drawing import COLOURS, drawing
from untwine.envs.wandering import first_word
from untwine.episodes import read_groups
from untwine.errors import CheckpointError, ConfigError
from untwine.evaluate.statistics import mean, student_interval
from untwine.prompting.prompter import action_as_shown
from untwine.records import Group, Step

Numbers = dict[str, dict[str, float]]
MEASURES = {
    "share": "of the steps",
    "per_episode": "per episode",
    "probability": "probability",
    "advantage": "advantage",
}
LIFTED = "lifted"
LIFTERS = "lifters"
PUNISHED = "labelled flawed, advantage below 0"
Found = dict[str, dict[str, dict[str, Any]]]
_ENDS = ("self", "sum")
_NOTHING = {"mean": 0.0}


def kinds_of(step: Step, words: Collection[str]) -> list[str]:
    """The rule's kind of a step, and for an invalid one that with its first word, if it is one of
    `words`."""
    (kind,) = [label.kind for label in step.labels if label.source == "rule"] or ["other"]
    if kind != "invalid":
        return [kind]
    return [kind, f"{kind}: {word if (word := _first_word(step)) in words else 'other'}"]


def count(groups: Iterable[Group]) -> Numbers:
    """By measure and kind, over all steps of the groups."""
    episodes = [episode for group in groups for episode in group.episodes]
    steps = [step for episode in episodes for step in episode.steps]
    words = {_first_word(step) for step in steps if not step.invalid}
    found: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        for kind in kinds_of(step, words):
            found[kind].append(step)
    advantages = {
        kind: [step.advantage for step in own if step.advantage is not None]
        for kind, own in found.items()
    }
    return {
        "share": {kind: len(own) / len(steps) for kind, own in found.items()},
        "per_episode": {kind: len(own) / len(episodes) for kind, own in found.items()},
        "probability": {
            kind: mean([math.exp(sum(step.logprobs)) for step in own])
            for kind, own in found.items()
        },
        "advantage": {kind: mean(own) for kind, own in advantages.items() if own},
    }


def ends(run: Path, iterations: int) -> tuple[Numbers, Numbers]:
    """The first and the last iterations of a run. CheckpointError when there are too few."""
    files = sorted((run / "episodes").glob("iter-*.jsonl.gz"))
    if len(files) < 2 * iterations:
        raise CheckpointError(
            f"{run} holds the episodes of {len(files)} iterations, and {2 * iterations} are "
            "needed; choose fewer with --iterations"
        )
    first, last = (
        count(group for file in part for group in read_groups(file))
        for part in (files[:iterations], files[-iterations:])
    )
    return first, last


def differences(pairs: Iterable[tuple[Numbers, Numbers]]) -> Found:
    """By measure and kind: `values` (first, last) of the runs, their means, and the mean and
    interval of last - first. Shares are 0 where a run has no such step."""
    runs = list(pairs)
    kinds = sorted({kind for run in runs for end in run for kind in end["share"]})
    found: Found = {name: {} for name in MEASURES}
    for name in MEASURES:
        for kind in kinds:
            known = [tuple(_value(end, name, kind) for end in run) for run in runs]
            values = [(a, b) for a, b in known if a is not None and b is not None]
            if len(values) > 1:
                found[name][kind] = _change(values)
    return found


def lifted(looks: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By kind, the same of (share lifted with permuted weights, share lifted), over the looks with
    punished steps of the kind."""
    values: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for look in looks:
        for kind, rate in look.get("reinforced", {}).get(PUNISHED, {}).items():
            if rate and rate["flawed"]:
                values[kind].append((rate["null"], rate["share"]))
    return {kind: _change(own) for kind, own in values.items() if len(own) > 1}


def lifters(looks: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By kind and by who lifts it (`self`, the sources, `sum`): the values of the looks that have
    the kind, their mean and Student's interval."""
    tables = [
        {row.name: row.values for row in lift_rows(look["lifts"], least=0.0)}
        for look in looks
        if look.get("lifts")
    ]
    found: dict[str, dict[str, Any]] = {}
    for kind in sorted({kind for table in tables for kind in table["self"]}):
        own = [table for table in tables if kind in table["self"]]
        if len(own) < 2:
            continue
        names = dict.fromkeys(name for table in own for name in table)
        values = {name: [table.get(name, {}).get(kind) or 0.0 for table in own] for name in names}
        found[kind] = {name: summary(own) for name, own in values.items()}
    return found


def draw_lifters(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Who lifts and who holds down, for each kind that half of the runs or more have."""
    runs = {kind: len(own["self"]["values"]) for kind, own in found.items() if kind != "all"}
    kinds = [kind for kind in runs if 2 * runs[kind] >= max(runs.values())]
    sizes = {
        name: max(abs(found[kind].get(name, _NOTHING)["mean"]) for kind in kinds)
        for kind in kinds
        for name in found[kind]
    }
    names = [name for name in sizes if sizes[name] >= LEAST]
    names.sort(key=lambda name: (name in _ENDS, found[kinds[0]].get(name, _NOTHING)["mean"]))
    with drawing(path, (3.2 + 2.2 * len(kinds), 1.0 + 0.25 * len(names))) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            for y, name in enumerate(names):
                one = found[kind].get(name)
                if one is not None:
                    colour = COLOURS[1 if one["mean"] > 0 else 0]
                    axes.plot(one["interval"], [y, y], color=colour)
                    axes.plot([one["mean"]], [y], "o", ms=4, color=colour)
            axes.axvline(0.0, color="grey", linewidth=0.8)
            axes.set_title(kind)
            axes.set_yticks(range(len(names)), names, fontsize=8)


def draw(found: Found, path: Path) -> None:
    """The flawed kinds in the looks: what the first batch does to them, and what training did."""
    advantage = found["advantage"]
    kinds = [k for k in found[LIFTED] if k in advantage and advantage[k]["first"] < 0]
    kinds.sort(key=lambda kind: found[LIFTED][kind]["difference"])
    panels = (
        (LIFTED, "lifted by the first batch, minus chance", False),
        ("per_episode", "number per episode, last to first, minus 1", True),
    )
    with drawing(path, (8.0, 0.9 + 0.3 * len(kinds))) as figure:
        for axes, (name, title, relative) in zip(figure.subplots(1, 2), panels, strict=True):
            for y, kind in enumerate(kinds):
                own = found[name][kind]
                unit = own["first"] if relative else 1.0
                axes.plot([end / unit for end in own["interval"]], [y, y], color=COLOURS[0])
                axes.plot([own["difference"] / unit], [y], "o", color=COLOURS[0])
            axes.axvline(0.0, color="grey", linewidth=0.8)
            axes.set_yticks(range(len(kinds)), kinds)
            axes.set_ylim(-0.5, len(kinds) - 0.5)
            axes.set_title(title)


def _change(values: Sequence[tuple[float, float]]) -> dict[str, Any]:
    change = [b - a for a, b in values]
    return {
        "values": values,
        "first": mean([a for a, _ in values]),
        "last": mean([b for _, b in values]),
        "difference": mean(change),
        "interval": student_interval(change),
    }


def _first_word(step: Step) -> str:
    return first_word(action_as_shown(step.command, step.text))


def _value(end: Mapping[str, Mapping[str, float]], name: str, kind: str) -> float | None:
    absent = 0.0 if name in ("share", "per_episode") else None
    return end[name].get(kind, absent)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.iterations < 1:
        raise ConfigError("--iterations must be 1 or more")
    runs = runs_of(given.sweep, given.arm)
    found = differences(ends(run.path, given.iterations) for run in runs)
    again = "have the sweep take the look again"
    looks = (read_numbers(run.path / "looks" / "coupling-before.json", again) for run in runs)
    taken = list(looks)
    found[LIFTED], found[LIFTERS] = lifted(taken), lifters(taken)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "kinds.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{len(runs)} runs of {given.arm}, first and last {given.iterations} iterations\n")
    if found[LIFTED]:
        draw(found, given.out / "kinds.svg")
    if found[LIFTERS]:
        draw_lifters(found[LIFTERS], given.out / "lifters.svg")
    columns = {**MEASURES, LIFTED: "lifted at first: by chance → here"}
    print("| Steps | " + " | ".join(columns.values()) + " |\n|---|" + "---|" * len(columns))
    for kind in found["share"]:
        cells = [_cell(found[name].get(kind)) for name in columns]
        print(f"| {kind} | " + " | ".join(cells) + " |")
    for kind, sources in found[LIFTERS].items():
        print(f"\n| Who lifts {kind} | mean, 95 % |\n|---|---|")
        for name, one in sources.items():
            if abs(one["mean"]) >= LEAST:
                print(f"| {name} | {with_interval(one['mean'], one['interval'])} |")


def _cell(numbers: Mapping[str, Any] | None) -> str:
    if numbers is None:
        return "–"
    change = with_interval(numbers["difference"], numbers["interval"])
    return f"{numbers['first']:.3f} → {numbers['last']:.3f}, {change}"


if __name__ == "__main__":
    run_guarded(main)
