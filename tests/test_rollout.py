"""From task instances to groups of episodes, with a real policy in a real environment."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from untwine.config import Recipe, SamplingConfig
from untwine.envs import rooms
from untwine.envs.pool import ResetRequest
from untwine.errors import EnvError, UntwineError
from untwine.policy.choices import Later
from untwine.policy.sampler import Sample, Sampler
from untwine.progress import Display
from untwine.records import Group
from untwine.rollout import RolloutStats
from untwine.workshop import Workshop

CONSTRAINED = {"constrained": True, "max_new_tokens": 1}


def workshop_of(**sections: Any) -> Workshop:
    env = {"name": "rooms", "tasks": ["fetch"], "variations": 3, "max_steps": 6}
    recipe = Recipe.model_validate(
        {
            "policy": {
                "model": "tiny",
                "threads": 1,
                "tiny": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2},
            },
            **sections,
            "env": env | sections.get("env", {}),
        }
    )
    return Workshop(recipe, Display(quiet=True))


def collected(**sections: Any) -> tuple[list[Group], RolloutStats]:
    with workshop_of(**sections) as workshop:
        return workshop.collector.collect(workshop.refs, 4, torch.Generator().manual_seed(0))


def test_a_constrained_policy_says_admissible_commands_only() -> None:
    groups, stats = collected(sampling=CONSTRAINED)
    steps = [step for group in groups for episode in group.episodes for step in episode.steps]
    assert len({step.command for step in steps}) > 5
    for step in steps:
        assert step.admissible is not None
        assert step.command in step.admissible
        assert step.invalid is None
        assert step.allowed is not None
        for token, among, logprob in zip(step.action_ids, step.allowed, step.logprobs, strict=True):
            assert token in among
            assert (logprob == 0.0) == (len(among) == 1)
    assert stats.env_steps == len(steps)


class Casts(TorchDispatchMode):
    """How often each tensor was cast to bfloat16, by where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.times[args[0].data_ptr()] += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("way", ["rollout", "sample"])
@pytest.mark.parametrize("rank", [0, 2])
def test_weights_are_cast_once(way: str, rank: int) -> None:
    """Frozen ones under adapters, too. What is not of the policy is not cast."""
    if rank:
        pytest.importorskip("peft", reason="needs the lora extra")
    tiny = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2}
    policy = {"model": "tiny", "dtype": "bfloat16", "tiny": tiny, "lora": {"rank": rank}}
    with workshop_of(policy=policy, sampling=CONSTRAINED) as workshop:
        model, layer = workshop.policy.model, torch.nn.Linear(3, 3)
        weights = {n: p for n, p in model.base_model.named_parameters() if "proj" in n}
        trained = {n: p.requires_grad for n, p in model.named_parameters()}
        kinds = []
        with Casts() as casts:
            if way == "sample":
                sampler = Sampler(workshop.policy, SamplingConfig(), torch.Generator())
                sampler.sample({0: [5, 6, 7], 1: [5, 6]})
            else:
                workshop.collector.collect(
                    workshop.refs,
                    4,
                    torch.Generator().manual_seed(0),
                    on_turn=lambda *_: kinds.append(layer(torch.ones(3)).dtype),
                )
                assert set(kinds) == {torch.float32}
        assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
    assert {n: casts.times[p.data_ptr()] for n, p in weights.items()} == dict.fromkeys(weights, 1)
    assert len(weights) == (21 if rank else 7)


