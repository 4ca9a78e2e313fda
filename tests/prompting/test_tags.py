"""Reasoning tags: in the prompt, in replies, and in what an expert would have written."""

from __future__ import annotations

import dataclasses

import pytest

from tests.builders import make_step
from untwine.config import PromptConfig
from untwine.prompting.parser import PROBLEM_FEEDBACK, parse_reply
from untwine.prompting.prompter import system_text
from untwine.prompting.tags import TAG_USES, TAGS, Tagged, expert_tags, failures
from untwine.records import Step


@pytest.mark.parametrize(
    ("text", "command", "tag", "thought", "problem"),
    [
        ("<planning>a\nb</planning><action>look</action>", "look", "planning", "a\nb", None),
        ("<monitor>x</monitor> so <action>go  on</action>", "go on", "monitor", "x", None),
        ("<action>look</action>", None, None, None, "no_tag"),
        ("<explore> </explore><action>look</action>", None, None, "", "no_tag"),
        ("<explore>x<action>look</action>", None, None, None, "no_tag"),
        ("<Explore>x</Explore><action>look</action>", None, None, None, "no_tag"),
        ("<explore>x</monitor><action>look</action>", None, None, None, "no_tag"),
        ("<explore>x</explore><explore>y</explore><action>look</action>", None, None, "x",
         "several_tags"),
        ("<explore>x</explore><action>look</action><monitor>y</monitor>", None, None, "x",
         "several_tags"),
        ("<explore>x</explore>", None, None, "x", "no_action_tag"),
        ("<action>look</action><explore>x</explore>", None, None, "x", "no_action_tag"),
        ("<explore>or <action>x</action>?</explore><action>y</action>", "y", "explore",
         "or <action>x</action>?", None),
        ("<explore>no <monitor>m</monitor></explore><action>y</action>", "y", "explore",
         "no <monitor>m</monitor>", None),
        ("<explore>x</explore><action></action>", None, None, "x", "empty"),
        ("<explore>x</explore><action>quit</action>", None, None, "x", "blocked"),
    ],
)  # fmt: skip
def test_replies(
    text: str, command: str | None, tag: str | None, thought: str | None, problem: str | None
) -> None:
    reply = parse_reply(text, ended=True, thoughts=False, tags=True, blocked=["quit"])
    assert (reply.command, reply.tag, reply.thought, reply.problem) == (
        command,
        tag,
        thought,
        problem,
    )
    assert problem is None or PROBLEM_FEEDBACK[problem]


def test_a_reply_that_was_cut_off_is_unfinished() -> None:
    for text in ("<explore>x", "<explore>x</explore><action>loo", ""):
        assert parse_reply(text, ended=False, thoughts=False, tags=True).problem == "unfinished"


def test_a_thought_may_come_first() -> None:
    text = "<think>not <monitor>m</monitor></think><explore>x</explore><action>look</action>"
    reply = parse_reply(text, ended=True, thoughts=True, tags=True)
    assert (reply.command, reply.tag) == ("look", "explore")
    assert reply.thought == "not <monitor>m</monitor>\nx"
    assert parse_reply(text, ended=True, thoughts=False, tags=True).problem == "several_tags"


def test_without_tags_they_are_plain_text() -> None:
    text = "<explore>x</explore><action>look</action>"
    assert parse_reply(text, ended=True, thoughts=True).command == "look"
    assert parse_reply(text, ended=True, thoughts=True).tag is None
    assert parse_reply(text, ended=True, thoughts=False).command == text


def test_the_prompt_says_what_is_asked_for() -> None:
    plain, thinking = system_text(PromptConfig()), system_text(PromptConfig(thoughts=True))
    tagged, both = (
        system_text(PromptConfig(tags=True)),
        system_text(PromptConfig(tags=True, thoughts=True)),
    )
    assert plain == "You act in a text environment to solve a task. Reply with one command."
    assert thinking == (
        "You act in a text environment to solve a task. Think inside <think></think>, "
        "then give one command inside <action></action>."
    )
    for tag, use in TAG_USES.items():
        assert f"<{tag}></{tag}> {use}" in tagged
        assert f"<{tag}>" not in thinking
    assert "<think>" not in tagged
    assert both.index("<think>") < both.index("<planning>") < both.index("<action>")


def walk(*moves: tuple[str, str, str] | tuple[str, str, str, str]) -> list[Step]:
    """Steps from (way, command, answer, why invalid)."""
    return [
        make_step(t, state=m[0][0], after=m[0][1], command=m[1], invalid=m[3] if m[3:] else None)
        for t, m in enumerate(moves)
    ]


def test_failures() -> None:
    steps = walk(
        ("aa", "look", ""),  # once is fine
        ("aa", "Look", ""),  # twice is not
        ("ab", "jump", ""),
        ("bb", "look", ""),  # another state
        ("bb", "xyzzy", "", "unknown"),
        ("ba", "look", ""),  # said before here, but now it did something
    )
    assert failures(steps) == [False, True, False, False, True, False]
    assert failures([]) == []


def test_an_expert_tags_by_rule() -> None:
    told = ["a door", "the door is open", "nothing", "a door 7", "the door", "an apple", "door"]
    ways = ["ab", "bc", "cc", "cd", "de", "ef", "fg"]
    said = ["go", "open door", "dance", "go on", "go to 1", "look in 2", "go to 3"]
    steps = [
        make_step(t, state=w[0], after=w[1], command=c, invalid="unknown" if c == "dance" else None)
        for t, (w, c) in enumerate(zip(ways, said, strict=True))
    ]
    steps = [
        dataclasses.replace(s, feedback=f, observation="an empty room")
        for s, f in zip(steps, told, strict=True)
    ]
    luck = [False] * 6 + [True]
    assert expert_tags("open  the\ndoor", steps, luck) == [
        Tagged("planning", "open the door"),
        Tagged("explore", "find out more: open the door"),  # "is" was not read before
        Tagged("explore", "find out more: open the door"),  # nor "nothing"
        Tagged("reflection", "dance did not help: open the door"),
        Tagged("monitor", "go on: open the door"),
        Tagged("explore", "find out more: open the door"),
        Tagged("explore", "find out more: open the door"),  # luck
    ]


def test_a_long_goal_is_cut_between_words() -> None:
    ((tag, words),) = expert_tags("fetch " * 100, walk(("ab", "go", "")), [False])
    assert tag == "planning"
    assert len(words) <= 120
    assert set(words.split()) == {"fetch"}


@pytest.mark.parametrize("tag", TAGS)
def test_what_an_expert_writes_can_be_read(tag: str) -> None:
    reply = parse_reply(
        f"{Tagged(tag, 'some words')}<action>look</action>", ended=True, thoughts=False, tags=True
    )
    assert (reply.command, reply.tag, reply.thought) == ("look", tag, "some words")
