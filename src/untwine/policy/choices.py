"""Choice among the admissible commands, token by token.

The commands that are admissible in a state form a trie of token ids. A reply walks down from its
root: at each token the policy's distribution is restricted to the children of the node and
normalised again, so the log-probability of a command is exactly the sum over its tokens of

    log softmax(logits restricted to the children)[token],

and every admissible command, and nothing else, can be drawn. Where a node has one child the token
is forced: its log-probability is 0, and the model need not be asked.

Where a reply says something before its command, this part is free, and the choice begins later
(prompting/choosing.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Node = dict[int, "Node"]  # the children of a node by token id; a leaf has none
_REMEMBERED = 500


@dataclass(frozen=True, slots=True)
class Later:
    """A choice that begins within a reply.

    node_after  the trie of what may follow these ids of a reply; None while its text is free
    """

    node_after: Callable[[Sequence[int]], Node | None]


Choices = Node | Later


class CommandChoices:
    """Tries of commands for one tokenizer. They are remembered: do not change them.

    reply_ids   ids of the reply that is a command (`Prompter.reply_ids`)
    """

    def __init__(self, reply_ids: Callable[[str], tuple[int, ...]]) -> None:
        self._reply_ids = reply_ids
        self._trie = functools.lru_cache(_REMEMBERED)(self._built)

    def among(self, commands: Iterable[str]) -> Choices:
        """What a reply may be that gives one of the commands. ValueError when there are none."""
        return self.trie(commands)

    def trie(self, commands: Iterable[str]) -> Node:
        """The trie of the commands, each followed by the end token. ValueError when there are
        none."""
        return self._trie(tuple(commands))

    def _built(self, commands: tuple[str, ...]) -> Node:
        if not commands:
            raise ValueError("there is no command to choose from")
        root: Node = {}
        for command in commands:
            node = root
            for token in self._reply_ids(command):
                node = node.setdefault(token, {})
        return root


def allowed_along(choices: Choices, ids: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """For each token of a reply the ids among which it is chosen, none where its text is free; None
    when the reply cannot be given."""
    allowed: list[tuple[int, ...]] = []
    node = None if isinstance(choices, Later) else choices
    for place, token in enumerate(ids, 1):
        if node is not None:
            if token not in node:
                return None
            allowed.append(tuple(node))
            node = node[token]
        else:
            assert isinstance(choices, Later)
            allowed.append(())
            node = choices.node_after(ids[:place])
    return None if node is None else tuple(allowed)
