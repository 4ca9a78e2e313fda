"""From the text of a reply to a command, or to the reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from untwine.prompting.tags import read_tags
from untwine.prompting.word_order import verb_first

MAX_COMMAND_CHARS = 200
ACTION, ACTION_END = "<action>", "</action>"
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ACTION = re.compile(f"{ACTION}(.*?){ACTION_END}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a reply means.

    command  the command to send, or None
    thought  the text inside <think> and inside the reasoning tag, if any
    problem  why there is no command: unfinished, empty, no_action_tag, several_actions, no_tag,
             several_tags, several_lines, too_long, blocked, not_admissible
    tag      the reasoning tag (prompting/tags.py) before the command; a refused reply has none
    """

    command: str | None
    thought: str | None
    problem: str | None
    tag: str | None = None


def normalise(command: str) -> str:
    """White space folded, for comparing commands."""
    return " ".join(command.split())


def parse_reply(
    text: str,
    *,
    ended: bool,
    thoughts: bool,
    tags: bool = False,
    verb_last: bool = False,
    blocked: Collection[str] = (),
    admissible: Collection[str] | None = None,
) -> Reply:
    """Read one reply.

    ended       the model closed its turn (it was not cut off by the token limit)
    thoughts    the reply must hold `<action>…</action>`, and may hold `<think>…</think>` before it
    tags        the reply must hold exactly one reasoning tag, not empty, and `<action>…</action>`
                after it
    verb_last   the first word of the command is its last one
    blocked     commands that are never sent
    admissible  if given, the only commands that are accepted
    """
    said: list[str] = []
    tag: str | None = None
    body, problem = text, None if ended else "unfinished"
    if thoughts or tags:
        if thoughts and (match := _THINK.search(text)):
            said.append(match.group(1).strip())
            text = text[match.end() :]
        tagged, end = read_tags(text) if tags else ([], 0)
        said += [one.words for one in tagged[:1]]
        if len(tagged) == 1 and tagged[0].words:
            tag = tagged[0].tag
        body, problem = _action(text[end:], ended)
        if tags and tag is None and problem != "unfinished":
            problem = "several_tags" if len(tagged) > 1 else "no_tag"
    thought = "\n".join(said) if said else None
    body = body.strip()
    if problem is None and "\n" in body:
        problem = "several_lines"
    command = verb_first(body) if verb_last else normalise(body)
    problem = problem or _refusal(command, blocked, admissible)
    return Reply(None, thought, problem) if problem else Reply(command, thought, None, tag)


def _action(text: str, ended: bool) -> tuple[str, str | None]:
    """(what the only `<action>` holds, or why there is none)."""
    actions = _ACTION.findall(text)
    if len(actions) == 1:
        return actions[0], None
    if actions:
        return "", "several_actions"
    return "", "no_action_tag" if ended else "unfinished"


def _refusal(
    command: str, blocked: Collection[str], admissible: Collection[str] | None
) -> str | None:
    if not command:
        return "empty"
    if len(command) > MAX_COMMAND_CHARS:
        return "too_long"
    if command.lower() in {normalise(b).lower() for b in blocked}:
        return "blocked"
    if admissible is not None and command not in {normalise(a) for a in admissible}:
        return "not_admissible"
    return None


# What the agent reads instead of an observation when nothing was sent to the environment.
PROBLEM_FEEDBACK = {
    "unfinished": "Your reply was cut off before it ended. Reply with one short command.",
    "empty": "Your reply was empty. Reply with one command.",
    "no_action_tag": "Your reply held no <action>command</action>.",
    "no_tag": "Your reply did not begin with one of the tags.",
    "several_tags": "Your reply held several tags. Give exactly one.",
    "several_actions": "Your reply held several actions. Give exactly one.",
    "several_lines": "Your reply held several lines. Give exactly one command.",
    "too_long": "Your command was too long.",
    "blocked": "That command is not allowed.",
    "not_admissible": "That command is not possible here.",
}
