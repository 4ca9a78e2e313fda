"""The table of claims of the study of GCD, as registered in registration.md;
tests/studies holds this script to made-up runs whose answers are known.

    python studies/gcd/analysis.py runs/gcd-study --out runs/gcd-study/claims

Reads a sweep folder (success through `untwine compare`, and RUN/looks) and writes claims.json and
claims.svg. A claim is *reproduced* when the 95 % interval over runs lies above 0 and reaches the
smallest effect that matters, *not reproduced* when it lies below that effect, else *undecided*.
What the registration says beside that (claim 4 needs both parts, unequal tokens) is printed below.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from untwine.cli import run_guarded
from untwine.compare.numbers import UPDATE_TOKENS
from untwine.compare.runs import (
    COLD_ARM,
    SWEEP_FILE,
    Found,
    Run,
    find_runs,
    paired,
    read_sweep,
    rows_on,
)
from untwine.drawing import drawing
from untwine.errors import CheckpointError, ConfigError, nearest
from untwine.evaluate.aggregate import paired_difference
from untwine.evaluate.statistics import mean, student_interval
from untwine.progress import Display

Measured = TypeVar("Measured")

GRPO, GCD = "grpo", "gcd-ce"
LEAST_ACCURACY = 0.85
"""Verdict accuracy below which a null of GCD is none."""
FEWEST = 5
"""Runs (or pairs) below which nothing is decided."""
MOST_SPREAD = 0.10
"""Difference in tokens between arms above which their comparison is explored only."""
LIFTED = "pi > 0.5"

REPRODUCED, NOT, UNDECIDED = "reproduced", "not reproduced", "undecided"


@dataclass(frozen=True, slots=True)
class Claim:
    """value  mean over runs, positive where the claim is right
    least  smallest effect that matters
    lacking  why there are fewer runs or pairs than were trained
    """

    name: str
    level: str
    runs: int
    value: float | None
    interval: tuple[float, float] | None
    least: float
    verdict: str
    lacking: list[str] = field(default_factory=list)


def verdict_of(runs: int, interval: Sequence[float] | None, least: float) -> str:
    """The registered rule."""
    if interval is None or runs < FEWEST:
        return UNDECIDED
    low, high = interval
    if high < least:
        return NOT
    return REPRODUCED if low > 0 else UNDECIDED


def claims_of(found: Found, level: str, gcd: str = GCD) -> list[Claim]:
    """The four claims at one level of cold start; claim 4, about the arm `gcd`, has two parts, each
    with its own line."""
    plain = _arm(found, level, GRPO)
    pairs = paired(_arm(found, level, gcd), plain)
    cured = [
        None if (a := cosine_after(ours)) is None or (b := cosine_after(theirs)) is None else b - a
        for ours, theirs in pairs
    ]
    return [
        _claim("1 flawed steps have negative expected advantage", level, plain, 0.0, _punished),
        _fall(found, plain, level),
        _claim("3 coupling lifts likely flawed actions", level, plain, 0.05, _lifted),
        _judge("4a GCD lowers good-flawed coupling", level, cured, 0.02, _can_judge(pairs)),
        _gain(pairs, level, gcd, _can_judge(pairs)),
    ]


def claim_4(claims: Sequence[Claim]) -> str:
    """Of the claims of one level: claim 4 is reproduced when both of its parts are."""
    parts = {claim.verdict for claim in claims if claim.name.startswith("4")}
    return NOT if NOT in parts else UNDECIDED if UNDECIDED in parts else REPRODUCED


def levels_of(sweep: Path) -> list[str]:
    """The levels of the planned arms, which are called LEVEL.ARM."""
    arms = [entry["arm"] for entry in read_sweep(sweep)]
    return list(
        dict.fromkeys(a.split(".")[0] for a in arms if "." in a and not a.startswith(COLD_ARM))
    )


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
    lacking: Sequence[str] = (),
) -> Claim:
    known = np.array([v for v in values if v is not None])
    if not len(known):
        return Claim(name, level, 0, None, None, least, UNDECIDED, list(lacking))
    found = paired_difference(known, np.zeros(len(known)))
    verdict = verdict_of(len(known), found.interval, least)
    if verdict == NOT and not can_be_null:
        verdict = UNDECIDED
    return Claim(name, level, len(known), found.mean, found.interval, least, verdict, list(lacking))


def look(run: Run, name: str) -> Mapping[str, Any]:
    """What a look found; {} where it was not taken."""
    file = run.path / "looks" / f"{name}.json"
    return read_numbers(file, "have the sweep take the look again")


def read_numbers(file: Path, again: str) -> Mapping[str, Any]:
    """The object in a JSON file; {} where there is no file. CheckpointError when it is damaged,
    which says how to get it `again`."""
    try:
        numbers = json.loads(file.read_text("utf-8")) if file.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}); remove it, and {again}") from error
    if not isinstance(numbers, Mapping):
        raise CheckpointError(f"{file} holds no numbers by name; remove it")
    return numbers


def _punished(run: Run) -> float | None:
    """Minus the mean advantage that GRPO gives to truly flawed steps, every episode once."""
    grpo = look(run, "calibration").get("methods", {}).get("grpo", {})
    mean = grpo.get("all", {}).get("by_episode", {}).get("flawed_mean")
    value = mean.get("value") if isinstance(mean, Mapping) else mean
    return None if value is None else -float(value)


def _lifted(run: Run) -> float | None:
    """How much oftener the mean gradient lifts likely flawed actions than with permuted weights,
    before the iterations have moved the policy."""
    return lifted(look(run, "coupling-before"), LIFTED)


def lifted(coupling: Mapping[str, Any], which: str) -> float | None:
    """Share of the flawed steps in the class `which` that the mean gradient lifts, minus that under
    permuted weights; None without the look, or without such steps."""
    push = coupling.get("mean_push") or {}
    rate = push.get("rates", {}).get(which) or {}
    share, null = rate.get("share"), rate.get("null")
    return None if share is None or null is None else float(share - null)


def cosine_after(run: Run) -> float | None:
    """`cosine_of` the look after the iterations."""
    return cosine_of(look(run, "coupling-after"))


def cosine_of(coupling: Mapping[str, Any]) -> float | None:
    """Mean cosine of good-flawed pairs in different states; None without the look, or without such
    pairs."""
    rows = [
        row
        for row in coupling.get("cosines", [])
        if row["kind"] == "good-flawed" and row["relation"] != "same state" and row["pairs"]
    ]
    pairs = sum(row["pairs"] for row in rows)
    return math.fsum(row["pairs"] * row["mean"] for row in rows) / pairs if pairs else None


def _fall(found: Found, plain: Sequence[Run], level: str) -> Claim:
    """Flawed steps per step on L0 of the cold start, minus those after GRPO from it."""
    name = "2 the total mass of flawed actions falls"
    colds = [run for arm, runs in found.arms.items() if arm.startswith(COLD_ARM) for run in runs]
    before = {run.start: run for run in colds}
    falls, lacking = [], []
    for run in plain:
        try:
            start = before.get(run.start)
            if start is None:
                raise ConfigError(f"{run.path} has no cold start among the finished runs")
            rows = rows_on([start, run], "L0")
            falls.append(rows[start.path]["flawed_rate"] - rows[run.path]["flawed_rate"])
        except ConfigError as error:
            lacking.append(str(error))
    return _judge(name, level, falls, 0.01, lacking=lacking)


def verdict_accuracy(runs: Iterable[Run]) -> float | None:
    """Mean over the last ten iterations of all runs; None without verdicts."""
    accuracies = [
        float(row["verdict_accuracy"])
        for run in runs
        for row in run.data.rl[-10:]
        if row.get("verdict_accuracy") is not None
    ]
    return float(np.mean(accuracies)) if accuracies else None


def _can_judge(pairs: Sequence[tuple[Run, Run]]) -> bool:
    """Whether GCD had learnt to tell."""
    accuracy = verdict_accuracy(ours for ours, _ in pairs)
    return accuracy is not None and accuracy > LEAST_ACCURACY


def _gain(pairs: Sequence[tuple[Run, Run]], level: str, gcd: str, can_judge: bool) -> Claim:
    """The primary measure: success on L1, GCD minus GRPO, pair by pair."""
    name, gains, lacking = "4b GCD raises held-out success", [], []
    if not pairs:
        lacking.append(f"no finished runs of {gcd} and {GRPO} have seed and cold start in common")
    else:
        try:
            rows = rows_on([run for pair in pairs for run in pair], "L1")
            gains = [
                rows[ours.path]["success_rate"] - rows[theirs.path]["success_rate"]
                for ours, theirs in pairs
            ]
        except ConfigError as error:
            lacking.append(str(error))
    return _judge(name, level, gains, 0.03, can_judge, lacking)


def tokens_of(found: Found, level: str, gcd: str = GCD) -> dict[str, float]:
    """Mean tokens of updates of the arms that claim 4 compares."""
    compared = {f"{level}.{name}": _arm(found, level, name) for name in (GRPO, gcd)}
    return {
        arm: float(np.mean([run.total(*UPDATE_TOKENS) for run in runs]))
        for arm, runs in compared.items()
        if runs
    }


def token_spread(tokens: Mapping[str, float]) -> float | None:
    """Largest over smallest mean, minus 1."""
    least = min(tokens.values(), default=0.0)
    return max(tokens.values()) / least - 1 if least > 0 else None


def remarks(found: Found, level: str, claims: Sequence[Claim], gcd: str = GCD) -> list[str]:
    """What the registration says of the claims of a level beside their intervals, and why runs are
    missing."""
    said = [f"Claim 4 at {level}: {claim_4(claims)}. It is reproduced when both of its parts are."]
    tokens = tokens_of(found, level, gcd)
    spread = token_spread(tokens)
    if spread is not None:
        said.append(
            f"Tokens of updates differ by {100 * spread:.1f} % between {GRPO} and {gcd} at {level}."
        )
        if spread > MOST_SPREAD:
            least, most = (f(tokens, key=tokens.__getitem__) for f in (min, max))
            said[-1] += (
                f" That is more than {100 * MOST_SPREAD:.0f} % ({least} used fewest, {most} most), "
                "so the comparison, claim 4, is explored only."
            )
    for claim in claims:
        said += [f"Claim {claim.name.split()[0]} at {level}: {why}." for why in claim.lacking]
    return said


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
        shown = with_interval(c.value, c.interval)
        lines.append(f"| {c.name} | {c.level} | {c.runs} | {shown} | {c.least:g} | {c.verdict} |")
    return "\n".join(lines)


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """A value and the ends of its interval, as far as they are known."""
    shown = "–" if value is None else f"{value:+.3f}"
    return shown + (f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "")


def summary(values: Sequence[float]) -> dict[str, Any]:
    """`values` of runs with their mean and Student's 95 % interval, None for a single one."""
    interval = student_interval(values) if len(values) > 1 else None
    return {"values": list(values), "mean": mean(values), "interval": interval}


