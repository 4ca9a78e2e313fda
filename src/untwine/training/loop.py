"""The training loop: cold start, then iterations of rollout, credit, labels and update.

    groups  = collect(policy, tasks)          rollout.py
    groups  = credit(label(groups))           credit/, gcd/sources
    rows    = policy_rows(groups)             batch.py
    update  = L_policy + lambda * L_gcd       training/update.py, gcd/objectives

The loop knows no method by name: credit, labels and objective are looked up in their registries.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from untwine.batch import policy_rows
from untwine.config import LossConfig, Recipe
from untwine.credit import may_read_labels, trained_credit
from untwine.diagnose.online import Findings, OnlineDiagnosis
from untwine.errors import Interrupted, UntwineError
from untwine.gcd.entering import closed_parameters
from untwine.gcd.labels import only_from
from untwine.gcd.objectives import Exercise, Means, Objective, make_objective
from untwine.gcd.questions import why_no_questions
from untwine.gcd.shuffling import shuffle_labels
from untwine.gcd.sources import Bench, Labeller, costly
from untwine.progress import Display
from untwine.records import Group
from untwine.rollout import RolloutStats
from untwine.training.checking import check_recipe
from untwine.training.checkpoint import (
    Position,
    latest_checkpoint,
    list_checkpoints,
    load_extra,
    load_optimizer,
    load_weights,
    read_position,
    save_checkpoint,
)
from untwine.training.cold_start import ColdStart
from untwine.training.correction import Correction
from untwine.training.examination import examine
from untwine.training.measures import Measures, averaged, is_trained, rollout_measures
from untwine.training.mixing import DROWNED
from untwine.training.run_dir import RunDir, finish_replacing, metric_rows, replace_folder
from untwine.training.signals import StopRequest
from untwine.training.update import Updater
from untwine.workshop import TaskCursor, Workshop, read_splits, training_refs


def train(recipe: Recipe, run_path: Path, display: Display, *, resume: bool = False) -> Path:
    """Run a recipe in `run_path`; returns the folder of the trained model.

    resume   continue from the newest checkpoint in `run_path`, exactly
    Raises UntwineError subclasses; `Interrupted` after a signal, when everything has been saved.
    """
    with StopRequest(f"`untwine train --resume {run_path}`") as stop:
        return _Training(recipe, run_path, display, stop, resume).run()


class _Training:
    """State of one run, from the first expert episode to the last checkpoint."""

    def __init__(
        self, recipe: Recipe, path: Path, display: Display, stop: StopRequest, resume: bool
    ) -> None:
        self.recipe = recipe
        self.path = path
        self.display = display
        self.stop = stop
        check_recipe(recipe)
        self.credit = trained_credit(recipe.credit, recipe.gcd.taught)
        self.correction = Correction(recipe)
        splits = read_splits(recipe.env)
        refs = training_refs(recipe.env, splits, recipe.rl.variations)
        self.choices = random.Random(recipe.seed + 1)
        self.sampling = torch.Generator().manual_seed(recipe.seed + 2)
        self.checkpoint = latest_checkpoint(path) if resume else None
        self.start = read_position(self.checkpoint) if self.checkpoint else None
        if self.checkpoint is None:
            self.run_dir = RunDir.create(path, recipe)
        for name in ("model", "initial"):
            finish_replacing(_partial(path, name), path / name)
        try:
            # `initial` holds the policy as the iterations began: also the reference of the KL term
            begun = self.start is not None and self.start.stage == "rl"
            model = path / ("initial" if begun else "model") if resume else None
            self.workshop = Workshop(recipe, display, model, splits)
        except BaseException:
            if not resume:
                self.run_dir.close("failed")
            raise
        self.policy = self.workshop.policy
        self.collector = self.workshop.collector
        self.objective: Objective | None = None
        self.said: set[str] = set()
        self.cursor = TaskCursor(refs, recipe.seed)
        if self.start:
            first = self.start.step if self.start.stage == "rl" else 0
            self.run_dir = RunDir.resume(path, recipe, self.start.metric_lines, first)
            self.correction.learn(*metric_rows(path, "rl"))
        else:
            self._save_model()
        self.run_dir.describe(
            environment=self.workshop.info.title,
            splits=self.workshop.splits.checksum,
            model_parameters=self.policy.parameters,
        )

    def run(self) -> Path:
        status = "failed"
        try:
            with self.workshop:
                self.objective, self.labeller = self._method()
                if self.start is None or self.start.stage == "cold_start":
                    self._cold_start()
                self._iterate()
                self._save_model()
            status = "finished"
        except Interrupted:
            status = "interrupted"
            raise
        except UntwineError as error:
            if list_checkpoints(self.path / "checkpoints"):
                error.args = (
                    f"{error}; what was trained before is saved, go on with "
                    f"`untwine train --resume {self.path} KEY=VALUE`",
                )
            raise
        finally:
            self.run_dir.close(status)
        return self.path / "model"

    def _method(self) -> tuple[Objective | None, Labeller]:
        """What GCD needs; without an objective, labels are only those that cost nothing."""
        recipe, gcd = self.recipe, self.recipe.gcd
        means = Means(
            self.policy,
            self.collector.prompter,
            gcd,
            recipe.sampling.temperature,
        )
        objective = make_objective(gcd.objective, means)
        if objective is not None:  # said before the cold start, not after it
            closed_parameters(self.policy, gcd.gradient, gcd.from_layer)
        credit = recipe.credit
        direct = credit.penalty > 0 or bool(credit.veto) or may_read_labels(credit.name)
        used = objective is not None or direct
        names = [name for name in gcd.labels if used or not costly(name)]
        bench = Bench(
            recipe, self.workshop.pool, self.collector, self.path, self.display, self.stop.check
        )
        return objective, Labeller(names, bench, gcd.min_confidence)

    # Cold start

    def _cold_start(self) -> None:
        threads = torch.get_num_threads()
        if self.recipe.cold_start.threads:
            torch.set_num_threads(self.recipe.cold_start.threads)
        try:
            self._start()
        finally:
            torch.set_num_threads(threads)

    def _start(self) -> None:
        config = self.recipe.cold_start
        updater = Updater.of_recipe(
            self.policy,
            self.recipe,
            optimizer=config.optimizer,
            loss=LossConfig(),  # imitation keeps no copy of the model for a KL penalty
            total_steps=config.steps,
        )
        first = self._restore(updater, "cold_start")
        steps = config.steps if config.episodes else 0
        if first < steps:
            data = ColdStart(
                self.recipe,
                self.workshop.info,
                self.workshop.transcripts,
                self.policy,
                self.collector,
                self.choices,
            )
            self.display.line(
                f"cold start: {len(self.workshop.transcripts)} expert episodes, "
                f"{data.critic.size if data.critic else 0} verdicts, {steps} steps"
            )
            for said in data.remarks():
                self.display.line(f"[yellow]cold start:[/yellow] {said}")
            self._imitate(data, updater, first, steps)
        if steps or self.recipe.rl.iterations == 0:
            self._evaluate("cold_start", steps)

    def _imitate(self, data: ColdStart, updater: Updater, first: int, steps: int) -> None:
        with self.display.bar("cold start", steps, "step", first) as bar:
            for step in range(first, steps):
                started = time.perf_counter()
                measures = data.step(updater)
                seconds = time.perf_counter() - started
                self.run_dir.log("cold_start", step, **measures.values, seconds=seconds)
                bar.update(step + 1, info=f"loss {measures.values['loss']:.3f}")
                done = step + 1
                due = done % self.recipe.checkpoint.cold_start_every == 0 or done == steps
                if due or self.stop.requested:
                    self._save(updater, self._position("cold_start", done, updater))
                self.stop.check()

    # Reinforcement learning

    def _iterate(self) -> None:
        config = self.recipe.rl
        steps = config.iterations * config.epochs * config.minibatches
        updater = Updater.of_recipe(
            self.policy,
            self.recipe,
            total_steps=steps,
            gcd=self.recipe.gcd,
            module=self.objective.module if self.objective else None,
        )
        first = self._restore(updater, "rl")
        diagnosis = OnlineDiagnosis(self.recipe, self.path, self.collector)
        if config.iterations and (self.start is None or self.start.stage != "rl"):
            self._save_model("initial")
            self._save(updater, self._position("rl", 0, updater))
        every = self.recipe.evaluate.every
        done, used = first, self._budget_used()
        with self.display.bar("training", config.iterations, "iteration", first) as bar:
            for iteration in range(first, config.iterations):
                if used >= 1:
                    break
                before = self._position("rl", iteration, updater)
                try:
                    if every and iteration and iteration % every == 0:
                        self._evaluate("rl", iteration)
                    progress = max(iteration / max(config.iterations - 1, 1), used)
                    info = self._iteration(updater, diagnosis, iteration, progress)
                except Interrupted:  # nothing of this iteration has touched the weights yet
                    self._save(updater, before)
                    raise
                done = iteration + 1
                bar.update(done, info=info)
                used = self._budget_used()
                last = done == config.iterations or used >= 1
                due = done % self.recipe.checkpoint.every == 0 or last
                if due or self.stop.requested:
                    self._save(updater, self._position("rl", done, updater))
                self.stop.check()
        self.run_dir.describe(iterations=done)
        if config.iterations:
            self._evaluate("rl", done)

    def _budget_used(self) -> float:
        """Share of `rl.token_budget` that the iterations have used; 0 where there is none."""
        budget = self.recipe.rl.token_budget
        if not budget:
            return 0.0
        rows = metric_rows(self.path, "rl")
        keys = ("policy_tokens", "gcd_tokens")
        return float(sum(row.get(key) or 0 for row in rows for key in keys) / budget)

    def _iteration(
        self, updater: Updater, diagnosis: OnlineDiagnosis, iteration: int, progress: float
    ) -> str:
        """One iteration; `progress` is how much of the training is done, in [0, 1]."""
        recipe = self.recipe
        started = time.perf_counter()
        refs = self.cursor.take(recipe.rl.groups)
        shown = self.correction.decide(iteration, progress)
        groups, stats = self._collect(refs, iteration, shown.told)
        rolled = time.perf_counter()
        groups, label_counts = self.labeller.label(groups, iteration)
        groups = [self._credit(group) for group in groups]
        labelled = time.perf_counter()
        found = Findings()
        if diagnosis.due(iteration):
            budget = updater.microbatch_tokens
            found = diagnosis.measure(groups, iteration, budget, self.stop.check)
        diagnosed = time.perf_counter()
        measures, counts = self._update(updater, groups, iteration, progress)
        self.labeller.recorded(iteration, self.run_dir.save_groups(iteration, groups))
        values = {
            **rollout_measures(groups, stats, self.workshop.info),
            **self.correction.measures(shown, groups, self.workshop.info),
            **label_counts,
            **measures,
            **counts,
            **found.values,
            "seconds_rollout": rolled - started,
            "seconds_update": time.perf_counter() - diagnosed,
        }
        seconds = time.perf_counter() - started
        if found.values:
            values["diagnose_share"] = (diagnosed - labelled) / seconds
        self.run_dir.log("rl", iteration, **values)
        self.correction.learn(values)
        line = (
            f"outcome {values['outcome_mean']:.2f}  success {values['success_rate']:.2f}  "
            f"flawed {values['flawed_rate']:.2f}"
        ) + (f"  told {', '.join(shown.on)}" if shown.on else "")
        self.display.line(f"iteration {iteration}: {line}  ({seconds:.1f} s)")
        for said in found.lines(seconds):
            self.display.line(f"  {said}")
        if not values["groups_kept"]:
            self._say_once(
                "no spread",
                "[yellow]nothing to learn:[/yellow] in each of the "
                f"{len(groups)} groups of iteration {iteration} all episodes have the same return, "
                "so none is trained on; it takes tasks that are solved now and then, or larger "
                "groups",
            )
        return line

    def _collect(
        self, refs: Sequence[Any], iteration: int, told: Sequence[tuple[str, ...]]
    ) -> tuple[list[Group], RolloutStats]:
        size = self.recipe.rl.group_size
        with self.display.bar("  episodes", len(refs) * size, "episode") as bar:

            def on_turn(done: int, total: int) -> None:
                self.stop.check()
                bar.update(done, total)

            groups, stats = self.collector.collect(
                refs, size, self.sampling, prefix=f"{iteration:06d}-", told=told, on_turn=on_turn
            )
        returns = self.recipe.rl.returns
        return [dataclasses.replace(group, returns=returns) for group in groups], stats

    def _credit(self, group: Group) -> Group:
        if self.recipe.rl.drop_constant_groups and len(set(group.returns_G)) == 1:
            self._warn_of_dropped(group)
            return group.with_advantages([[None] * e.length for e in group.episodes])
        return self.credit(group)

    def _warn_of_dropped(self, group: Group) -> None:
        """Say once that credit tells steps apart in groups that are not trained on."""
        if "dropped" in self.said:  # so that the credit is not computed again
            return
        steps = [step for e in self.credit(group).episodes for step in e.steps]
        if len({step.advantage for step in steps}) > 1:
            self._say_once(
                "dropped",
                "[yellow]credit:[/yellow] groups whose returns are all equal are not trained on, "
                "though their steps differ in credit; rl.drop_constant_groups=false trains on them",
            )

    def _update(
        self, updater: Updater, groups: Sequence[Group], iteration: int, progress: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        rl, gcd = self.recipe.rl, self.recipe.gcd
        weight = 0.0
        if self.objective is not None:
            weight = gcd.weight * gcd.schedule.at(progress)
            groups = [only_from(group, gcd.taught) for group in groups]
            if gcd.shuffle_labels:
                seed = f"labels {self.recipe.seed} {iteration}"
                groups = shuffle_labels(groups, random.Random(seed))
        # Questions that follow replies go with their minibatch, all others with every one.
        follow = self.recipe.prompt.verdict == "after"
        taken: list[Measures] = []
        held = gcd.weight_of == "gradient"
        idle = held and not any(map(is_trained, groups))
        exercises = [] if follow or idle else [self._exercise(groups, weight, taken)]
        tokens, left_out = 0, False
        for _ in range(rl.epochs):
            for part in self._minibatches(groups):
                rows = policy_rows(part, self.recipe.loss.mean)
                tokens += sum(row.length for row in rows)
                if not rows and held:
                    left_out = True  # a share of no gradient is none, and nothing is asked
                    continue
                if follow:
                    exercises.append(self._exercise(part, weight, taken))
                if rows or exercises[-1]:
                    taken.append(updater.step(rows, exercises[-1], weight))
        found = averaged(taken)
        if (ratio := found.get("gcd_ratio", 0.0)) > DROWNED and gcd.weight_of == "loss":
            self._say_once(
                "drowned",
                f"[yellow]gcd:[/yellow] its gradient is {ratio:.1f} times that of the policy, so "
                "steps are mostly about verdicts; gcd.weight_of=gradient gcd.weight=0.3 holds it "
                "at .3",
            )
        asked = [Measures(dict(exercise.counts)) for exercise in exercises if exercise]
        if weight and not asked and not left_out:
            self._explain_none(groups, iteration)
        return found, {
            "policy_tokens": tokens,
            "verdicts": 0,
            **averaged(asked),
            "gcd_weight": weight,
            "optimizer_steps": updater.steps,
        }

    def _exercise(
        self, groups: Sequence[Group], weight: float, taken: list[Measures]
    ) -> Exercise | None:
        """What is learnt from these groups, nothing at weight 0; the time it took to make is added
        to `taken`."""
        if self.objective is None or not weight:
            return None
        started = time.perf_counter()
        episodes = [episode for group in groups for episode in group.episodes]
        exercise = self.objective.exercise(episodes, self.choices, self.sampling)
        taken.append(Measures({"seconds_gcd": time.perf_counter() - started}))
        return exercise

    def _explain_none(self, groups: Sequence[Group], iteration: int) -> None:
        """Say once why there is nothing to learn from labels."""
        episodes = (e for group in groups for e in group.episodes)
        why = why_no_questions(episodes, self.recipe.gcd.objective)
        self._say_once(
            "no questions",
            f"[yellow]gcd:[/yellow] nothing to learn from the labels of iteration {iteration}: "
            f"{why}",
        )

    def _say_once(self, what: str, text: str) -> None:
        if what not in self.said:
            self.said.add(what)
            self.display.line(text)

    def _minibatches(self, groups: Sequence[Group]) -> list[list[Group]]:
        """The groups in `rl.minibatches` random parts of about equal size."""
        parts = self.recipe.rl.minibatches
        if parts == 1:
            return [list(groups)]
        order = list(groups)
        self.choices.shuffle(order)
        return [order[k::parts] for k in range(parts) if order[k::parts]]

    # Evaluation, saving, restoring

    def _evaluate(self, phase: str, step: int) -> None:
        examine(self.workshop, self.run_dir, phase, step, self.stop.check)

    def _position(self, stage: Any, step: int, updater: Updater) -> Position:
        return Position(
            stage=stage,
            step=step,
            optimizer_steps=updater.steps,
            cursor=self.cursor.position,
            sampling=self.sampling.get_state(),
            choices=self.choices.getstate(),
            metric_lines=self.run_dir.metric_lines,
        )

    def _save(self, updater: Updater, position: Position) -> None:
        save_checkpoint(
            self.path / "checkpoints",
            self.policy.model,
            updater.optimizer,
            position,
            self.recipe.checkpoint.keep,
            updater.extra_state(),
        )

    def _restore(self, updater: Updater, stage: str) -> int:
        """Take up the checkpoint if it belongs to this stage; the step to begin with."""
        if self.start is None or self.checkpoint is None or self.start.stage != stage:
            return 0
        load_weights(self.checkpoint, self.policy.model)
        updater.load_extra_state(load_extra(self.checkpoint))
        load_optimizer(self.checkpoint, updater.optimizer)
        updater.steps = self.start.optimizer_steps
        self.cursor.position = self.start.cursor
        self.sampling.set_state(self.start.sampling)
        self.choices.setstate(self.start.choices)
        return self.start.step

    def _save_model(self, name: str = "model") -> None:
        scratch = _partial(self.path, name)
        self.policy.save(scratch)
        replace_folder(scratch, self.path / name)


def _partial(run: Path, name: str) -> Path:
    return run / f".{name}-partial"
