"""Every arm of the study of GCD beside the plain one that began with the same weights; what
registration.md calls secondary. No claim rests on it.

    python studies/gcd/secondary.py runs/gcd-study --out runs/gcd-study/secondary

For each arm: success on every set, and flawed steps per step on the last of them, minus those of
the plain arm (`grpo...`), pair by pair; mean and Student's 95 % interval. Beside them the mean
cosine of good-flawed pairs (from the looks), right verdicts in the last ten iterations, what share
of the update tokens were verdicts, and seconds per iteration. Writes secondary.json, with the
values of each pair, and secondary.svg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from analysis import check_sweep, cosine_after, verdict_accuracy, with_interval

from untwine.cli import run_guarded
from untwine.compare.numbers import SECONDS, UPDATE_TOKENS
from untwine.compare.runs import Found, Run, find_runs, paired, rows_on
from untwine.drawing import drawing
from untwine.errors import CheckpointError
from untwine.evaluate.aggregate import PairedDifference, paired_difference

PLAIN = "grpo"
COSINE = "cosine"
Values = tuple[int, float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """An arm beside its plain one.

    differences       by measure; None where there are no looks
    values            by measure: (seed, of the arm, of the plain one) of each pair
    verdict_accuracy  of the last ten iterations; None without verdicts
    verdict_tokens    share of the update tokens
    seconds           per iteration, sampling and update and labels
    """

    arm: str
    plain: str
    differences: Mapping[str, PairedDifference | None]
    values: Mapping[str, list[Values]]
    verdict_accuracy: float | None
    verdict_tokens: float
    seconds: float

    @property
    def pairs(self) -> int:
        return max((d.pairs for d in self.differences.values() if d), default=0)


def lines_of(found: Found, sets: Sequence[str] = ("L0", "L1")) -> list[Line]:
    """All arms that have pairs with a plain arm of their level, in the order of the sweep."""
    measures = {f"success {name}": (name, "success_rate") for name in sets}
    measures[f"flawed {sets[-1]}"] = (sets[-1], "flawed_rate")
    return [_line(arm, plain, pairs, measures) for arm, plain, pairs in beside_plain(found)]


def beside_plain(found: Found) -> Iterator[tuple[str, str, list[tuple[Run, Run]]]]:
    """Every arm, the plain arm of its level that began with the same weights, and their pairs."""
    for arm, runs in found.arms.items():
        for plain, others in found.arms.items():
            same_level = plain.split(".")[0] == arm.split(".")[0]
            pairs = paired(runs, others)
            if same_level and is_plain(plain) and plain != arm and pairs:
                yield arm, plain, pairs


def is_plain(arm: str) -> bool:
    return _name(arm).startswith(PLAIN)


def _name(arm: str) -> str:
    return arm.split(".")[-1]


def _line(
    arm: str,
    plain: str,
    pairs: Sequence[tuple[Run, Run]],
    measures: Mapping[str, tuple[str, str]],
) -> Line:
    both = [run for pair in pairs for run in pair]
    rows = {name: rows_on(both, name) for name in {name for name, _ in measures.values()}}
    values: dict[str, list[Values]] = {}
    for name, (set_name, key) in measures.items():
        found = rows[set_name]
        values[name] = [
            (run.seed, float(found[run.path][key]), float(found[other.path][key]))
            for run, other in pairs
        ]
    cosines = [(run.seed, cosine_after(run), cosine_after(other)) for run, other in pairs]
    values[COSINE] = [(s, x, y) for s, x, y in cosines if x is not None and y is not None]
    ours = [run for run, _ in pairs]
    verdicts = sum(run.total("gcd_tokens") for run in ours)
    tokens = sum(run.total(*UPDATE_TOKENS) for run in ours)
    seconds = sum(run.total(*SECONDS) for run in ours)
    return Line(
        arm,
        plain,
        {name: _difference(known) for name, known in values.items()},
        values,
        verdict_accuracy(ours),
        verdicts / tokens if tokens else 0.0,
        seconds / max(1, sum(len(run.data.rl) for run in ours)),
    )


def _difference(values: Sequence[Values]) -> PairedDifference | None:
    _, ours, theirs = np.array(values).reshape(-1, 3).T
    return paired_difference(ours, theirs) if values else None


def table(lines: Sequence[Line]) -> str:
    names = list(lines[0].differences)
    head = ["Arm", "minus", "pairs", *names, "right verdicts", "verdict tokens", "s/iteration"]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        accuracy = line.verdict_accuracy
        rows.append(
            [
                line.arm,
                _name(line.plain),
                str(line.pairs),
                *(_shown(line.differences[name]) for name in names),
                "–" if accuracy is None else f"{accuracy:.2f}",
                f"{100 * line.verdict_tokens:.1f} %",
                f"{line.seconds:.1f}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shown(found: PairedDifference | None) -> str:
    return with_interval(found.mean, found.interval) if found else with_interval(None, None)


def draw(lines: Sequence[Line], path: Path) -> None:
    shown = [name for name in lines[0].differences if name != COSINE][-2:]
    with drawing(path, (9.0, 0.9 + 0.3 * len(lines))) as figure:
        for axes, name in zip(figure.subplots(1, 2, sharey=True), shown, strict=True):
            for place, line in enumerate(lines):
                found = line.differences[name]
                if found is not None:
                    axes.plot(found.mean, place, "o", color="C0", ms=4)
                    if found.interval:
                        axes.hlines(place, *found.interval, lw=2, color="C0", alpha=0.6)
            axes.axvline(0, color="grey", lw=0.8)
            axes.set_yticks(range(len(lines)), [f"{x.arm} − {_name(x.plain)}" for x in lines])
            axes.set_ylim(len(lines) - 0.5, -0.5)
            axes.set_xlabel(f"{name}, difference of pairs", fontsize=9)
            axes.tick_params(labelsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", default="L0,L1", help="evaluation sets, separated by commas")
    given = parser.parse_args()
    check_sweep(given.sweep)
    lines = lines_of(find_runs([given.sweep]), given.sets.split(","))
    if not lines:
        raise CheckpointError(f"{given.sweep} has no finished pair of runs from one cold start")
    given.out.mkdir(parents=True, exist_ok=True)
    record = [asdict(line) for line in lines]
    (given.out / "secondary.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    draw(lines, given.out / "secondary.svg")
    print(table(lines))


if __name__ == "__main__":
    run_guarded(main)
