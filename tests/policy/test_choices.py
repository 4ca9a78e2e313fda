"""Choice among admissible commands, against the definition and against free sampling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from untwine.config import SamplingConfig
from untwine.policy.choices import CommandChoices, Node, allowed_along
from untwine.policy.loading import Policy
from untwine.policy.sampler import Sample, Sampler

COMMANDS = [
    "go to kitchen",
    "go to hallway",
    "open door to kitchen",
    "open door",
    "focus on red apple",
    "focus on red apple 1",
    "look",
]


def plain_choice_logprob(
    policy: Policy, prompt: list[int], replies: list[tuple[int, ...]], reply: tuple[int, ...]
) -> float:
    """By the definition: at each token, softmax over the tokens with which some reply goes on."""
    total = 0.0
    for t, token in enumerate(reply):
        following = sorted({r[t] for r in replies if len(r) > t and r[:t] == reply[:t]})
        ids = torch.tensor([[*prompt, *reply[:t]]])
        with torch.no_grad():
            logits = policy.model(input_ids=ids, use_cache=False).logits[0, -1].double()
        total += float(logits[following].log_softmax(-1)[following.index(token)])
    return total


def draw(
    policy: Policy, prompts: dict[int, list[int]], trie: Node, seed: int, **config: float
) -> dict[int, Sample]:
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(policy, SamplingConfig(max_new_tokens=1, **config), generator)
    return sampler.sample(prompts, dict.fromkeys(prompts, trie))


def test_the_trie_holds_the_commands_and_nothing_else(policy: Policy) -> None:
    choices = CommandChoices(policy.chat.reply_ids)
    trie = choices.trie(COMMANDS)

    def replies(node: Node) -> list[tuple[int, ...]]:
        if not node:
            return [()]
        return [(token, *rest) for token, child in node.items() for rest in replies(child)]

    assert sorted(replies(trie)) == sorted(policy.chat.reply_ids(c) for c in COMMANDS)
    decoded = {policy.chat.decode(ids) for ids in replies(trie)}
    assert decoded == {(command, True) for command in COMMANDS}
    with pytest.raises(ValueError, match="no command"):
        choices.trie([])


def test_allowed_along_a_reply(policy: Policy) -> None:
    choices = CommandChoices(policy.chat.reply_ids)
    ids = policy.chat.reply_ids("go to kitchen")
    allowed = allowed_along(choices.trie(COMMANDS), ids)
    assert allowed is not None
    replies = [policy.chat.reply_ids(c) for c in COMMANDS]
    for t, among in enumerate(allowed):
        assert set(among) == {r[t] for r in replies if r[:t] == ids[:t]}
    assert allowed_along(choices.trie(COMMANDS), policy.chat.reply_ids("go to red")) is None


def test_logprobs_follow_the_definition_over_turns(policy: Policy) -> None:
    choices = CommandChoices(policy.chat.reply_ids)
    generator = torch.Generator().manual_seed(0)
    sampler = Sampler(policy, SamplingConfig(), generator)
    prompts = {s: [5 + s, 9, 30, *range(3, 3 + 4 * s)] for s in range(4)}
    for turn in range(4):
        offered = {s: COMMANDS[(s + turn) % 4 :] for s in prompts}
        tries = {s: choices.trie(offered[s]) for s in prompts}
        for slot, sample in sampler.sample(prompts, tries).items():
            replies = [policy.chat.reply_ids(c) for c in offered[slot]]
            assert sample.ids in replies
            assert sample.allowed == allowed_along(tries[slot], sample.ids)
            expected = plain_choice_logprob(policy, prompts[slot], replies, sample.ids)
            assert sum(sample.logprobs) == pytest.approx(expected, abs=1e-5)
            prompts[slot] += [*sample.ids, 40 + turn, 17]
    assert sampler.computed_tokens < sampler.prompt_tokens / 2


def test_the_probabilities_of_all_commands_sum_to_one(policy: Policy) -> None:
    replies = [policy.chat.reply_ids(c) for c in COMMANDS]
    prompt = [9, 30, 44]
    logprobs = [plain_choice_logprob(policy, prompt, replies, r) for r in replies]
    assert sum(map(math.exp, logprobs)) == pytest.approx(1.0, abs=1e-9)
    n = 3000
    trie = CommandChoices(policy.chat.reply_ids).trie(COMMANDS)
    drawn = [s.ids for s in draw(policy, dict.fromkeys(range(n), prompt), trie, 1).values()]
    statistic = sum(
        (drawn.count(r) - n * math.exp(p)) ** 2 / (n * math.exp(p))
        for r, p in zip(replies, logprobs, strict=True)
    )
    # Pearson's statistic with 6 degrees of freedom: mean 6, deviation 3.5
    assert statistic < 6 + 6 * 3.5


def test_the_only_command_costs_no_forward_pass(policy: Policy) -> None:
    trie = CommandChoices(policy.chat.reply_ids).trie(["look"])
    generator = torch.Generator()
    sampler = Sampler(policy, SamplingConfig(), generator)
    sample = sampler.sample({0: [5, 6, 7]}, {0: trie})[0]
    assert sample.ids == policy.chat.reply_ids("look")
    assert sample.logprobs == (0.0,) * len(sample.ids)
    assert sampler.computed_tokens == 0


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    words=st.lists(
        st.lists(
            st.sampled_from(["go", "to", "red", "apple", "door", "1"]), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=9,
    ),
    seed=st.integers(0, 99),
)
def test_greedy_takes_the_most_likely_token_of_each_choice(
    policy: Policy, words: list[list[str]], seed: int
) -> None:
    commands = [" ".join(w) for w in words]
    trie = CommandChoices(policy.chat.reply_ids).trie(commands)
    prompt = [3 + seed, 11, 4]
    sampler = Sampler(policy, SamplingConfig(), torch.Generator(), greedy=True)
    sample = sampler.sample({0: prompt}, {0: trie})[0]
    ids: list[int] = []
    for t in itertools.count():
        following = {
            r[t] for c in commands if len(r := policy.chat.reply_ids(c)) > t and r[:t] == tuple(ids)
        }
        if not following:
            break
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
        ids.append(max(following, key=lambda i: float(logits[i])))
    assert list(sample.ids) == ids
