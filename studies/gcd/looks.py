"""What the microscope saw of every arm of a sweep, before and after training; secondary, no claim.

    python studies/gcd/looks.py runs/gcd-arms --out runs/gcd-arms/looks

Before is the look at the plain arm that began with the same weights, at its first iteration. Per
arm, mean and Student's 95 % interval over runs:

    cosine  of the gradients of good and flawed steps in different states (looks/coupling-*.json)
    lifted  share of flawed steps that the mean gradient lifts, minus that under permuted weights
    apart   distance of the centroids of good and of flawed steps in the last layer, in units of the
            spread within, minus that under permuted labels (looks/separation-*.json)
    probe   balanced accuracy of a linear probe of the last layer on other task instances

and, pair by pair, after training minus the plain arm after training. Writes looks.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis import check_sweep, cosine_of, lifted, look, summary, with_interval
from secondary import beside_plain, is_plain

from untwine.cli import run_guarded
from untwine.compare.runs import Found, Run, find_runs
from untwine.errors import CheckpointError

WHEN = ("before", "after")
ALL = "all"


def _apart(run: Run, when: str) -> float | None:
    last = _last_layer(run, when)
    margin, shuffled = last.get("margin"), last.get("margin_shuffled")
    return None if margin is None or shuffled is None else float(margin - shuffled)


def _probe(run: Run, when: str) -> float | None:
    found = _last_layer(run, when).get("balanced")
    return None if found is None else float(found)


def _last_layer(run: Run, when: str) -> Mapping[str, Any]:
    layers: Sequence[Mapping[str, Any]] = look(run, f"separation-{when}").get("layers", ())
    return layers[-1] if layers else {}


MEASURES: dict[str, Callable[[Run, str], float | None]] = {
    "cosine": lambda run, when: cosine_of(look(run, f"coupling-{when}")),
    "lifted": lambda run, when: lifted(look(run, f"coupling-{when}"), ALL),
    "apart": _apart,
    "probe": _probe,
}


def looks_of(found: Found) -> dict[str, dict[str, Any]]:
    """By arm and measure: `before`, `after`, and `minus` the plain arm (of arms that are not plain
    themselves), as far as looks were taken."""
    arms = {arm: _of_pairs([(run, run) for run in runs]) for arm, runs in _plain_arms(found)}
    for arm, plain, pairs in beside_plain(found):
        arms.setdefault(arm, _of_pairs(pairs) | {"beside": plain})
    return arms


def _plain_arms(found: Found) -> list[tuple[str, list[Run]]]:
    return [(arm, runs) for arm, runs in found.arms.items() if is_plain(arm)]


def _of_pairs(pairs: Sequence[tuple[Run, Run]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, measure in MEASURES.items():
        before = [measure(plain, "before") for _, plain in pairs]
        after = [(measure(run, "after"), measure(plain, "after")) for run, plain in pairs]
        minus = [x - y for x, y in after if x is not None and y is not None]
        seen[name] = {
            "before": _summary(before),
            "after": _summary([x for x, _ in after]),
            "minus": _summary(minus if any(run is not plain for run, plain in pairs) else []),
        }
    return seen


def _summary(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    return summary(known) if known else None


def table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    columns = [f"{name}, {part}" for name in MEASURES for part in (*WHEN, "minus plain")]
    lines = [f"| Arm | runs | {' | '.join(columns)} |", "|---|---:|" + "---|" * len(columns)]
    for arm, seen in arms.items():
        cells = []
        for name in MEASURES:
            parts = seen[name]
            cells += [_mean(parts[when]) for when in WHEN]
            minus = parts["minus"] or {"mean": None, "interval": None}
            cells.append(with_interval(minus["mean"], minus["interval"]))
        runs = max(len((seen[name]["after"] or {"values": ()})["values"]) for name in MEASURES)
        lines.append(f"| {arm} | {runs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(part: Mapping[str, Any] | None) -> str:
    return f"{part['mean']:.3f}" if part else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    check_sweep(given.sweep)
    arms = looks_of(find_runs([given.sweep]))
    if not arms:
        raise CheckpointError(f"{given.sweep} has no finished run of GRPO to look at")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "looks.json").write_text(json.dumps(arms, indent=1), encoding="utf-8")
    print(table(arms))


if __name__ == "__main__":
    run_guarded(main)