@pytest.mark.parametrize("left", [(), ("look",)], ids=["none", "blocked ones only"])
def test_an_environment_that_lists_no_command_is_said(
    left: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with workshop_of(sampling=CONSTRAINED) as workshop:
        collector = workshop.collector
        monkeypatch.setattr(rooms, "_admissible", lambda *_: left)
        monkeypatch.setattr(collector, "info", dataclasses.replace(collector.info, blocked=left))
        generator = torch.Generator().manual_seed(0)
        with pytest.raises(EnvError, match="lists no admissible command at step 0; set"):
            collector.collect(workshop.refs, 4, generator)


def test_what_is_not_admissible_is_refused_where_only_that_counts() -> None:
    groups, _ = collected(prompt={"only_admissible": True, "list_admissible": True})
    steps = [step for group in groups for episode in group.episodes for step in episode.steps]
    said = [step for step in steps if step.command is not None and step.invalid is None]
    assert all(step.command in (step.admissible or ()) for step in said)
    loose, _ = collected(prompt={"list_admissible": True})
    reasons = [{s.invalid for g in x for e in g.episodes for s in e.steps} for x in (groups, loose)]
    assert "not_admissible" in reasons[0] - reasons[1]


def test_an_unconstrained_policy_from_scratch_says_what_nobody_understands() -> None:
    groups, _ = collected()
    steps = [step for group in groups for episode in group.episodes for step in episode.steps]
    assert all(step.allowed is None for step in steps)
    assert sum(step.invalid is not None for step in steps) > len(steps) / 2


@pytest.mark.parametrize("tags", [False, True])
def test_chosen_commands_end_within_the_model(tags: bool) -> None:
    """A chosen command has no limit but its own end, so room is kept for the longest one."""
    sections: dict[str, Any] = {"env": {"max_steps": 12}, "sampling": CONSTRAINED}
    if tags:
        sections |= {"prompt": {"tags": True}, "sampling": {**CONSTRAINED, "max_new_tokens": 8}}
    with workshop_of(**sections) as workshop:
        collector, policy = workshop.collector, workshop.policy
        if tags:  # begins the command after a few tokens, whatever was said before
            opened = collector.choices
            assert opened is not None
            mark, free = policy.chat.word_ids("<explore>x</explore><action>"), opened.among

            def forced(commands: list[str]) -> Later:
                later = free(commands)
                assert isinstance(later, Later)
                return Later(lambda ids: later.node_after(mark) if len(ids) == 8 else None)

            opened.among = forced  # type: ignore[method-assign,assignment]
        ends = set()
        for positions in range(160, 400, 12):
            policy.model.config.max_position_embeddings = positions
            generator = torch.Generator().manual_seed(0)
            try:
                groups, _ = collector.collect(workshop.refs[:2], 3, generator)
            except UntwineError:  # the first prompt does not fit
                continue
            for group in groups:
                for episode in group.episodes:
                    lengths = [len(s.prompt_ids) + len(s.action_ids) for s in episode.steps]
                    assert max(lengths) <= positions
                    if episode.length < 12 and not episode.success:
                        ends.add("limit")
    assert "limit" in ends


class Watch:
    """Notes what a rollout does: ("step", slots that read, slots whose reply is over),
    ("send", slots, slots that are reset), ("receive", slots)."""

    def __init__(self, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[Any, ...]] = []
        pool = workshop.pool
        send, receive, step = pool.send, pool.receive, Sampler.step

        def noted_send(requests: Mapping[int, Any]) -> None:
            resets = {s for s, r in requests.items() if isinstance(r, ResetRequest)}
            self.events.append(("send", set(requests), resets))
            send(requests)

        def noted_receive(slots: Iterable[int]) -> dict[int, Any]:
            slots = list(slots)
            self.events.append(("receive", set(slots)))
            return receive(slots)

        def noted_step(sampler: Sampler) -> dict[int, Sample]:
            under_way = set(sampler._drafts)
            samples = step(sampler)
            self.events.append(("step", under_way, set(samples)))
            return samples

        monkeypatch.setattr(pool, "send", noted_send)
        monkeypatch.setattr(pool, "receive", noted_receive)
        monkeypatch.setattr(Sampler, "step", noted_step)

    def steps(self) -> list[tuple[set[int], set[int]]]:
        return [(e[1], e[2]) for e in self.events if e[0] == "step"]


def test_a_reply_that_is_over_does_not_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some slot acts and reads its next prompt while the reply of another goes on, and as long as
    episodes wait in the queue no slot is idle."""
    with workshop_of(env={"sessions": 4}, sampling=CONSTRAINED) as workshop:
        watch = Watch(workshop, monkeypatch)
        groups, _ = workshop.collector.collect(workshop.refs, 4, torch.Generator().manual_seed(0))
    assert [len(group.episodes) for group in groups] == [4, 4, 4]
    steps = watch.steps()
    assert any(
        over & then and (now - over) & then for (now, over), (then, _) in itertools.pairwise(steps)
    )
    last_reset = max(i for i, e in enumerate(watch.events) if e[0] == "send" and e[2])
    busy = [e[1] for e in watch.events[:last_reset] if e[0] == "step"]
    assert busy
    assert all(len(now) == 4 for now in busy)


def test_environments_of_one_wave_act_while_the_policy_replies_for_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with workshop_of(
        env={"workers": 2, "sessions": 2, "max_steps": 4}, sampling={**CONSTRAINED, "waves": 2}
    ) as workshop:
        assert workshop.collector.waves == 2
        watch = Watch(workshop, monkeypatch)
        groups, _ = workshop.collector.collect(
            workshop.refs[:1], 4, torch.Generator().manual_seed(0)
        )
    assert [len(g.episodes) for g in groups] == [4]
    sent: dict[int, int] = {}
    waits = overlapped = 0
    for place, event in enumerate(watch.events):
        if event[0] == "send":
            sent.update(dict.fromkeys(event[1], place))
        elif event[0] == "receive" and event[1]:
            first = min(sent[slot] for slot in event[1])
            between = [e for e in watch.events[first:place] if e[0] == "step"]
            waits += 1
            overlapped += any(not e[1] & event[1] for e in between)
    # 4 episodes of at most 4 steps in two waves: 2 starts and 8 answers are waited for. Only the
    # very first start, and the last answers when the other wave is through, overlap with nothing.
    assert waits >= 8
    assert overlapped >= waits - 2
    assert all(len({slot % 2 for slot in now}) <= 1 for now, _ in watch.steps())


def test_waves_can_be_repeated_exactly() -> None:
    sections = {
        "env": {"workers": 2, "sessions": 3},
        "sampling": {**CONSTRAINED, "waves": 2},
    }
    (first, stats), (second, _) = collected(**sections), collected(**sections)
    assert first == second
    steps = [step for group in first for episode in group.episodes for step in episode.steps]
    assert stats.env_steps == len(steps)
    assert stats.episodes_lost == 0
    assert all(step.command in (step.admissible or ()) for step in steps)


def test_without_workers_there_are_no_waves() -> None:
    with workshop_of(sampling={"waves": 2}) as workshop:
        assert workshop.collector.waves == 1


def test_episodes_of_a_worker_that_dies_are_played_again() -> None:
    with workshop_of(
        env={"workers": 2, "sessions": 2}, sampling={**CONSTRAINED, "waves": 2}
    ) as workshop:
        turns = 0

        def on_turn(done: int, total: int) -> None:
            nonlocal turns
            turns += 1
            if turns == 6:
                pid = workshop.pool._workers[0].process.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)

        groups, stats = workshop.collector.collect(
            workshop.refs, 4, torch.Generator().manual_seed(0), on_turn=on_turn
        )
    assert stats.episodes_lost == 2
    assert workshop.pool.restarts == 1
    assert [len(group.episodes) for group in groups] == [4, 4, 4]
    assert all(episode.length for group in groups for episode in group.episodes)
