"""Probes: which are chosen, and what is read off the policy, against plain forward passes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from tests.builders import REF, make_episode, make_step
from tests.diagnose.conftest import MakeCollector
from tests.diagnose.reference import logprob
from tests.diagnose.untwine_chain_env import MOVES
from tests.policy.test_choices import plain_choice_logprob
from untwine.config import PromptConfig, SamplingConfig
from untwine.diagnose.probes import (
    Probe,
    ProbeSet,
    Reading,
    choose_probes,
    find_probes,
    load_probes,
    probes_path,
    read_probes,
    reading,
    summarise_probes,
    write_probes,
)
from untwine.diagnose.samples import StepSample
from untwine.envs.pool import EnvPool
from untwine.errors import CheckpointError
from untwine.policy.loading import Policy
from untwine.records import Group, Label, TaskRef
from untwine.rollout import Collector

OPEN = SamplingConfig(max_new_tokens=4)


def played(collector: Collector, episodes: int = 6) -> list[Group]:
    refs = [TaskRef("chain", "near", k) for k in range(2)]
    return collector.collect(refs, episodes, torch.Generator().manual_seed(1))[0]


def test_choices_are_normalised_and_agree_with_the_definition(make_chain: MakeCollector) -> None:
    collector = make_chain()
    chosen = choose_probes(played(collector), collector, 8, 0)
    assert {p.kind for p in chosen.probes} == {"good", "flawed", "unsampled"}
    assert chosen.ranked
    replies = [collector.policy.chat.reply_ids(c) for c in MOVES]
    everything = ProbeSet(
        chosen.states,
        tuple(
            Probe("good", "", "", s, r)
            for s, state in enumerate(chosen.states)
            for r in range(len(state.replies))
        ),
        ranked=True,
    )
    found = read_probes(collector.policy, everything, 1.0, 64)
    by_state: dict[int, list[Reading]] = defaultdict(list)
    for probe, one in zip(everything.probes, found, strict=True):
        state = chosen.states[probe.state]
        assert [r.text for r in state.replies] == list(MOVES)
        reply = state.replies[probe.reply].ids
        plain = plain_choice_logprob(collector.policy, list(state.prompt_ids), replies, reply)
        assert one.logprob == pytest.approx(plain, abs=1e-4)
        by_state[probe.state].append(one)
    for own in by_state.values():
        assert math.fsum(math.exp(r.logprob) for r in own) == pytest.approx(1, abs=1e-5)
        order = sorted((r.logprob for r in own), reverse=True)
        assert [r.rank for r in own] == [1 + order.index(r.logprob) for r in own]
        assert {r.argmax for r in own} == {math.exp(order[0])}


def test_free_replies_have_plain_log_probabilities(make_chain: MakeCollector) -> None:
    collector = make_chain(OPEN)
    chosen = choose_probes(played(collector), collector, 6, 0)
    found = read_probes(collector.policy, chosen, 0.7, 4096)
    kinds = {p.kind for p in chosen.probes}
    assert kinds == {"flawed", "unsampled"}  # gibberish never wins
    for probe, one in zip(chosen.probes, found, strict=True):
        state = chosen.states[probe.state]
        samples = [StepSample(state.prompt_ids, r.ids, r.allowed) for r in state.replies]
        with torch.no_grad():
            plain = [float(logprob(collector.policy.model, s, 0.7)) for s in samples]
        assert one.logprob == pytest.approx(plain[probe.reply], abs=1e-3)
        assert one.argmax == pytest.approx(math.exp(max(plain)), rel=1e-3)
        texts = {r.text for r in state.replies}
        assert set(MOVES) <= texts  # what could be said, beside what was said


def test_unsampled_commands_were_taken_by_nobody_in_that_state(make_chain: MakeCollector) -> None:
    collector = make_chain()
    groups = played(collector, 2)
    chosen = choose_probes(groups, collector, 100, 0)
    taken = defaultdict(set)
    for group in groups:
        for episode in group.episodes:
            for step in episode.steps:
                taken[str(group.ref), step.state_key].add(step.command)
    expected, seen = set(), set()
    for state in chosen.states:
        free = set(MOVES) - taken[state.task, state.state_key]
        expected |= {(state.prompt_ids, command) for command in free}
    for probe in chosen.probes:
        state = chosen.states[probe.state]
        text = state.replies[probe.reply].text
        if probe.kind == "unsampled":
            seen.add((state.prompt_ids, text))
        else:
            assert text in taken[state.task, state.state_key]
    assert seen == expected
    assert expected


@pytest.fixture
def rooms(policy: Policy) -> Collector:
    pool = EnvPool("rooms", {}, workers=0, sessions=1, timeout_s=5.0)
    return Collector(policy, pool, 4, PromptConfig(), OPEN)


def test_truth_counts_more_than_rules_and_doubt_is_left_out(rooms: Collector) -> None:
    truth = Label("branch", "good", "branch", 0.9)
    invalid = make_step(command="jump", action=(30, 2), invalid="unknown", after="s0")
    judged = make_step(command="fly", action=(31, 2), invalid="unknown", labels=(truth,))
    silent = make_step(command="walk", action=(32, 2))
    episodes = [make_episode(0.0, [s], id=f"e{i}") for i, s in enumerate((invalid, judged, silent))]
    chosen = choose_probes([Group(REF, tuple(episodes))], rooms, 9, 0)
    known = {
        (p.kind, p.source, p.reason, chosen.states[p.state].replies[p.reply].text)
        for p in chosen.probes
    }
    assert known == {("flawed", "rule", "invalid", "jump"), ("good", "branch", "branch", "fly")}


@pytest.mark.parametrize(("winners", "expected"), [(2, set()), (8, {"good", "flawed"})])
def test_group_labels_count_when_they_are_sure(
    rooms: Collector, winners: int, expected: set[str]
) -> None:
    """2 of 2 against 0 of 2 is z = 1.7 (confidence .92), 8 of 8 against 0 of 8 is z = 3.9."""
    episodes = []
    for i in range(2 * winners):
        command, action = ("left", (30, 2)) if i % 2 else ("right", (31, 2))
        step = make_step(command=command, action=action)
        episodes.append(make_episode(float(i % 2), [step], id=f"e{i}"))
    chosen = choose_probes([Group(REF, tuple(episodes))], rooms, 9, 0)
    assert {p.kind for p in chosen.probes} == expected
    assert {p.source for p in chosen.probes} <= {"group"}


def test_without_labels_commands_that_nobody_took_are_left(rooms: Collector) -> None:
    silent = make_step(command="walk", action=(32, 2))
    chosen = choose_probes([Group(REF, (make_episode(0.0, [silent]),))], rooms, 9, 0)
    assert chosen.probes == ()
    assert read_probes(rooms.policy, chosen, 1.0, 4096) == []
    assert summarise_probes(chosen, []) == {}
    listed = dataclasses.replace(silent, admissible=("Walk", "jump", "fly"))
    chosen = choose_probes([Group(REF, (make_episode(0.0, [listed]),))], rooms, 9, 0)
    (state,) = chosen.states
    found = {(p.kind, state.replies[p.reply].text) for p in chosen.probes}
    assert found == {("unsampled", "jump"), ("unsampled", "fly")}


def test_thoughts_leave_the_probe_alone(policy: Policy) -> None:
    pool = EnvPool("rooms", {}, workers=0, sessions=1, timeout_s=5.0)
    collector = Collector(policy, pool, 4, PromptConfig(thoughts=True), OPEN)
    steps = [
        make_step(command="jump", action=(30 + i, 2), invalid="unknown", after="s0")
        for i in range(2)
    ]
    group = Group(REF, tuple(make_episode(0.0, [s], id=f"e{i}") for i, s in enumerate(steps)))
    chosen = choose_probes([group], collector, 9, 0)
    assert [r.ids for r in chosen.states[0].replies] == [(30, 2), (31, 2)]
    assert [p.kind for p in chosen.probes] == ["flawed", "flawed"]
    found = read_probes(policy, chosen, 1.0, 4096)
    assert all(r.rank is None and r.argmax is None for r in found)
    assert summarise_probes(chosen, found)["flawed"]["rank"] is None


def test_ranks_and_means_by_hand() -> None:
    values = [math.log(p) for p in (0.1, 0.6, 0.1, 0.2)]
    assert reading(values, 1) == Reading(values[1], 1, pytest.approx(0.6))
    assert reading(values, 3).rank == 2
    assert reading(values, 0).rank == reading(values, 2).rank == 3
    probes = tuple(Probe(k, "", "", 0, 0) for k in ("good", "good", "unsampled"))  # type: ignore[arg-type]
    means = summarise_probes(ProbeSet((), probes, True), [reading(values, i) for i in (1, 3, 0)])
    assert means["good"] == {
        "count": 2,
        "probability": pytest.approx(0.4),
        "logprob": pytest.approx(math.log(0.12) / 2),
        "rank": 1.5,
        "argmax": pytest.approx(0.6),
    }
    assert list(means) == ["good", "unsampled"]


def test_the_file_gives_back_the_same_probes(make_chain: MakeCollector, tmp_path: Path) -> None:
    collector = make_chain()
    chosen = choose_probes(played(collector), collector, 3, 0)
    assert find_probes(tmp_path) is None
    write_probes(probes_path(tmp_path, 4), chosen)
    file = find_probes(tmp_path)
    assert file is not None
    assert load_probes(file) == chosen
    prompts = {s.prompt_ids for s in chosen.states}
    assert chosen.tokens > len(set().union(*prompts))
    text = file.read_text()
    broken = [
        text[:-20],
        json.dumps({**json.loads(text), "format": "other"}),
        json.dumps({**json.loads(text), "states": []}),
        "[]",
    ]
    for content in broken:
        file.write_text(content)
        with pytest.raises(CheckpointError, match="probe file"):
            load_probes(file)
