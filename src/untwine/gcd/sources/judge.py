"""Source `judge`: what a language model thinks of an action.

The steps asked about are drawn at random among those that differ (task instance, state, action),
`gcd.judge.questions` per iteration at most. The judge abstains, and is counted, where it is unsure,
does not answer in time, or answers something else than a verdict; training goes on. An endpoint
that fails `PATIENCE` times in a row is left alone for the rest of the iteration.

Answers of an endpoint are kept in a file, also those that are no verdict, so nothing is asked
twice, and a resumed run hears what it heard before. When the answers in the file have cost
`gcd.judge.token_budget` tokens, nothing new is asked.

Confidence is |P(good) - P(bad)| given one of the two, where the judge tells how sure it is;
otherwise `gcd.judge.confidence`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path

from rich.markup import escape

from untwine.config import JudgeConfig, PromptConfig
from untwine.errors import ConfigError
from untwine.gcd.labels import action_key
from untwine.gcd.sources.answers import AnswerFile
from untwine.gcd.sources.endpoint import Endpoint
from untwine.gcd.sources.opinions import Judge, LocalJudge, Opinion, RemoteJudge
from untwine.gcd.sources.protocol import Bench, Source, Table, tables_of
from untwine.prompting.prompter import verdict_text
from untwine.records import Episode, Group, Label

PairKey = tuple[str, str, str]
_FILE = "judge.jsonl"


class JudgeSource(Source):
    """A language model, at a stated budget."""

    def __init__(self, bench: Bench) -> None:
        """ConfigError when no judge is named; ModelError when a local one cannot be loaded."""
        self._bench = bench
        self._config = bench.recipe.gcd.judge
        self._judge = _judge(bench)
        self._said = ""

    def label(
        self, groups: Sequence[Group], iteration: int
    ) -> tuple[list[Table], dict[str, float]]:
        seed = self._bench.recipe.seed
        rng = random.Random(f"{seed}/judge/{iteration}")
        asked = _drawn(groups, self._config.questions, rng, self._bench.wanted)
        shown = PromptConfig(history=self._config.history)
        texts = [verdict_text(e, t, shown) for e, t in asked.values()]
        with self._bench.display.bar("asking the judge", len(texts), "question"):
            opinions = self._judge.ask(texts, self._bench.on_progress)
        by_pair = dict(zip(asked, opinions, strict=True))

        def label_of(group: Group, g: int, t: int) -> Label | None:
            opinion = by_pair.get(_pair(group.episodes[g], t))
            if opinion is None or opinion.verdict is None:
                return None
            return Label("judge", opinion.verdict, "opinion", opinion.confidence)

        self._complain(opinions, iteration)
        return tables_of(groups, label_of), counts_of(opinions)

    def _complain(self, opinions: Sequence[Opinion], iteration: int) -> None:
        """Say why verdicts are missing, unless the judge only fails to give one now and then; and
        once what else went wrong."""
        if (fault := self._judge.complaint()) and not self._said:
            self._said = fault
            self._bench.display.line(
                f"[yellow]judge:[/yellow] {escape(fault)}; answers are kept until this command ends"
            )
        silent = [o for o in opinions if o.how in ("failed", "skipped")]
        nonsense = [o for o in opinions if o.how == "nonsense"]
        if len(nonsense) > len(opinions) / 2:
            silent += nonsense
        if silent:
            reason, _ = Counter(o.reason for o in silent).most_common(1)[0]
            self._bench.display.line(
                f"[yellow]judge:[/yellow] {len(silent)} of {len(opinions)} questions of iteration "
                f"{iteration} got no verdict ({escape(reason)}); judge labels nothing there"
            )


def check_judge(config: JudgeConfig) -> None:
    """ConfigError when no judge is named, or its address or key is of no use."""
    if config.url:
        Endpoint(config)
    elif not config.model:
        raise ConfigError(
            "gcd.labels names judge, but there is none; set gcd.judge.url and gcd.judge.model, or "
            "gcd.judge.model alone for a local model"
        )


def counts_of(opinions: Sequence[Opinion]) -> dict[str, float]:
    """How many questions ended how, and the tokens that were spent."""
    ways = Counter(opinion.how for opinion in opinions)
    counts: dict[str, float] = {
        f"judge_{how}": ways[how]
        for how in ("answered", "kept", "unsure", "nonsense", "failed", "skipped")
    }
    counts["label_tokens"] = sum(opinion.tokens for opinion in opinions)
    return counts


def _judge(bench: Bench) -> Judge:
    recipe, config = bench.recipe, bench.recipe.gcd.judge
    check_judge(config)
    if config.url:
        cache = Path(config.cache) if config.cache else bench.run / _FILE
        return RemoteJudge(config, AnswerFile(cache))
    return LocalJudge(config, recipe.policy, recipe.rl.microbatch_tokens)


def _drawn(
    groups: Sequence[Group],
    most: int,
    rng: random.Random,
    wanted: Container[tuple[str, int]] | None,
) -> dict[PairKey, tuple[Episode, int]]:
    """At most `most` different actions, each with the first step that took it; of the steps that
    are `wanted`."""
    first: dict[PairKey, tuple[Episode, int]] = {}
    for group in groups:
        for episode in group.episodes:
            for t in range(episode.length):
                if wanted is None or (episode.id, t) in wanted:
                    first.setdefault(_pair(episode, t), (episode, t))
    keys = list(first)
    if len(keys) > most:
        keys = rng.sample(keys, most)
    return {key: first[key] for key in keys}


def _pair(episode: Episode, t: int) -> PairKey:
    step = episode.steps[t]
    return str(episode.ref), step.state_key, action_key(step)
