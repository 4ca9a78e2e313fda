"""Branching against exact values: every command, every path, every probability written out."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from tests.diagnose.conftest import MakeCollector
from tests.diagnose.untwine_chain_env import MOVES, ChainEnv
from tests.policy.test_choices import plain_choice_logprob
from untwine.config import SamplingConfig
from untwine.diagnose import branching
from untwine.diagnose.branching import Brancher, Estimate, Occurrence, Settings
from untwine.diagnose.population import RecordedStep, action_logprobs, recorded_steps
from untwine.diagnose.restoring import restore_points
from untwine.policy.sampler import Sample
from untwine.prompting.prompter import Conversation
from untwine.records import Group, TaskRef
from untwine.rollout import Collector, Start

STEPS = 3
PLAYED = 12


class Exact:
    """Q and V by dynamic programming over all that can be said and happen."""

    def __init__(self, collector: Collector) -> None:
        self.policy = collector.policy
        self.replies = {c: self.policy.chat.reply_ids(c) for c in MOVES}
        self.known: dict[tuple[tuple[int, ...], str], float] = {}

    def probability(self, conversation: Conversation, command: str) -> float:
        key, replies = (conversation.prompt_ids, command), list(self.replies.values())
        if key not in self.known:
            reply = self.replies[command]
            self.known[key] = plain_choice_logprob(self.policy, list(key[0]), replies, reply)
        return math.exp(self.known[key])

    def value(self, conversation: Conversation, position: int, played: int) -> float:
        return math.fsum(
            self.probability(conversation, c) * self.action_value(conversation, position, played, c)
            for c in MOVES
        )

    def action_value(
        self, conversation: Conversation, position: int, played: int, command: str
    ) -> float:
        env = ChainEnv({})
        env.restore(position)
        answer = env.step(command)
        if answer.done or played + 1 == STEPS:
            return answer.outcome
        after = conversation.fork()
        after.advance(self.replies[command], command, answer.text, tuple(MOVES))
        return self.value(after, position + MOVES[command], played + 1)


def occurrences(collector: Collector, groups: list[Group]) -> dict[int, tuple[RecordedStep, Start]]:
    steps = recorded_steps(groups, collector.info)
    wanted = [(e, range(e.length)) for group in groups for e in group.episodes]
    starts, mismatches = restore_points(collector.pool, collector.prompter, wanted)
    assert not mismatches
    return {i: (s, starts[s.episode.id, s.t]) for i, s in enumerate(steps)}


def estimate(
    collector: Collector, branches: int, seed: int = 0
) -> list[tuple[list[tuple[RecordedStep, Start]], list[float], Estimate | None]]:
    """Every pair of the episodes played: its occurrences, their q, the estimate."""
    ref = TaskRef("chain", "near", 0)
    groups, _ = collector.collect([ref], PLAYED, torch.Generator().manual_seed(1))
    found = list(occurrences(collector, groups).values())
    logprobs = action_logprobs(collector.policy, [s.step for s, _ in found], 1.0, 4096)
    for (step, _), logprob in zip(found, logprobs, strict=True):
        assert logprob == pytest.approx(math.fsum(step.step.logprobs), abs=1e-4)
    pairs = {}
    for (step, start), logprob in zip(found, logprobs, strict=True):
        pairs.setdefault(step.pair, []).append((step, start, math.exp(logprob)))
    questions = [
        [
            Occurrence(
                start,
                Sample(s.step.action_ids, s.step.logprobs, s.step.allowed),
                s.step.admissible,
                q,
            )
            for s, start, q in pair
        ]
        for pair in pairs.values()
    ]
    answers = Brancher(collector, Settings(branches=branches, seed=seed)).estimate(questions)
    return [
        ([(s, start) for s, start, _ in pair], [q for _, _, q in pair], answer)
        for pair, answer in zip(pairs.values(), answers, strict=True)
    ]


@pytest.mark.parametrize("how", ["snapshots", "replay", "nucleus"])
def test_exact_values_lie_in_the_intervals(make_chain: MakeCollector, how: str) -> None:
    # a nucleus of nearly everything: the same policy, but q counts as unknown
    top_p = 0.9999999 if how == "nucleus" else 1.0
    sampling = SamplingConfig(constrained=True, top_p=top_p)
    collector = make_chain(sampling, snapshots=how != "replay")
    exact = Exact(collector)
    errors, labels = [], set()
    for found, qs, answer in estimate(collector, branches=64):
        assert answer is not None
        truths, action_values, others = [], [], []
        for (step, start), q in zip(found, qs, strict=True):
            conversation, command = start.conversation, step.step.command
            assert command is not None
            position = int(step.step.state_key)
            assert exact.probability(conversation, command) == pytest.approx(q, abs=1e-4)
            action_value = exact.action_value(conversation, position, step.t, command)
            value = exact.value(conversation, position, step.t)
            truths.append(action_value - value)
            action_values.append(action_value)
            others.append((value - q * action_value) / (1 - q))
        truth = sum(truths) / len(truths)
        assert answer.low - 1e-5 <= truth <= answer.high + 1e-5  # q in single precision
        rest = [1 - q for q in qs]  # of steps judged together, as often as another reply is drawn
        reached = math.fsum(map(math.prod, zip(rest, action_values, strict=True))) / sum(rest)
        other = math.fsum(map(math.prod, zip(rest, others, strict=True))) / sum(rest)
        mean_q = sum(qs) / len(qs)
        mixed = mean_q * reached + (1 - mean_q) * other
        assert mixed == pytest.approx(reached - truth, abs=1e-4)  # A* = Q - V
        assert answer.action_value_low - 1e-5 <= reached <= answer.action_value_high + 1e-5
        assert answer.value_low - 1e-5 <= mixed <= answer.value_high + 1e-5
        if how != "nucleus":
            assert abs(answer.advantage) <= 1 - mean_q + 1e-9
        assert answer.label == "neutral" or (answer.label == "good") == (truth > 0)
        assert answer.q == pytest.approx(sum(qs) / len(qs))
        labels.add(answer.label)
        errors.append(abs(answer.advantage - truth) * math.sqrt(answer.n))
    assert len(errors) >= 5
    assert max(errors) < 3  # standard deviations of one pair are below 1
    assert {"good", "flawed"} <= labels


def test_values_of_one_state_and_an_early_stop(make_chain: MakeCollector) -> None:
    collector = make_chain()
    exact = Exact(collector)
    stopped = 0
    for found, _, answer in estimate(collector, branches=64):
        assert answer is not None
        stopped += answer.n < 64
        if len(found) == 1:
            step, start = found[0]
            command, position = step.step.command, int(step.step.state_key)
            assert command is not None
            q = exact.action_value(start.conversation, position, step.t, command)
            v = exact.value(start.conversation, position, step.t)
            assert answer.action_value == pytest.approx(q, abs=3 / math.sqrt(answer.n))
            assert answer.value == pytest.approx(v, abs=3 / math.sqrt(answer.n))
        if answer.label != "neutral":
            assert answer.clear
            assert answer.confidence is not None
            assert answer.confidence > 0.975
    assert stopped


def test_the_same_seed_gives_the_same_answers(make_chain: MakeCollector) -> None:
    first, again, other = (
        [answer for _, _, answer in estimate(make_chain(), branches=16, seed=seed)]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_steps_left_count_from_the_position(make_chain: MakeCollector) -> None:
    """At the last step nothing follows: the value is the outcome of the command itself."""
    last = 0
    for found, _, answer in estimate(make_chain(), branches=16):
        assert answer is not None
        if all(step.t == STEPS - 1 for step, _ in found):
            command, position = found[0][0].step.command, int(found[0][0].step.state_key)
            assert command is not None
            assert answer.action_value in (None, float(position + MOVES[command] >= 2))
            last += answer.action_value is not None
    assert last


def test_an_environment_that_stops_repeating_gives_no_answer(make_chain: MakeCollector) -> None:
    # one reset each to play and to verify; the branches come after that
    collector = make_chain(snapshots=False, breaks_after=2 * PLAYED)
    assert [answer for _, _, answer in estimate(collector, branches=16)] == [None] * len(
        estimate(make_chain(), branches=16)
    )


def test_values_stand_in_the_order_of_the_draws() -> None:
    """Also those that are known at once, since the reply was the action itself."""
    tally = branching._Tally([], random.Random(0), known_q=False)
    first = tally.reserve()
    tally.values.append(0.0)
    second = tally.reserve()
    tally.fill(second, 0.25, 1.0)
    tally.fill(first, 1.0, 0.5)
    assert tally.values == [0.5, 0.0, -0.75]


def test_looks_double_up_to_the_last() -> None:
    assert Settings(branches=100).looks() == [16, 32, 64, 100]
    assert Settings(branches=5).looks() == [5]
    for branches in (16, 17, 300):
        looks = Settings(branches=branches).looks()
        assert looks[-1] == branches
        assert all(a < b for a, b in itertools.pairwise(looks))
