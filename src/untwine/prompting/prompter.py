"""The two prompt layouts.

`append`  a chat that only grows: every step's prompt is a prefix of the next one, so a whole
          episode is one token sequence.
`window`  one question per step with the task, the last `history` pairs and the current
          observation. The fixed parts come first, so that steps share the longest possible head.

A question whether an action is good stands apart, in a prompt of its own, or it comes after the
action in the acting prompt. The latter costs only the tokens of the action and the question where
that prompt is computed anyway, and is answered from the same states that chose the action.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from untwine.config import PromptConfig
from untwine.prompting.chat import Chat
from untwine.prompting.parser import ACTION, ACTION_END
from untwine.prompting.tags import TAG_USES
from untwine.prompting.word_order import verb_last
from untwine.records import Episode

JUDGE_SYSTEM = (
    "You judge actions in a text environment. Say whether the action helps to solve the task: "
    "good or bad."
)
COMPARE_SYSTEM = (
    "You compare two actions in a text environment. Say which one helps more to solve the task: "
    "A or B."
)
VERDICT_QUESTION = "Good or bad?"
JUDGING_WORDS = f"Action:\n{VERDICT_QUESTION}\ngood\nbad\n\nA: B:\nA or B?"  # for tokenizers
VERDICT_WORDS = {"good": "good", "flawed": "bad"}
PAIR_WORDS = {"first": "A", "second": "B"}


def system_text(config: PromptConfig, told: Sequence[str] = ()) -> str:
    """What the agent is told about the form of its replies, its instructions, and then `told`,
    sentence by sentence. This is the beginning of every acting prompt in both layouts, so that what
    all episodes of a group read alike stays as long as it can be."""
    form = _form_of_replies(config)
    parts = [form, config.instructions] if config.instructions else [form]
    return " ".join(["\n\n".join(parts), *told])


def reply_text(config: PromptConfig, command: str, instead: str = "") -> str:
    """The reply that gives a command, after what the reply `instead` says before its own."""
    written = command_text(config, command)
    if not config.reasons:
        return written
    before, _, _ = instead.partition(ACTION)
    return f"{before}{ACTION}{written}{ACTION_END}"


def command_text(config: PromptConfig, command: str) -> str:
    """How a reply writes a command."""
    return verb_last(command) if config.verb_last else command


def _form_of_replies(config: PromptConfig) -> str:
    role = "You act in a text environment to solve a task."
    order = ", its first word last" if config.verb_last else ""
    if not config.reasons:
        return f"{role} Reply with one command{order}."
    before = ["think inside <think></think>"] if config.thoughts else []
    if config.tags:
        uses = ", ".join(f"<{tag}></{tag}> {use}" for tag, use in TAG_USES.items())
        before.append(f"write one sentence inside one of {uses}")
    said = ", then ".join(before)
    command = f"one command inside {ACTION}{ACTION_END}{order}"
    return f"{role} {said[0].upper()}{said[1:]}, then give {command}."


class Prompter:
    """Builds prompts for one model and one layout."""

    def __init__(self, chat: Chat, config: PromptConfig) -> None:
        self.chat = chat
        self.config = config

    def begin(
        self,
        goal: str,
        observation: str,
        admissible: Sequence[str] | None = None,
        told: tuple[str, ...] = (),
    ) -> Conversation:
        """The conversation of a new episode.

        told   sentences that all its prompts carry (`system_text`)
        """
        return Conversation(self, goal, observation, admissible, told)

    def opening_ids(
        self,
        goal: str,
        past: Sequence[tuple[str, str]],
        observation: str,
        admissible: Sequence[str] | None,
        told: Sequence[str] = (),
    ) -> tuple[int, ...]:
        """The prompt of a conversation that begins here.

        past   all (observation, action) pairs of the episode; the window chooses what is shown
        """
        first = goal if self.config.task != "end" else None
        seen = self._seen(goal, observation, admissible)
        user = state_text(first, past, seen, self.config)
        return self.chat.opening(system_text(self.config, told), user)

    def follow_up_ids(
        self,
        goal: str,
        reply_ids: tuple[int, ...],
        observation: str,
        admissible: Sequence[str] | None,
    ) -> tuple[int, ...]:
        return self.chat.follow_up(reply_ids, self._seen(goal, observation, admissible))

    @property
    def remembers(self) -> bool:
        """Whether a prompt shows every command given so far."""
        return self.config.layout == "append" or self.config.tried

    def reply_ids(self, command: str) -> tuple[int, ...]:
        """Ids of the reply that is only this command."""
        return self.written_ids(reply_text(self.config, command))

    def written_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a reply written so. What it says inside `<action>` begins with a token of its own,
        so that it has the same ids whatever is said before."""
        if not self.config.reasons:
            return self.chat.reply_ids(text)
        before, mark, rest = text.partition(ACTION)
        return self.chat.word_ids(before + mark) + self.chat.reply_ids(rest)

    def verdict_ids(self, episode: Episode, t: int, command: str | None = None) -> tuple[int, ...]:
        """Prompt that asks whether an action of step `t` is good or bad.

        command   the action in question; by default the one that was taken
        """
        if self.config.verdict == "after":
            step = episode.steps[t]
            reply = step.action_ids if command is None else self.reply_ids(command)
            return step.prompt_ids + reply + self.chat.follow_up(reply, VERDICT_QUESTION)
        user = verdict_text(episode, t, self.config, command)
        return self.chat.opening(JUDGE_SYSTEM, user)

    def pair_ids(self, episode: Episode, t: int, first: str, second: str) -> tuple[int, ...]:
        """Prompt that asks which of two actions in the state before step `t` is better."""
        past = past_text(episode, t, self.config)
        return self.chat.opening(COMPARE_SYSTEM, f"{past}\n\nA: {first}\nB: {second}\nA or B?")

    def _seen(self, goal: str, observation: str, admissible: Sequence[str] | None) -> str:
        parts = [observation]
        if self.config.list_admissible and admissible is not None:
            parts.append(f"Possible commands: {'; '.join(admissible)}")
        if self.config.task != "start":
            parts.append(f"Task: {goal}")
        return "\n\n".join(parts)


