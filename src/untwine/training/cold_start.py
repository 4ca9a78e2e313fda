"""Cold start: imitation of expert episodes, mixed with verdict data from the same episodes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from untwine.batch import Row, imitation_rows
from untwine.config import Recipe
from untwine.demonstrations import Transcript, demonstration
from untwine.envs.protocol import EnvInfo
from untwine.gcd.labels import label_group
from untwine.gcd.verdicts import VerdictWords, verdict_samples
from untwine.policy.choices import CommandChoices
from untwine.prompting.prompter import Prompter
from untwine.records import Episode, Group
from untwine.training.update import Measures, Updater


class ColdStart:
    """Draws the batches of the cold start; its only state is the generator it is given."""

    def __init__(
        self,
        recipe: Recipe,
        info: EnvInfo,
        transcripts: Sequence[Transcript],
        prompter: Prompter,
        words: VerdictWords,
        choices: CommandChoices | None,
        rng: random.Random,
    ) -> None:
        self._config = recipe.cold_start
        self._rng = rng
        noisy = self._config.imitate_noise
        episodes = [
            demonstration(t, prompter, imitate_noise=noisy, choices=choices) for t in transcripts
        ]
        self.rows: list[Row] = [
            row for e in episodes for row in imitation_rows(e, self._config.text_weight)
        ]
        self.verdicts: list[Row] = []
        if self._config.verdict_weight > 0:
            judged = [_judged(e, info) for e in episodes]
            samples = verdict_samples(judged, prompter, 10**12, random.Random(recipe.seed))
            self.verdicts = words.rows(samples) if samples else []

    def step(self, updater: Updater) -> Measures:
        """One optimizer step on freshly drawn rows."""
        rows = _draw(self.rows, self._config.batch_tokens, self._rng)
        verdicts = _draw(self.verdicts, self._config.batch_tokens // 4, self._rng)
        scale = len(self.verdicts) / len(verdicts) if verdicts else 0.0
        return updater.imitate(rows, _rescaled(verdicts, scale), self._config.verdict_weight)


def _judged(episode: Episode, info: EnvInfo) -> Episode:
    """The episode with its own labels, and those of the rules for flawed noise steps without."""
    ruled = label_group(Group(episode.ref, (episode,)), ["rule"], info).episodes[0]
    labels = [
        own.labels or tuple(x for x in by_rule.labels if x.verdict == "flawed")
        for own, by_rule in zip(episode.steps, ruled.steps, strict=True)
    ]
    return Group(episode.ref, (episode,)).with_labels([labels]).episodes[0]


def _draw(rows: Sequence[Row], tokens: int, rng: random.Random) -> list[Row]:
    """Random rows with about `tokens` tokens, at least one."""
    drawn: list[Row] = []
    used = 0
    while rows and (not drawn or used < tokens):
        row = rng.choice(rows)
        drawn.append(row)
        used += row.length
    return drawn


def _rescaled(rows: Sequence[Row], scale: float) -> list[Row]:
    """Rows whose weights sum to 1 again after drawing some of them."""
    return [dataclasses.replace(row, weights=row.weights * scale) for row in rows]