def over_runs(
    values: Sequence[Mapping[str, Mapping[str, float]]], columns: Sequence[str]
) -> dict[str, Any]:
    """By row and column: values of the runs, their mean, and its interval."""
    return {
        row: {column: summary([run[row][column] for run in values]) for column in columns}
        for row in values[0]
    }


def summary_table(head: str, found: Mapping[str, Any]) -> str:
    """What `over_runs` gives, as a Markdown table; `head` stands over the names of the rows."""
    columns = list(next(iter(found.values())))
    lines = [f"| {head} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, parts in found.items():
        cells = [with_interval(part["mean"], part["interval"]) for part in parts.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def runs_of(sweep: Path, arm: str) -> list[Run]:
    """The finished runs of an arm, in the order of the sweep. CheckpointError below two."""
    check_sweep(sweep)
    found = find_runs([sweep]).arms.get(arm, [])
    if len(found) < 2:
        raise CheckpointError(f"{sweep} holds {len(found)} runs of {arm}; name another arm")
    return found


def each_run(runs: Sequence[Run], measure: Callable[[Path], Measured]) -> list[Measured]:
    """What is measured of every run, one after the other, with a bar."""
    found = []
    with Display() as display, display.bar("runs", len(runs), "run") as bar:
        for done, run in enumerate(runs):
            found.append(measure(run.path))
            bar.update(done + 1)
    return found


def check_sweep(folder: Path) -> None:
    """CheckpointError unless it is the folder of a sweep."""
    if not (folder / SWEEP_FILE).is_file():
        raise CheckpointError(f"{folder} is not the folder of a sweep: no {SWEEP_FILE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--levels", default="", help="separated by commas; all unless given")
    parser.add_argument("--gcd", default=GCD, help="the arm that claim 4 is about")
    given = parser.parse_args()
    check_sweep(given.sweep)
    known = levels_of(given.sweep)
    levels = given.levels.split(",") if given.levels else known
    for level in levels:
        if level not in known:
            raise ConfigError(
                f"the sweep has no level {level!r}, but {', '.join(known) or 'none at all'}."
                f"{nearest(level, known)}"
            )
    found = find_runs([given.sweep])
    claims = {level: claims_of(found, level, given.gcd) for level in levels}
    every = [claim for own in claims.values() for claim in own]
    said = [line for level, own in claims.items() for line in remarks(found, level, own, given.gcd)]
    given.out.mkdir(parents=True, exist_ok=True)
    record = {
        "claims": [asdict(claim) for claim in every],
        "claim_4": {level: claim_4(own) for level, own in claims.items()},
        "token_spread": {
            level: token_spread(tokens_of(found, level, given.gcd)) for level in levels
        },
        "remarks": said,
    }
    (given.out / "claims.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    draw_claims(every, given.out / "claims.svg")
    print(table(every))
    print("\n" + "\n".join(said))


if __name__ == "__main__":
    run_guarded(main)
