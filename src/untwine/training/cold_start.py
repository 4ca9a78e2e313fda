"""Cold start: imitation of expert episodes, mixed with verdict data from the same episodes at a
stated ratio of tokens.

What an agent does rarely it learns late, or not at all: one step in ten takes something, and only
there can be learnt what to take. Lessons are a curriculum against that (docs/log.md): first steps
that imitate certain commands only, each equally often. The rest of their episodes is context.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from untwine.batch import Row, imitation_rows
from untwine.config import Recipe
from untwine.demonstrations import Transcript, demonstration
from untwine.envs.protocol import EnvInfo
from untwine.errors import ConfigError
from untwine.gcd.labels import label_group
from untwine.gcd.objectives.cross_entropy import CrossEntropy
from untwine.gcd.objectives.protocol import Means
from untwine.gcd.questions import PAIRS, VERDICTS
from untwine.policy.loading import Policy
from untwine.prompting.corrections import instructions
from untwine.records import Episode, Group, Step
from untwine.rollout import Collector
from untwine.training.measures import Measures
from untwine.training.update import Updater

_QUIZZES = {"generative/ce": VERDICTS, "pairwise": PAIRS}


class ColdStart:
    """Draws the batches of the cold start; its only state is the generator it is given."""

    def __init__(
        self,
        recipe: Recipe,
        info: EnvInfo,
        transcripts: Sequence[Transcript],
        policy: Policy,
        collector: Collector,
        rng: random.Random,
    ) -> None:
        self._config = recipe.cold_start
        self._rng = rng
        prompter, choices = collector.prompter, collector.choices
        noisy = self._config.imitate_noise

        def played(transcript: Transcript, told: tuple[str, ...] = ()) -> Episode:
            return demonstration(
                transcript, prompter, imitate_noise=noisy, choices=choices, told=told
            )

        episodes = [played(transcript) for transcript in transcripts]
        sentences = instructed(episodes, info, recipe)
        told = [played(*entry) for entry in zip(transcripts, sentences, strict=True) if entry[1]]
        _check_room(episodes, recipe)
        self._episodes = [*episodes, *told]
        self.rows = self._rows_of(self._episodes)
        self._taught: dict[str, list[Row]] = {}
        for word in {word: None for lesson in self._config.lessons for word in lesson.commands}:
            self._taught[word] = self._only(word)
        self.verdicts: list[Row] = []
        self._objective: CrossEntropy | None = None
        if self._config.verdict_weight > 0 and self._config.verdict_share > 0:
            means = Means(policy, prompter, recipe.gcd)
            self._objective = CrossEntropy(means, _QUIZZES[self._config.objective])
            judged = [_judged(e, info) for e in episodes]
            self.verdicts = self._objective.rows(judged, 10**12, random.Random(recipe.seed))

    def step(self, updater: Updater) -> Measures:
        """One optimizer step on freshly drawn rows."""
        config = self._config
        rows = _draw(self._pools(updater.steps), config.batch_tokens, self._rng)
        drawn = _draw([self.verdicts], int(config.batch_tokens * config.verdict_share), self._rng)
        exercise = None
        if drawn and self._objective is not None:
            scale = len(self.verdicts) / len(drawn)
            exercise = self._objective.drawn(_rescaled(drawn, scale))
        return updater.imitate(rows, exercise, config.verdict_weight)

    def _pools(self, step: int) -> list[list[Row]]:
        """What step number `step` draws from, each pool equally often."""
        for lesson in self._config.lessons:
            if step < lesson.steps:
                return [self._taught[word] for word in lesson.commands]
            step -= lesson.steps
        return [self.rows]

    def _rows_of(self, episodes: Sequence[Episode]) -> list[Row]:
        return [row for e in episodes for row in imitation_rows(e, self._config.text_weight)]

    def _only(self, word: str) -> list[Row]:
        """Rows that imitate commands with this first word. ConfigError when there are none."""
        rows = self._rows_of([_masked(episode, word) for episode in self._episodes])
        if not rows:
            imitated = {_first_word(s) for e in self._episodes for s in e.steps if s.advantage}
            raise ConfigError(
                f"cold_start.lessons names {word!r}, and no expert step to imitate begins so; they "
                f"begin with: {', '.join(sorted(imitated))}"
            )
        return rows


def instructed(episodes: Sequence[Episode], info: EnvInfo, recipe: Recipe) -> list[tuple[str, ...]]:
    """What a second copy of each expert episode is told; nothing where there is no copy
    (docs/methods/correction.md).

    A share `cold_start.instructed` of the episodes, drawn at random, has a copy that is told not to
    do what its imitated steps do not do: each such kind with probability one half, and at least
    one. So a policy that imitates errors learns what the sentences mean.
    """
    share = recipe.cold_start.instructed
    sentences = instructions(recipe.correction) if share else {}
    rng = random.Random(f"instructed {recipe.seed}")
    told: list[tuple[str, ...]] = []
    for episode in episodes:
        chosen: list[str] = []
        if sentences and rng.random() < share:
            ruled = label_group(Group(episode.ref, (episode,)), ["rule"], info).episodes[0]
            pairs = zip(episode.steps, ruled.steps, strict=True)
            shown = {
                x.kind
                for own, by_rule in pairs
                if own.advantage is not None
                for x in by_rule.labels
            }
            free = [kind for kind in sentences if kind not in shown]
            chosen = [kind for kind in free if rng.random() < 0.5]
            chosen = chosen or [rng.choice(free)] if free else []
        told.append(tuple(sentences[kind] for kind in chosen))
    return told


def _check_room(episodes: Sequence[Episode], recipe: Recipe) -> None:
    """ConfigError when replies with tags are longer than the policy may ever write."""
    longest = max((len(s.action_ids) for e in episodes for s in e.steps), default=0)
    if recipe.prompt.tags and longest > recipe.sampling.max_new_tokens:
        raise ConfigError(
            f"with their tags the expert's replies have up to {longest} tokens; raise "
            f"sampling.max_new_tokens (now {recipe.sampling.max_new_tokens}) to {longest} or more"
        )


def _first_word(step: Step) -> str:
    return (step.command or "").partition(" ")[0]


def _masked(episode: Episode, word: str) -> Episode:
    """The episode with no advantage but at commands with this first word."""
    steps = [
        step if _first_word(step) == word else dataclasses.replace(step, advantage=None)
        for step in episode.steps
    ]
    return dataclasses.replace(episode, steps=tuple(steps))


def _judged(episode: Episode, info: EnvInfo) -> Episode:
    """The episode with its own labels, and those of the rules for flawed noise steps without."""
    ruled = label_group(Group(episode.ref, (episode,)), ["rule"], info).episodes[0]
    labels = [
        own.labels or tuple(x for x in by_rule.labels if x.verdict == "flawed")
        for own, by_rule in zip(episode.steps, ruled.steps, strict=True)
    ]
    return Group(episode.ref, (episode,)).with_labels([labels]).episodes[0]


def _draw(pools: Sequence[Sequence[Row]], tokens: int, rng: random.Random) -> list[Row]:
    """Random rows with about `tokens` tokens, at least one where there are any; every pool is as
    likely as the others."""
    drawn: list[Row] = []
    used = 0
    filled = [pool for pool in pools if pool]
    while filled and (not drawn or used < tokens):
        row = rng.choice(filled[0] if len(filled) == 1 else rng.choice(filled))
        drawn.append(row)
        used += row.length
    return drawn


def _rescaled(rows: Sequence[Row], scale: float) -> list[Row]:
    """Rows whose weights sum to 1 again after drawing some of them."""
    return [dataclasses.replace(row, weights=row.weights * scale) for row in rows]
