"""Prompt-based correction: which sentences are on, and which groups are told them.

A sentence against a kind of flawed action comes in when that kind is frequent and goes out when it
has become rare (method section 8; docs/methods/correction.md). What is decided depends on the
recipe, the number of the iteration and the metrics of the iterations before only, so a resumed run
decides alike.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from untwine.config import CorrectionConfig, Recipe
from untwine.envs.protocol import EnvInfo
from untwine.evaluate.protocol import step_measures
from untwine.prompting.corrections import instructions
from untwine.records import Group

Row = Mapping[str, Any]


class Instructed(NamedTuple):
    """What an iteration shows.

    on     kinds whose sentences are on
    share  share of the groups that are told, before it is rounded at random
    told   for each group, its sentences
    """

    on: tuple[str, ...]
    share: float
    told: tuple[tuple[str, ...], ...]


class Correction:
    """Decides for the iterations of one run."""

    def __init__(self, recipe: Recipe) -> None:
        """ConfigError when a kind is unknown or a sentence empty."""
        self._config = recipe.correction
        self._seed = recipe.seed
        self._groups = recipe.rl.groups
        self._sentences = instructions(recipe.correction)
        self._rows: deque[Row] = deque(maxlen=self._config.window)

    def learn(self, *rows: Row) -> None:
        """Take in the metrics of iterations that are done, in order."""
        self._rows.extend(rows)

    def decide(self, iteration: int, progress: float) -> Instructed:
        """What the groups of an iteration are told.

        progress   how much of the training is done, in [0, 1]
        """
        share = share_told(self._config, progress)
        on = switched_on(self._config, list(self._rows)) if share > 0 else ()
        sentences = tuple(text for kind, text in self._sentences.items() if kind in on)
        chosen: set[int] = set()
        if sentences:
            rng = random.Random(f"correction {self._seed} {iteration}")
            whole, rest = divmod(share * self._groups, 1)
            chosen = set(rng.sample(range(self._groups), int(whole) + (rng.random() < rest)))
        told = tuple(sentences if g in chosen else () for g in range(self._groups))
        return Instructed(on, share, told)

    def measures(self, shown: Instructed, groups: Sequence[Group], info: EnvInfo) -> dict[str, Any]:
        """Metrics of an iteration (docs/run-directory.md); none where the recipe has no kinds.

        Shares of steps of every kind are given apart for the groups that were told something and
        for those that were told nothing.
        """
        kinds = self._config.kinds
        if not kinds:
            return {}
        values: dict[str, Any] = {
            "correction_on": {kind: int(kind in shown.on) for kind in kinds},
            "correction_share": shown.share,
            "correction_groups": sum(bool(group.told) for group in groups),
            "correction_steps": {},
            "correction_success": {},
        }
        for name in ("told", "plain"):
            own = [group for group in groups if bool(group.told) == (name == "told")]
            episodes = [episode for group in own for episode in group.episodes]
            if episodes:
                found = step_measures(own, info)["flawed_kinds"]
                values[f"correction_{name}"] = {**dict.fromkeys(self._sentences, 0.0), **found}
                values["correction_steps"][name] = sum(e.length for e in episodes)
                solved = sum(e.success for e in episodes)
                values["correction_success"][name] = solved / len(episodes)
        return values


def share_told(config: CorrectionConfig, progress: float) -> float:
    """Share of the groups that are told: `share`, or falling linearly from it to 0 at the progress
    `anneal`, and 0 from there on."""
    left = 1.0 - progress / config.anneal if config.anneal else 1.0
    return config.share * min(max(left, 0.0), 1.0)


def switched_on(config: CorrectionConfig, rows: Sequence[Row]) -> tuple[str, ...]:
    """Kinds whose sentences are on after these iterations, the last of which says what was on.

    A kind comes in at a frequency of at least `above`, and goes out under `below`.
    """
    before = rows[-1].get("correction_on", {}) if rows else {}
    on = []
    for kind in config.kinds:
        found = frequency(kind, rows)
        least = config.below if before.get(kind) else config.above
        if found is not None and found >= least:
            on.append(kind)
    return tuple(on)


def frequency(kind: str, rows: Sequence[Row]) -> float | None:
    """Flawed steps of this kind per step over the episodes of these iterations that were told
    nothing, or, where there is none such, over those that were told something. None where nothing
    is known."""
    for name in ("plain", "told"):
        known = [row for row in rows if f"correction_{name}" in row]
        steps = sum(row["correction_steps"][name] for row in known)
        if steps:
            counted = (
                row[f"correction_{name}"].get(kind, 0.0) * row["correction_steps"][name]
                for row in known
            )
            return float(sum(counted) / steps)
    return None
