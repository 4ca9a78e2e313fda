"""The table of claims of the study of GCD, as registered in registration.md;
tests/studies holds this script to made-up runs whose answers are known.

    python studies/gcd/analysis.py runs/gcd-study --out runs/gcd-study/claims

Reads a sweep folder (success through `untwine compare`, and RUN/looks) and writes claims.json and
claims.svg. A claim is *reproduced* when the 95 % interval over runs lies above 0 and reaches the
smallest effect that matters, *not reproduced* when it lies below that effect, else *undecided*.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from untwine.compare.numbers import compare_runs
from untwine.compare.runs import COLD_ARM, Found, Run, find_runs, paired
from untwine.drawing import drawing
from untwine.errors import UntwineError
from untwine.evaluate.aggregate import paired_difference

PRIMARY_LEVEL, GRPO, GCD = "wrong", "grpo", "gcd-ce"
LEAST_ACCURACY = 0.85
"""Verdict accuracy below which a null of GCD is none."""
FEWEST = 5
"""Runs (or pairs) below which nothing is decided."""
LIFTED = "pi > 0.5"

REPRODUCED, NOT, UNDECIDED = "reproduced", "not reproduced", "undecided"


@dataclass(frozen=True, slots=True)
class Claim:
    """value  mean over runs, positive where the claim is right
    least  smallest effect that matters
    """

    name: str
    level: str
    runs: int
    value: float | None
    interval: tuple[float, float] | None
    least: float
    verdict: str


def verdict_of(runs: int, interval: Sequence[float] | None, least: float) -> str:
    """The registered rule."""
    if interval is None or runs < FEWEST:
        return UNDECIDED
    low, high = interval
    if high < least:
        return NOT
    return REPRODUCED if low > 0 else UNDECIDED


def claims_of(sweep: Path, level: str = PRIMARY_LEVEL) -> list[Claim]:
    """The four claims at one level of cold start; claim 4 has two parts, each with its own line."""
    found = find_runs([sweep])
    plain = _arm(found, level, GRPO)
    pairs = paired(_arm(found, level, GCD), plain)
    cured = [
        None if (a := _cosine(ours)) is None or (b := _cosine(theirs)) is None else b - a
        for ours, theirs in pairs
    ]
    return [
        _claim("1 flawed steps have negative expected advantage", level, plain, 0.0, _punished),
        _fall(found, plain, level),
        _claim("3 coupling lifts likely flawed actions", level, plain, 0.05, _lifted),
        _judge("4a GCD lowers good-flawed coupling", level, cured, 0.02, _can_judge(pairs)),
        _gain(sweep, level, _can_judge(pairs)),
    ]


def _arm(found: Found, level: str, name: str) -> list[Run]:
    return found.arms.get(f"{level}.{name}", [])


def _claim(
    name: str,
    level: str,
    runs: Sequence[Run],
    least: float,
    measure: Callable[[Run], float | None],
) -> Claim:
    return _judge(name, level, [measure(run) for run in runs], least)


def _judge(
    name: str,
    level: str,
    values: Sequence[float | None],
    least: float,
    can_be_null: bool = True,
) -> Claim:
    known = np.array([v for v in values if v is not None])
    if not len(known):
        return Claim(name, level, 0, None, None, least, UNDECIDED)
    found = paired_difference(known, np.zeros(len(known)))
    verdict = verdict_of(len(known), found.interval, least)
    if verdict == NOT and not can_be_null:
        verdict = UNDECIDED
    return Claim(name, level, len(known), found.mean, found.interval, least, verdict)


def _look(run: Run, name: str) -> Mapping[str, Any]:
    """What a look found; {} where it was not taken."""
    file = run.path / "looks" / f"{name}.json"
    numbers: Mapping[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return numbers


def _punished(run: Run) -> float | None:
    """Minus the mean advantage that GRPO gives to truly flawed steps, every episode once."""
    grpo = _look(run, "calibration").get("methods", {}).get("grpo", {})
    mean = grpo.get("all", {}).get("by_episode", {}).get("flawed_mean")
    value = mean.get("value") if isinstance(mean, Mapping) else mean
    return None if value is None else -float(value)


def _lifted(run: Run) -> float | None:
    """How much oftener the mean gradient lifts likely flawed actions than with permuted weights,
    before the iterations have moved the policy."""
    push = _look(run, "coupling-before").get("mean_push") or {}
    rate = push.get("rates", {}).get(LIFTED) or {}
    share, null = rate.get("share"), rate.get("null")
    return None if share is None or null is None else float(share - null)


def _cosine(run: Run) -> float | None:
    """Mean cosine of good-flawed pairs in different states, after the iterations."""
    rows = [
        row
        for row in _look(run, "coupling-after").get("cosines", [])
        if row["kind"] == "good-flawed" and row["relation"] != "same state" and row["pairs"]
    ]
    pairs = sum(row["pairs"] for row in rows)
    return math.fsum(row["pairs"] * row["mean"] for row in rows) / pairs if pairs else None


def _fall(found: Found, plain: Sequence[Run], level: str) -> Claim:
    """Flawed steps per step on L0 of the cold start, minus those after GRPO from it."""
    name = "2 the total mass of flawed actions falls"
    colds = [run for arm, runs in found.arms.items() if arm.startswith(COLD_ARM) for run in runs]
    before = {run.start: _flawed(run) for run in colds}
    falls = []
    for run in plain:
        start, end = before.get(run.start), _flawed(run)
        falls.append(None if start is None or end is None else start - end)
    return _judge(name, level, falls, 0.01)


def _flawed(run: Run) -> float | None:
    rows = run.results.get(("L0", "sampled"))
    return None if not rows else rows[-1].get("flawed_rate")


def _can_judge(pairs: Sequence[tuple[Run, Run]]) -> bool:
    """Whether GCD had learnt to tell: mean verdict accuracy of the last ten iterations."""
    accuracies = [
        float(row["verdict_accuracy"])
        for ours, _ in pairs
        for row in ours.data.rl[-10:]
        if row.get("verdict_accuracy") is not None
    ]
    return bool(accuracies) and float(np.mean(accuracies)) > LEAST_ACCURACY


def _gain(sweep: Path, level: str, can_judge: bool) -> Claim:
    """The primary measure: success on L1, GCD minus GRPO, pair by pair."""
    name = "4b GCD raises held-out success"
    try:
        numbers = compare_runs([sweep], sets=["L1"], baseline=f"{level}.{GRPO}")
    except UntwineError:
        return _judge(name, level, [], 0.03)
    rows = [r for r in numbers["sets"][0]["against"] if r["label"] == f"{level}.{GCD}"]
    differences = rows[0]["paired"]["differences"] if rows and rows[0]["paired"] else []
    return _judge(name, level, differences, 0.03, can_judge)


def token_spread(sweep: Path, level: str = PRIMARY_LEVEL) -> float | None:
    """Largest over smallest mean of update tokens among the arms of a level, minus 1."""
    totals = []
    for arm, runs in find_runs([sweep]).arms.items():
        if arm.startswith(f"{level}."):
            spent = [
                sum(row.get(k) or 0 for row in run.data.rl for k in ("policy_tokens", "gcd_tokens"))
                for run in runs
            ]
            totals.append(float(np.mean(spent)))
    return max(totals) / min(totals) - 1 if totals and min(totals) > 0 else None


def draw_claims(claims: Sequence[Claim], path: Path) -> None:
    """Each claim as value over its smallest effect that matters, with its interval."""
    with drawing(path, (8.0, 0.6 + 0.4 * len(claims))) as figure:
        axes = figure.subplots()
        for place, claim in enumerate(claims):
            if claim.interval and claim.value is not None:
                axes.hlines(place, *claim.interval, lw=4, alpha=0.4)
                axes.plot(claim.value, place, "|", ms=12, mew=2)
            axes.plot(claim.least, place, "x", color="grey", ms=5)
        axes.axvline(0, color="grey", lw=0.8)
        axes.set_yticks(range(len(claims)), [f"{c.level}: {c.name}" for c in claims])
        axes.set_ylim(len(claims) - 0.5, -0.5)
        axes.set_xlabel("effect in the direction of the claim (x: smallest that matters)")


def table(claims: Sequence[Claim]) -> str:
    """The claims as a Markdown table."""
    lines = ["| Claim | Level | Runs | Effect, 95 % | Matters from | Verdict |", ""]
    lines[1] = "|---|---|---:|---|---:|---|"
    for c in claims:
        shown = "–" if c.value is None else f"{c.value:+.3f}"
        if c.interval:
            shown += f" [{c.interval[0]:+.3f}, {c.interval[1]:+.3f}]"
        lines.append(f"| {c.name} | {c.level} | {c.runs} | {shown} | {c.least:g} | {c.verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--levels", default="wrong,short,full")
    given = parser.parse_args()
    claims = [c for level in given.levels.split(",") for c in claims_of(given.sweep, level)]
    spread = token_spread(given.sweep)
    given.out.mkdir(parents=True, exist_ok=True)
    record = {"claims": [asdict(c) for c in claims], "token_spread": spread}
    (given.out / "claims.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    draw_claims(claims, given.out / "claims.svg")
    print(table(claims))
    if spread is not None:
        print(f"\nTokens of updates differ by {100 * spread:.1f} % between arms.")


if __name__ == "__main__":
    main()
