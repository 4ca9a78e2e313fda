"""Cold start: imitation of expert episodes, mixed with verdict data from the same episodes at a
stated ratio of tokens.

What an agent does rarely it learns late, or not at all: one step in ten takes something, and only
there can be learnt what to take. Lessons are a curriculum against that (docs/log.md): first steps
that imitate certain commands only, each equally often. The rest of their episodes is context.
Where one row holds a whole episode (`append` layout) that context is most of the cost, and rare
commands are better given more weight (`cold_start.balance`).
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from untwine.batch import imitation_rows
from untwine.config import Recipe
from untwine.demonstrations import Transcript, demonstration
from untwine.envs.protocol import EnvInfo
from untwine.envs.wandering import first_word
from untwine.errors import ConfigError
from untwine.gcd.labels import label_group
from untwine.gcd.objectives.cross_entropy import CrossEntropy
from untwine.gcd.objectives.protocol import Means
from untwine.gcd.questions import PAIRS, VERDICTS
from untwine.policy.loading import Policy
from untwine.prompting.corrections import instructions
from untwine.records import Episode, Group, Step
from untwine.rollout import Collector
from untwine.training.critic import (
    FEW,
    Alongside,
    Apart,
    Critic,
    Sample,
    alternatives,
    draw,
    judged,
)
from untwine.training.measures import Measures
from untwine.training.update import Updater

Entry = tuple[Transcript, tuple[str, ...]]
"""A transcript, and what its prompts tell besides."""

_QUIZZES = {"generative/ce": VERDICTS, "pairwise": PAIRS}


class ColdStart:
    """Draws the batches of the cold start; its only state is the generator it is given.

    episodes  what is imitated, where a step has an advantage
    cut       how many expert episodes end where their tokens would exceed what fits
    """

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
            episode = demonstration(
                transcript, prompter, imitate_noise=noisy, choices=choices, told=told
            )
            return judged(episode, info, imitate_noise=noisy)

        longest = min(policy.max_positions, recipe.rl.microbatch_tokens)

        def fitted(entries: Sequence[Entry]) -> tuple[list[Entry], list[Episode], int]:
            """The entries up to where no more fits, played, and how many end there."""
            episodes = [played(*entry) for entry in entries]
            _check_room(episodes, recipe)
            fitting = [
                (_cut(transcript, episode, longest), told)
                for (transcript, told), episode in zip(entries, episodes, strict=True)
            ]
            cut = sum(a is not b for (a, _), (b, _) in zip(entries, fitting, strict=True))
            if not cut:
                return fitting, episodes, 0
            fitting = [entry for entry in fitting if entry[0].moves]
            return fitting, [played(*entry) for entry in fitting], cut

        plain, episodes, self.cut = fitted([(transcript, ()) for transcript in transcripts])
        transcripts = [transcript for transcript, _ in plain]
        if not episodes:
            raise ConfigError(
                f"no step of an expert fits into {longest} tokens, the positions of the model or "
                "rl.microbatch_tokens; use a longer model, raise the budget, or shorten prompts"
            )
        sentences = instructed(episodes, info, recipe)
        again = [entry for entry in zip(transcripts, sentences, strict=True) if entry[1]]
        again, told, _ = fitted(again)  # their prompts are longer
        self.episodes = [*episodes, *told]
        self._looks = [
            [move.command.looks for move in transcript.moves]
            for transcript in [*transcripts, *(transcript for transcript, _ in again)]
        ]
        self._weights = _step_weights(self.episodes, self._looks, self._config.balance)
        self.samples = self._samples(self.episodes)
        self._taught: dict[str, list[list[Sample]]] = {}
        for word in {word: None for lesson in self._config.lessons for word in lesson.commands}:
            self._taught[word] = self._only(word)
        self.critic: Critic | None = None
        if self._config.verdict_weight > 0 and self._config.verdict_share > 0:
            means = Means(policy, prompter, recipe.gcd)
            objective = CrossEntropy(means, _QUIZZES[self._config.objective])
            sources = [*transcripts, *(transcript for transcript, _ in again)]
            after = recipe.prompt.verdict == "after"
            asked = self.episodes if after else episodes  # told copies ask the same apart
            copies = [
                [episode, *alternatives(episode, transcript, prompter)]
                for episode, transcript in zip(asked, sources, strict=False)
            ]
            if after:
                self.critic = Alongside(objective, copies, self._config.verdict_share)
            else:
                tokens = int(self._config.batch_tokens * self._config.verdict_share)
                self.critic = Apart(objective, itertools.chain(*copies), tokens, recipe.seed)

    def remarks(self) -> Iterator[str]:
        """What a user should know of the data before it is learnt."""
        if self.cut:
            yield (
                f"{self.cut} expert episodes are longer than the model has positions, or than "
                "rl.microbatch_tokens, and end there"
            )
        if self.critic is not None and not self.critic.size:
            yield (
                "no verdicts, since good and flawed commands are both needed for questions; set "
                "cold_start.noise or cold_start.alternatives above 0, or "
                "cold_start.verdict_weight=0"
            )
        elif self.critic is not None and self.critic.size < FEW:
            yield (
                f"only {self.critic.size} verdicts can be asked about, which are soon learnt by "
                "heart; raise cold_start.episodes, cold_start.noise or cold_start.alternatives"
            )

    def step(self, updater: Updater) -> Measures:
        """One optimizer step on freshly drawn rows."""
        config = self._config
        drawn = draw(self._pools(updater.steps), config.batch_tokens, self._rng)
        exercise = self.critic.exercise(drawn, self._rng) if self.critic else None
        return updater.imitate([s.row for s in drawn], exercise, config.verdict_weight)

    def _pools(self, step: int) -> list[list[Sample]]:
        """What step number `step` draws from, each pool equally often."""
        for lesson in self._config.lessons:
            if step < lesson.steps:
                return [pool for word in lesson.commands for pool in self._taught[word]]
            step -= lesson.steps
        return [self.samples]

    def _samples(self, episodes: Sequence[Episode]) -> list[Sample]:
        text = self._config.text_weight
        return [
            Sample(row, number, steps)
            for number, episode in enumerate(episodes)
            for row, steps in imitation_rows(episode, text, self._weights[number])
        ]

    def _only(self, word: str) -> list[list[Sample]]:
        """What imitates commands with this first word, apart where the expert looks for something
        and where it does not: it does the one much oftener. ConfigError when there is nothing."""
        known = list(zip(self.episodes, self._looks, strict=True))
        pools = [
            self._samples([_masked(episode, word, looks, wanted) for episode, looks in known])
            for wanted in (False, True)
        ]
        if not any(pools):
            imitated = {_first_word(s) for e in self.episodes for s in e.steps if s.advantage}
            raise ConfigError(
                f"cold_start.lessons names {word!r}, and no expert step to imitate begins so; they "
                f"begin with: {', '.join(sorted(imitated))}"
            )
        return [pool for pool in pools if pool]


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
    """ConfigError when what is free in replies with tags is longer than the policy may ever write.
    A command that it chooses comes to its end in any case."""
    longest = max((_free_tokens(step) for e in episodes for step in e.steps), default=0)
    if recipe.prompt.tags and longest > recipe.sampling.max_new_tokens:
        raise ConfigError(
            f"with their tags the expert's replies have up to {longest} tokens; raise "
            f"sampling.max_new_tokens (now {recipe.sampling.max_new_tokens}) to {longest} or more"
        )


def _cut(transcript: Transcript, episode: Episode, longest: int) -> Transcript:
    """The transcript up to the first step with more than `longest` tokens, prompt and reply."""
    for t, step in enumerate(episode.steps):
        if len(step.prompt_ids) + len(step.action_ids) > longest:
            return dataclasses.replace(transcript, moves=transcript.moves[:t])
    return transcript


def _free_tokens(step: Step) -> int:
    """How many tokens of the reply are not chosen among commands."""
    chosen = sum(map(bool, step.allowed)) if step.allowed else 0
    return len(step.action_ids) - chosen


def _first_word(step: Step) -> str:
    return first_word(step.command or "")


def _step_weights(
    episodes: Sequence[Episode], looks: Sequence[Sequence[bool]], balance: float
) -> list[list[float]]:
    """The weight of every step, 1 on average over those that are imitated: the number of steps of
    its kind to the power of minus `balance`. A kind is the first word of a command and whether the
    expert looks for something with it."""
    kinds = [
        [(_first_word(step), looking) for step, looking in zip(e.steps, own, strict=True)]
        for e, own in zip(episodes, looks, strict=True)
    ]
    number = Counter(
        kind
        for e, own in zip(episodes, kinds, strict=True)
        for step, kind in zip(e.steps, own, strict=True)
        if step.advantage is not None
    )
    weight = {kind: n**-balance for kind, n in number.items()}
    mean = sum(n * weight[kind] for kind, n in number.items()) / max(1, number.total())
    return [[weight.get(kind, 0.0) / mean for kind in own] for own in kinds]


def _masked(episode: Episode, word: str, looks: Sequence[bool], wanted: bool) -> Episode:
    """The episode with no advantage but at commands with this first word that look for something,
    or (not `wanted`) do not."""
    steps = [
        step
        if _first_word(step) == word and looking == wanted
        else dataclasses.replace(step, advantage=None)
        for step, looking in zip(episode.steps, looks, strict=True)
    ]
    return dataclasses.replace(episode, steps=tuple(steps))
