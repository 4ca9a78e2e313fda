"""Choice among commands, for each form of replies.

A reply that is only a command is chosen from its first token. One that says something first, and
then `<action>command</action>`, is free until `<action>` is written; there the choice begins. So a
policy may think what it likes, and still gives no command that is not admissible.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from untwine.policy.choices import Choices, CommandChoices, Later, Node
from untwine.prompting.parser import ACTION, ACTION_END
from untwine.prompting.prompter import Prompter, command_text


def command_choices(prompter: Prompter) -> CommandChoices:
    """The choices for replies as this prompter writes them."""
    if prompter.config.reasons:
        return TaggedChoices(prompter)
    return CommandChoices(prompter.reply_ids)


class TaggedChoices(CommandChoices):
    """Choices that begin inside `<action>`."""

    def __init__(self, prompter: Prompter) -> None:
        super().__init__(prompter.chat.reply_ids)
        self._chat, self._config = prompter.chat, prompter.config

    def among(self, commands: Iterable[str]) -> Choices:
        return Later(functools.partial(self._after, self._endings(commands)))

    def trie(self, commands: Iterable[str]) -> Node:
        """The trie of what follows `<action>`."""
        return super().trie(self._endings(commands))

    def _endings(self, commands: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{command_text(self._config, command)}{ACTION_END}" for command in commands)

    def _after(self, endings: tuple[str, ...], ids: Sequence[int]) -> Node | None:
        """The trie of the endings once `<action>` is written. The token that closes it may hold the
        first letters of an ending, or space before it; where no ending begins so, the reply is
        over, and cannot be read."""
        if ACTION[-1] not in self._chat.piece(ids[-1]):
            return None
        text, _ = self._chat.decode(tuple(ids))
        _, written, begun = text.partition(ACTION)
        if not written:
            return None
        begun = begun.lstrip()
        rest = tuple(end[len(begun) :] for end in endings if end.startswith(begun))
        return super().trie(rest) if rest else {}
