"""From the text of a reply to a command, or to the reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

MAX_COMMAND_CHARS = 200
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a reply means.

    command  the command to send, or None
    thought  the text inside <think>, if any
    problem  why there is no command: unfinished, empty, no_action_tag, several_actions,
             several_lines, too_long, blocked, not_admissible
    """

    command: str | None
    thought: str | None
    problem: str | None


def normalise(command: str) -> str:
    """White space folded, for comparing commands."""
    return " ".join(command.split())


def parse_reply(
    text: str,
    *,
    ended: bool,
    thoughts: bool,
    blocked: Collection[str] = (),
    admissible: Collection[str] | None = None,
) -> Reply:
    """Read one reply.

    ended       the model closed its turn (it was not cut off by the token limit)
    thoughts    the reply must hold `<action>…</action>`, and may hold `<think>…</think>` before it
    blocked     commands that are never sent
    admissible  if given, the only commands that are accepted
    """
    thought: str | None = None
    if thoughts:
        match = _THINK.search(text)
        thought = match.group(1).strip() if match else None
        actions = _ACTION.findall(text[match.end() :] if match else text)
        if not actions:
            return Reply(None, thought, "no_action_tag" if ended else "unfinished")
        if len(actions) > 1:
            return Reply(None, thought, "several_actions")
        body = actions[0]
    else:
        if not ended:
            return Reply(None, None, "unfinished")
        body = text
    body = body.strip()
    if "\n" in body:
        return Reply(None, thought, "several_lines")
    command = normalise(body)
    problem = _refusal(command, blocked, admissible)
    return Reply(None if problem else command, thought, problem)


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
    "several_actions": "Your reply held several actions. Give exactly one.",
    "several_lines": "Your reply held several lines. Give exactly one command.",
    "too_long": "Your command was too long.",
    "blocked": "That command is not allowed.",
    "not_admissible": "That command is not possible here.",
}
