"""Source `expert`: does the action bring the goal nearer, in the eyes of an expert?

Where the environment can plan from anywhere (`EnvInfo.replans`), plans before and after the action
are compared:

    good    expert      a shortest plan is shorter after it
    flawed  off_plan    a shortest plan is no shorter after it
            lost        there is no plan any more

With `gcd.expert: search` the expert knows only what has been read: the command it would give is
good, and so is any new command of the same kind where its choice is luck. A command that it would
not give is flawed when the plan gets no shorter, and otherwise (luck) has no label.

Elsewhere there is one solution from the start. Between states on its way the same rule holds; who
leaves it is `off_expert`, flawed with confidence 0.5, since there may be other ways; off the way
there is no label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from untwine.demonstrations import play_experts
from untwine.envs.guiding import Advice, helps
from untwine.envs.pool import AdviceRequest, EnvPool
from untwine.errors import ConfigError
from untwine.gcd.labels import EXPERT_GOOD, OFF_PLAN
from untwine.gcd.sources.protocol import Bench, Source, Table
from untwine.records import Episode, Group, Label, Step, TaskRef

LEFT_THE_WAY = 0.5  # confidence that leaving the only solution known is a flaw


class ExpertSource(Source):
    """The environment's own expert."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._searching = bench.recipe.gcd.expert == "search"
        self._ways: dict[TaskRef, Mapping[str, int]] = {}
        info = bench.info
        if not info.has_expert:
            raise ConfigError(f"{info.title} has no expert; leave expert out of gcd.labels")
        if self._searching and not info.searches:
            raise ConfigError(f"{info.title} has no expert that searches; set gcd.expert: oracle")

    def label(
        self, groups: Sequence[Group], iteration: int
    ) -> tuple[list[Table], dict[str, float]]:
        if not self._bench.info.replans:
            return self._along_the_way(groups), {}
        episodes = [episode for group in groups for episode in group.episodes]
        rows, counts = judge_by_plans(
            self._bench.pool, episodes, searching=self._searching, seed=self._bench.recipe.seed
        )
        left = iter(rows)
        return [[next(left) for _ in group.episodes] for group in groups], counts

    def _along_the_way(self, groups: Sequence[Group]) -> list[Table]:
        new = [ref for ref in dict.fromkeys(g.ref for g in groups) if ref not in self._ways]
        transcripts = play_experts(self._bench.pool, new, self._bench.recipe.env.max_steps)
        self._ways |= {ref: {} for ref in new}
        for transcript in transcripts:
            keys = [move.before.state_key for move in transcript.moves]
            keys.append(transcript.moves[-1].after.state_key)
            self._ways[transcript.ref] = {k: len(keys) - 1 - i for i, k in enumerate(keys)}
        return [
            [[_way_label(s, self._ways[g.ref]) for s in e.steps] for e in g.episodes]
            for g in groups
        ]


def judge_by_plans(
    pool: EnvPool, episodes: Sequence[Episode], *, searching: bool = False, seed: int = 0
) -> tuple[Table, dict[str, float]]:
    """Labels of episodes whose commands are given anew in an environment that `replans`, and how
    many episodes could not be repeated to their end (`expert_mismatches`), of how many commands
    (`label_env_steps`).

    searching  ask the expert that knows only what has been read; `seed` decides its luck
    """
    requests = [
        AdviceRequest(
            e.ref.task,
            e.ref.variation,
            tuple(s.command for s in e.steps if s.command is not None),
            searching,
            seed,
        )
        for e in episodes
    ]
    ways = pool.advice(requests)
    rows = [plan_labels(e, way) for e, way in zip(episodes, ways, strict=True)]
    mismatches = sum(_mismatch(e, way) for e, way in zip(episodes, ways, strict=True))
    env_steps = sum(len(request.commands) for request in requests)
    return rows, {"expert_mismatches": mismatches, "label_env_steps": env_steps}


def plan_labels(episode: Episode, way: Sequence[Advice]) -> list[Label | None]:
    """Labels of an episode from advice in each of its states. From the first state that is not the
    one on record, there are none."""
    labels: list[Label | None] = []
    at = 0  # commands given so far
    for t, step in enumerate(episode.steps):
        after = at + (step.command is not None)
        known = after < len(way) and _same(step, way[at], way[after])
        said = [s.command for s in episode.steps[:t]]
        labels.append(_plan_label(step, way[at], way[after], said) if known else None)
        if not known:
            return labels + [None] * (episode.length - t - 1)
        at = after
    return labels


def _same(step: Step, before: Advice, after: Advice) -> bool:
    return before.state_key == step.state_key and after.state_key == step.next_state_key


def _plan_label(
    step: Step, before: Advice, after: Advice, said: Sequence[str | None]
) -> Label | None:
    if before.left is None:
        return None
    fresh = step.invalid is None and step.command not in said
    good = helps(step.command or "", before, after.left, fresh)
    if good is None:
        return None
    if good:
        return EXPERT_GOOD
    return Label("expert", "flawed", "lost") if after.left is None else OFF_PLAN


def _mismatch(episode: Episode, way: Sequence[Advice]) -> bool:
    """Whether the episode could not be repeated to its end."""
    commands = sum(step.command is not None for step in episode.steps)
    return len(way) <= commands or way[commands].state_key != episode.steps[-1].next_state_key


def _way_label(step: Step, left: Mapping[str, int]) -> Label | None:
    before, after = left.get(step.state_key), left.get(step.next_state_key)
    if before is None:
        return None
    if after is None:
        return Label("expert", "flawed", "off_expert", LEFT_THE_WAY)
    if after < before:
        return EXPERT_GOOD
    return OFF_PLAN
