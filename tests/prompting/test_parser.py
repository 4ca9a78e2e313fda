"""The parser says why there is no command."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from untwine.prompting.parser import MAX_COMMAND_CHARS, PROBLEM_FEEDBACK, parse_reply


@pytest.mark.parametrize(
    ("text", "ended", "command", "problem"),
    [
        ("go to  kitchen ", True, "go to kitchen", None),
        ("go to kit", False, None, "unfinished"),
        ("  ", True, None, "empty"),
        ("look\ngo north", True, None, "several_lines"),
        ("x" * (MAX_COMMAND_CHARS + 1), True, None, "too_long"),
        ("Reset  Task", True, None, "blocked"),
    ],
)
def test_plain(text: str, ended: bool, command: str | None, problem: str | None) -> None:
    reply = parse_reply(text, ended=ended, thoughts=False, blocked=["reset task"])
    assert (reply.command, reply.problem) == (command, problem)


@pytest.mark.parametrize(
    ("text", "ended", "command", "thought", "problem"),
    [
        ("<think>a\nb</think><action>look</action>", True, "look", "a\nb", None),
        ("<action>look</action>", False, "look", None, None),
        ("<think>only</think>", True, None, "only", "no_action_tag"),
        ("<think>never ends", False, None, None, "unfinished"),
        ("<action>a</action><action>b</action>", True, None, None, "several_actions"),
        ("<think>I could <action>x</action></think><action>y</action>", True, "y",
         "I could <action>x</action>", None),
        ("<action>  </action>", True, None, None, "empty"),
    ],
)  # fmt: skip
def test_tagged(
    text: str, ended: bool, command: str | None, thought: str | None, problem: str | None
) -> None:
    reply = parse_reply(text, ended=ended, thoughts=True)
    assert (reply.command, reply.thought, reply.problem) == (command, thought, problem)


def test_admissible_list() -> None:
    accepted = parse_reply("go  north", ended=True, thoughts=False, admissible=["go north"])
    assert accepted.command == "go north"
    refused = parse_reply("go south", ended=True, thoughts=False, admissible=["go north"])
    assert refused.problem == "not_admissible"


@given(st.text(max_size=300), st.booleans(), st.booleans())
def test_never_raises_and_always_explains(text: str, ended: bool, thoughts: bool) -> None:
    reply = parse_reply(text, ended=ended, thoughts=thoughts, blocked=["reset task"])
    assert (reply.command is None) != (reply.problem is None)
    if reply.problem:
        assert PROBLEM_FEEDBACK[reply.problem]
