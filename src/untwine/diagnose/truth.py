"""`untwine diagnose truth`: the true advantage of steps of a run, beside its episodes."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from untwine.config import Recipe
from untwine.diagnose.branching import Brancher, Estimate, Occurrence, Settings
from untwine.diagnose.population import (
    RecordedStep,
    Stratum,
    action_logprobs,
    draw_steps,
    recorded_steps,
)
from untwine.diagnose.recorded import episode_file, load_recorded_policy, read_recorded
from untwine.diagnose.restoring import Mismatch, restore_points
from untwine.diagnose.truth_file import Truth, TruthRow, checksum, truth_path, write_truth
from untwine.gcd.labels import action_key
from untwine.policy.sampler import Sample
from untwine.progress import Display
from untwine.records import Episode
from untwine.rollout import Collector, Start
from untwine.workshop import make_collector, open_pool

Question = list[RecordedStep]  # steps with the same action in the same state, judged as one


@dataclass(frozen=True, slots=True)
class Draw:
    """Which steps are judged.

    steps       how many are drawn
    stratified  empty: every step with the same chance; else `kind` or `position`
    pooled      judge steps with the same action in the same state together
    """

    steps: int = 64
    stratified: Stratum = ""
    pooled: bool = True


def find_truth(
    run: Path,
    recipe: Recipe,
    draw: Draw,
    settings: Settings,
    display: Display,
    *,
    iteration: int | None = None,
    checkpoint: str = "",
) -> Truth:
    """Judge steps of one iteration, write the truth file and return what is in it.

    iteration   by default the last one whose policy is still there
    checkpoint  the policy that plays on; by default the one that played the episodes
    """
    iteration, file = episode_file(run, iteration, with_policy=not checkpoint)
    policy = load_recorded_policy(run, recipe, iteration, checkpoint).policy
    settings = dataclasses.replace(settings, returns=recipe.rl.returns)
    with open_pool(recipe.env, list_commands=recipe.lists_commands) as pool:
        population = recorded_steps(read_recorded(file, recipe), pool.info)
        drawn = draw_steps(population, draw.steps, random.Random(settings.seed), draw.stratified)
        finder = TruthFinder(recipe, make_collector(policy, pool, recipe), settings, display)
        rows = finder.rows(drawn, questions(population, drawn, draw.pooled))
    header = truth_header(iteration, file, settings, draw, len(population), finder, rows)
    header["checkpoint"] = checkpoint
    truth = Truth(header, tuple(rows))
    write_truth(truth_path(run, iteration), truth)
    return truth


def truth_header(
    iteration: int,
    file: Path,
    settings: Settings,
    draw: Draw,
    population: int,
    finder: TruthFinder,
    rows: Sequence[TruthRow],
) -> dict[str, Any]:
    """The first line of a truth file about the episodes in `file`."""
    return {
        "iteration": iteration,
        "episodes_sha256": checksum(file),
        "checkpoint": "",
        "settings": dataclasses.asdict(settings),
        "draw": dataclasses.asdict(draw),
        "population": population,
        **finder.report(),
        **summary(rows, settings.error),
    }


def summary(rows: Sequence[TruthRow], error: float) -> dict[str, Any]:
    """Counts of labels, their shares of all steps, and how many flawed ones chance alone could
    give: each interval's upper end is wrong with probability at most error / 2, so at most that
    share of the steps that are not flawed, which all of them might be."""
    weight = math.fsum(row.weight for row in rows)
    found = {}
    for label in ("flawed", "neutral", "good"):
        own = [row for row in rows if row.label == label]
        share = math.fsum(row.weight for row in own) / weight if weight else 0.0
        found[label] = {"steps": len(own), "share": share}
    return {
        "labels": found,
        "steps": len(rows),
        "actions": len({(r.group, r.state_key, r.action) for r in rows}),
        "unclear": sum(not row.clear for row in rows),
        "flawed_by_chance": error / 2 * len(rows),
    }


def questions(
    population: Sequence[RecordedStep],
    drawn: Sequence[tuple[RecordedStep, float]],
    pooled: bool,
) -> list[Question]:
    """The drawn steps, each alone or (`pooled`) with all equal ones of the population."""
    if not pooled:
        return [[step] for step, _ in drawn]
    alike: dict[Any, Question] = defaultdict(list)
    for step in population:
        alike[step.pair].append(step)
    return [alike[pair] for pair in dict.fromkeys(step.pair for step, _ in drawn)]


class TruthFinder:
    """Restores, branches, and puts the answers into rows."""

    def __init__(
        self,
        recipe: Recipe,
        collector: Collector,
        settings: Settings,
        display: Display,
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        """collector: plays on; nothing else may use its pool meanwhile.
        on_progress: called now and then; may raise to stop."""
        self.recipe = recipe
        self.settings = settings
        self.display = display
        self.collector = collector
        self.on_progress = on_progress
        self.brancher = Brancher(self.collector, settings)
        self.mismatches: list[Mismatch] = []
        self.replayed = 0
        self.left_out = 0
        self.policy_gap = 0.0

    def rows(
        self, drawn: Sequence[tuple[RecordedStep, float]], questions: Sequence[Question]
    ) -> list[TruthRow]:
        """One row for each drawn step that could be judged, in order."""
        occurrences = self._occurrences([step for question in questions for step in question])
        open_questions = [
            (question, found)
            for question in questions
            if (found := [occurrences[at] for s in question if (at := _at(s)) in occurrences])
        ]
        with self.display.bar("branching", len(open_questions), "action") as bar:

            def on_progress(done: int, total: int) -> None:
                bar.update(done, total)
                if self.on_progress:
                    self.on_progress()

            answers = self.brancher.estimate([found for _, found in open_questions], on_progress)
        estimates: dict[tuple[str, int], tuple[Estimate, int]] = {}
        for (question, found), answer in zip(open_questions, answers, strict=True):
            if answer is not None:
                estimates |= {_at(step): (answer, len(found)) for step in question}
        rows = []
        for step, weight in drawn:
            if _at(step) in estimates and _at(step) in occurrences:
                rows.append(_row(step, weight, *estimates[_at(step)]))
        self.left_out = len(drawn) - len(rows)
        return rows

    def report(self) -> dict[str, Any]:
        """What was done, and what went wrong, for the header."""
        stats = self.brancher.stats
        return {
            "replayed_episodes": self.replayed,
            "mismatches": [dataclasses.asdict(m) for m in self.mismatches],
            "steps_left_out": self.left_out,
            "policy_gap": self.policy_gap,
            "branches_played": self.brancher.episodes,
            "env_steps": stats.env_steps,
            "sampled_tokens": stats.sampled_tokens,
            "computed_tokens": stats.computed_tokens + self.brancher.computed_tokens,
        }

    def _occurrences(self, steps: Sequence[RecordedStep]) -> dict[tuple[str, int], Occurrence]:
        """Every step that could be verified, with its probability under this policy."""
        by_episode: dict[str, tuple[Episode, list[int]]] = {}
        for step in steps:
            by_episode.setdefault(step.episode.id, (step.episode, []))[1].append(step.t)
        starts, self.mismatches = restore_points(
            self.collector.pool, self.collector.prompter, list(by_episode.values())
        )
        self.replayed = len(by_episode)
        logprobs = action_logprobs(
            self.collector.policy,
            [step.step for step in steps],
            self.recipe.sampling.temperature,
            self.recipe.rl.microbatch_tokens,
        )
        gaps = [
            abs(math.fsum(step.step.logprobs) - logprob)
            for step, logprob in zip(steps, logprobs, strict=True)
        ]
        self.policy_gap = max(gaps, default=0.0)
        return {
            _at(step): _occurrence(step, starts[_at(step)], logprob)
            for step, logprob in zip(steps, logprobs, strict=True)
            if _at(step) in starts
        }


def _at(step: RecordedStep) -> tuple[str, int]:
    return step.episode.id, step.t


def _occurrence(step: RecordedStep, start: Start, logprob: float) -> Occurrence:
    played = step.step
    action = Sample(played.action_ids, played.logprobs, played.allowed)
    return Occurrence(start, action, played.admissible, min(1.0, math.exp(logprob)))


def _row(step: RecordedStep, weight: float, found: Estimate, shared: int) -> TruthRow:
    played = step.step
    return TruthRow(
        group=step.group,
        episode=step.episode.id,
        step=step.t,
        ref=str(step.episode.ref),
        state_key=played.state_key,
        action=action_key(played),
        kind=step.kind,
        position=step.position,
        weight=weight,
        shared=shared,
        **{f.name: getattr(found, f.name) for f in dataclasses.fields(Estimate)},
    )
