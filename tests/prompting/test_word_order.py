"""Replies with the first word of a command last."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from untwine.config import PromptConfig, SamplingConfig
from untwine.demonstrations import demonstration, play_experts
from untwine.envs.pool import EnvPool
from untwine.policy.loading import Policy
from untwine.prompting.prompter import Prompter
from untwine.prompting.word_order import verb_first, verb_last
from untwine.records import TaskRef
from untwine.rollout import Collector

VERB_LAST = PromptConfig(layout="window", verb_last=True)
REFS = [TaskRef("rooms", "fetch", k) for k in range(3)]


def test_by_hand() -> None:
    assert verb_last("take pen 1 from desk 1") == " pen 1 from desk 1 take"
    assert verb_first(" pen 1 from desk 1 take") == "take pen 1 from desk 1"
    assert verb_last("look") == " look"
    assert verb_first("") == ""


@given(st.lists(st.text("abc1", min_size=1, max_size=4), min_size=1, max_size=6))
def test_back_and_forth(words: list[str]) -> None:
    assert verb_first(verb_last(" ".join(words))) == " ".join(words)


def test_the_words_of_a_reply_are_those_of_a_sentence(policy: Policy) -> None:
    prompter = Prompter(policy.chat, VERB_LAST)
    tokenizer = policy.tokenizer
    sentence = tokenizer.encode("you see a lamp", add_special_tokens=False)
    reply = prompter.reply_ids("take lamp")
    word = tokenizer.encode(" lamp", add_special_tokens=False)
    assert list(reply[: len(word)]) == word
    assert sentence[-len(word) :] == word


@pytest.mark.parametrize("constrained", [True, False])
def test_what_is_written_so_is_done(policy: Policy, constrained: bool) -> None:
    """Sampled replies end with the word their commands begin with; experts write in the same way,
    and what prompts show later are commands."""
    sampling = SamplingConfig(constrained=constrained, max_new_tokens=6)
    with EnvPool("rooms", {"list_commands": True}, workers=0, sessions=4, timeout_s=5) as pool:
        collector = Collector(policy, pool, 4, VERB_LAST, sampling)
        groups, _ = collector.collect(REFS, 2, torch.Generator().manual_seed(0))
        expert = play_experts(pool, REFS, 12)[0]
    written = demonstration(expert, collector.prompter, choices=collector.choices)
    episodes = [*(e for g in groups for e in g.episodes), written]
    steps = [step for episode in episodes for step in episode.steps if step.command]
    assert steps
    for step in steps:
        text, _ = policy.chat.decode(step.action_ids)
        assert verb_first(text) == step.command
    if constrained:
        assert all(step.invalid is None for step in steps)
        assert all(step.allowed for step in written.steps)
        with_two = next(e for e in episodes if len(e.steps) > 1 and e.steps[0].command)
        prompt = policy.tokenizer.decode(with_two.steps[1].prompt_ids)
        assert f"> {with_two.steps[0].command}\n" in prompt
        assert "its first word last" in prompt
