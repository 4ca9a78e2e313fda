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
from dataclasses import dataclass, field

Node = dict[int, "Node"]  # the children of a node by token id; a leaf has none
_REMEMBERED = 500


@dataclass(frozen=True, slots=True)
class Later:
    """A choice that begins within a reply.

    node_after  the trie of what may follow these ids of a reply; None while its text is free
    """

    node_after: Callable[[Sequence[int]], Node | None]


Choices = Node | Later


@dataclass(slots=True)
class Walk:
    """The way of one reply through its choices.

    node     where it stands in their trie; None while the whole vocabulary is open
    later    says where the choice begins, if it does not at once
    allowed  for each id so far those it was chosen from, none where the whole vocabulary was open
    """

    node: Node | None
    later: Later | None = None
    allowed: list[tuple[int, ...]] = field(default_factory=list)

    @classmethod
    def through(cls, choices: Choices | None) -> Walk:
        """At the beginning of a reply; without choices the vocabulary stays open."""
        return cls(None, choices) if isinstance(choices, Later) else cls(choices)

    def go(self, ids: Sequence[int]) -> None:
        """On by the last one of the reply's ids. KeyError when no choice goes on so."""
        if self.node is not None:
            following = self.node[ids[-1]]
            self.allowed.append(tuple(self.node))
            self.node = following
        else:
            self.allowed.append(())
            self.node = self.later.node_after(ids) if self.later else None


class CommandChoices:
    """Tries of commands for one tokenizer. They are remembered: do not change them.

    reply_ids   ids of the reply that is a command (`Prompter.reply_ids`)
    """

    def __init__(self, reply_ids: Callable[[str], tuple[int, ...]]) -> None:
        self._reply_ids = reply_ids
        self._trie = functools.lru_cache(_REMEMBERED)(self._built)
        self._depth = functools.lru_cache(_REMEMBERED)(self._measured)

    def among(self, commands: Iterable[str]) -> Choices:
        """What a reply may be that gives one of the commands."""
        return self.trie(commands)

    def longest(self, commands: Iterable[str]) -> int:
        """Tokens of the longest reply that may be chosen, without what is free before it."""
        return self._depth(tuple(commands))

    def _measured(self, commands: tuple[str, ...]) -> int:
        return _depth(self.trie(commands))

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


def _depth(node: Node) -> int:
    return max((1 + _depth(child) for child in node.values()), default=0)


def allowed_along(choices: Choices, ids: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """For each token of a reply the ids among which it is chosen, none where its text is free; None
    when the reply cannot be given."""
    walk = Walk.through(choices)
    for end in range(1, len(ids) + 1):
        if walk.node is not None and ids[end - 1] not in walk.node:
            return None
        walk.go(ids[:end])
    return None if walk.node is None else tuple(walk.allowed)
