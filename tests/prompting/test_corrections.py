"""Instructions against flawed actions: the data, and their place in the prompt."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from untwine.config import CorrectionConfig, PromptConfig
from untwine.errors import ConfigError
from untwine.policy.loading import Policy
from untwine.prompting.corrections import instructions
from untwine.prompting.prompter import Prompter
from untwine.records import Episode, Observation, Step, TaskRef

CONCEPTS = Path(__file__).parents[2] / "docs" / "concepts.md"
TOLD = ("Do not dawdle.", "Do not sing.")


def test_every_kind_that_a_rule_calls_flawed_has_a_sentence() -> None:
    kinds = re.findall(r"^\| `rule` \| `(\w+)` \| flawed", CONCEPTS.read_text(), re.MULTILINE)
    found = instructions(CorrectionConfig())
    assert sorted(found) == sorted(kinds)
    assert all(re.fullmatch(r"[A-Z][a-z ]+\.", sentence) for sentence in found.values())
    assert len(set(found.values())) == len(kinds)


def test_a_recipe_changes_sentences() -> None:
    plain = instructions(CorrectionConfig())
    own = instructions(CorrectionConfig(sentences={"undo": "  Go\n on. "}))
    assert own == {**plain, "undo": "Go on."}
    assert list(own) == list(plain)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kinds": ["repeats"]}, "correction.kinds: unknown kind 'repeats'; known are invalid, "),
        ({"kinds": ["repeats"]}, "Did you mean 'repeat'?"),
        ({"sentences": {"return": "x"}}, "correction.sentences: unknown kind 'return'"),
        ({"sentences": {"undo": " \n"}}, "correction.sentences.undo is empty; write a sentence"),
    ],
)
def test_one_sentence(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        instructions(CorrectionConfig.model_validate(config))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def prompts(
    policy: Policy, layout: str, told: tuple[str, ...], goal: str = "fetch it", way: str = "a"
) -> list[tuple[int, ...]]:
    """All prompts of an episode of four steps; `way` is in what it does and sees."""
    config = PromptConfig(layout=layout, history=1, task="both")  # type: ignore[arg-type]
    conversation = Prompter(policy.chat, config).begin(goal, "obs-0", None, told)
    found = [conversation.prompt_ids]
    reply = (*policy.chat.word_ids("go"), policy.tokenizer.eos_token_id)
    for t in range(1, 4):
        conversation.advance(reply, f"{way}-{t}", f"obs-{way}-{t}")
        found.append(conversation.prompt_ids)
    assert conversation.fork().told == told
    return found


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return len(list(equal))


@pytest.mark.parametrize("layout", ["append", "window"])
def test_what_is_told_stands_once_at_the_beginning_of_every_prompt(
    policy: Policy, layout: str
) -> None:
    plain, told = prompts(policy, layout, ()), prompts(policy, layout, TOLD)
    for without, with_it in zip(plain, told, strict=True):
        a, b = (policy.tokenizer.decode(ids) for ids in (without, with_it))
        assert b.count(" ".join(TOLD)) == 1
        assert b.replace(" " + " ".join(TOLD), "") == a
        assert b.index(TOLD[0]) < b.index("<|start|>user")
    assert prompts(policy, layout, ()) == plain


@pytest.mark.parametrize("layout", ["append", "window"])
def test_the_shared_head_of_a_group_is_longer_by_what_is_told(policy: Policy, layout: str) -> None:
    extra = len(prompts(policy, layout, TOLD)[0]) - len(prompts(policy, layout, ())[0])
    assert extra > 0
    for t in range(4):
        heads = [
            common(*(prompts(policy, layout, told, way=way)[t] for way in ("a", "b")))
            for told in ((), TOLD)
        ]
        assert heads[1] == heads[0] + extra
    # groups that are told the same share it, too: it comes before the task
    first, other = (prompts(policy, layout, TOLD, goal=goal)[0] for goal in ("fetch", "open"))
    assert TOLD[1] in policy.tokenizer.decode(first[: common(first, other)])


def test_verdict_prompts_are_without_it(policy: Policy) -> None:
    now = Observation("you are here", "s", 0.0, 0.0, False, False)
    prompter = Prompter(policy.chat, PromptConfig())
    asked = []
    for told in ((), TOLD):
        ids = prompter.begin("fetch it", now.text, None, told).prompt_ids
        step = Step.played(0, now, "go", now, prompt_ids=ids, action_ids=(1,))
        episode = Episode(
            "e", TaskRef("rooms", "fetch", 0), "fetch it", (step,), 0.0, 0.0, False, "limit", told
        )
        asked.append(
            (prompter.verdict_ids(episode, 0), prompter.pair_ids(episode, 0, "go", "stay"))
        )
    assert asked[0] == asked[1]