class Conversation:
    """The prompt of one episode as it goes on.

    told   sentences that all its prompts carry
    """

    def __init__(
        self,
        prompter: Prompter,
        goal: str,
        observation: str,
        admissible: Sequence[str] | None = None,
        told: tuple[str, ...] = (),
    ) -> None:
        self._prompter = prompter
        self.told = told
        self._goal = goal
        self._observation = observation
        self._past: list[tuple[str, str]] = []
        self.prompt_ids = prompter.opening_ids(goal, (), observation, admissible, told)

    def fork(self) -> Conversation:
        """A copy that goes its own way."""
        other = copy.copy(self)
        other._past = list(self._past)
        return other

    def advance(
        self,
        reply_ids: tuple[int, ...],
        shown_action: str,
        observation: str,
        admissible: Sequence[str] | None = None,
    ) -> None:
        """Move on by one step: the model replied `reply_ids`, the environment answered.

        shown_action   the action as `window` prompts show it later
        """
        prompter = self._prompter
        self._past.append((self._observation, shown_action))
        self._observation = observation
        if prompter.config.layout == "append":
            glue = prompter.follow_up_ids(self._goal, reply_ids, observation, admissible)
            self.prompt_ids = self.prompt_ids + reply_ids + glue
        else:
            self.prompt_ids = prompter.opening_ids(
                self._goal, self._past, observation, admissible, self.told
            )


def verdict_text(episode: Episode, t: int, config: PromptConfig, command: str | None = None) -> str:
    """The question whether an action of step `t` is good, after what a window shows.

    command   the action in question; by default the one that was taken
    """
    step = episode.steps[t]
    candidate = command if command is not None else action_as_shown(step.command, step.text)
    return f"{past_text(episode, t, config)}\n\nAction: {candidate}\n{VERDICT_QUESTION}"


def past_text(episode: Episode, t: int, config: PromptConfig) -> str:
    """Task, what is shown of the steps before `t`, and the observation of step `t`."""
    past = [(s.observation, action_as_shown(s.command, s.text)) for s in episode.steps[:t]]
    return state_text(episode.goal, past, episode.steps[t].observation, config)


def state_text(
    goal: str | None,
    past: Sequence[tuple[str, str]],
    now: str,
    config: PromptConfig,
) -> str:
    """The task, if any, the last `history` pairs of (observation, action), and what is there now;
    before the pairs, where the config asks for it,

    beginning  the first observation, so that all prompts of an episode begin alike
    tried      all commands of the past, each where it was first given, so that this beginning grows
    """
    parts = [f"Task: {goal}"] if goal is not None else []
    shown = past[-config.history :] if config.history else []
    if config.beginning and len(shown) < len(past):
        parts.append(past[0][0])
    if config.tried:
        commands = dict.fromkeys(action for _, action in past)
        parts.append("\n".join(["Tried:", *(f"> {command}" for command in commands)]))
    parts += [f"{observation}\n> {action}" for observation, action in shown]
    parts.append(now)
    return "\n\n".join(parts)


def action_as_shown(command: str | None, text: str) -> str:
    """How later prompts show an action: its command, or the start of a reply without one."""
    return command if command is not None else " ".join(text.split())[:200]
