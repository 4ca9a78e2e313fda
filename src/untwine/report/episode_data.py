"""Turn recorded groups into the plain values that the episode browser shows.

A run records far more text than a page should carry, so whole groups are taken in order until a
budget of bytes is spent; what was left out is counted and said on the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untwine.errors import UntwineError
from untwine.records import Episode, Group, Step
from untwine.report.microscope_view import Marks
from untwine.report.run_data import RunData, load_groups

MEASURED = 4
LONGEST_TEXT = 6000
"""Characters of one text that are kept."""


@dataclass
class EpisodeData:
    """Embedded episodes, how many were recorded in the chosen iterations, and what went wrong."""

    episodes: list[dict[str, Any]]
    recorded: int
    iterations: list[int]
    files: int
    problems: list[str]


def choose_iterations(
    files: Sequence[tuple[int, Path]], measured: Iterable[int] = ()
) -> list[tuple[int, Path]]:
    """The first, the middle and the last recorded iteration (fewer when there are fewer), and the
    last `MEASURED` of the `measured` ones."""
    if not files:
        return []
    places = {iteration: place for place, (iteration, _) in enumerate(files)}
    known = sorted(places[iteration] for iteration in set(measured) & places.keys())
    chosen = {0, (len(files) - 1) // 2, len(files) - 1, *known[-MEASURED:]}
    return [files[place] for place in sorted(chosen)]


def collect_episodes(
    runs: Sequence[RunData],
    budget: int,
    marks: Sequence[Mapping[int, Marks]] = (),
    read: Callable[[Path], list[Group]] | None = None,
) -> list[EpisodeData]:
    """Episodes of every run, of about `budget` bytes in all.

    marks  for each run, what the microscope says of the steps of an iteration

    The budget is shared evenly by the chosen iterations of all runs; what one does not need goes
    to the ones after it.
    """
    read = read or load_groups
    marks = marks or [{} for _ in runs]
    chosen = [choose_iterations(run.episodes, own) for run, own in zip(runs, marks, strict=True)]
    slots, left = sum(map(len, chosen)), budget
    results = []
    for run_index, (run, files) in enumerate(zip(runs, chosen, strict=True)):
        result = EpisodeData([], 0, [], len(run.episodes), [])
        for iteration, path in files:
            share, slots = left // slots, slots - 1
            try:
                groups = read(path)
            except (UntwineError, OSError, ValueError, KeyError, EOFError) as error:
                result.problems.append(f"Episodes of iteration {iteration} are unreadable: {error}")
                continue
            own = marks[run_index].get(iteration)
            if own is not None and not own.learn(groups):
                result.problems.append(
                    f"diagnose/coupling.json was measured on other episodes of iteration "
                    f"{iteration} than those recorded now."
                )
            episodes, used = take_episodes(
                groups, share, run=run_index, iteration=iteration, marks=own
            )
            left -= used
            result.episodes.extend(episodes)
            result.recorded += sum(len(group.episodes) for group in groups)
            result.iterations.append(iteration)
        results.append(result)
    return results


def take_episodes(
    groups: Sequence[Group],
    budget: int,
    *,
    run: int = 0,
    iteration: int = 0,
    marks: Marks | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Leading episodes of `groups` that fit in `budget` bytes, and the bytes they take. Groups with
    steps that were measured come before the others when there is not room for all."""
    order = sorted(range(len(groups)), key=lambda g: not (marks and marks.concerns(groups[g])))
    taken: list[dict[str, Any]] = []
    used = 0
    for group_index in order:
        for episode in groups[group_index].episodes:
            plain = plain_episode(episode, marks)
            plain |= {"run": run, "iteration": iteration, "group": group_index}
            size = len(json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace"))
            if used + size > budget:
                return sorted(taken, key=lambda e: int(e["group"])), used
            taken.append(plain)
            used += size
    return sorted(taken, key=lambda e: int(e["group"])), used


def plain_episode(episode: Episode, marks: Marks | None = None) -> dict[str, Any]:
    """One episode as JSON values; the keys are those that `episodes.js` reads."""
    steps, seen = [], None
    for step in episode.steps:
        measured = marks.of_step(episode, step) if marks else {}
        steps.append(_plain_step(step, seen) | measured)
        seen = step.feedback
    return {
        "id": episode.id,
        "task": episode.ref.task,
        "ref": str(episode.ref),
        "goal": _cut(episode.goal),
        "outcome": round(episode.outcome, 4),
        "score": round(episode.score, 4),
        "success": episode.success,
        "ended": episode.ended,
        "flawed": sum(_flawed(step) for step in episode.steps),
        **({"told": [_cut(text) for text in episode.told]} if episode.told else {}),
        "steps": steps,
    }


def _plain_step(step: Step, seen: str | None) -> dict[str, Any]:
    """Keys without a value are left out; so is an observation that repeats the last feedback."""
    plain: dict[str, Any] = {
        "index": step.index,
        "observation": None if step.observation == seen else _cut(step.observation),
        "thought": _cut(step.thought) if step.thought else None,
        "command": None if step.command is None else _cut(step.command),
        "raw": _cut(step.text) if step.command is None else None,
        "invalid": step.invalid,
        "feedback": _cut(step.feedback),
        "score": round(step.score, 4),
        "reward": round(step.reward, 4),
        "advantage": None if step.advantage is None else round(step.advantage, 4),
        "logprob": round(sum(step.logprobs) / len(step.logprobs), 3) if step.logprobs else None,
        "tokens": len(step.action_ids),
        "labels": [
            {
                "verdict": label.verdict,
                "kind": label.kind,
                "source": label.source,
                "confidence": round(label.confidence, 3),
            }
            for label in step.labels
        ],
    }
    return {key: value for key, value in plain.items() if value not in (None, [])}


def _flawed(step: Step) -> bool:
    return any(label.verdict == "flawed" for label in step.labels)


def _cut(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT} characters left out)"
