"""Episodes played turn by turn, for arms that read the whole history at every turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from arms.world import EndlessAlfWorld
from untwine.prompting.parser import PROBLEM_FEEDBACK, parse_reply
from untwine.prompting.prompter import Prompter
from untwine.records import TaskRef

Reply = tuple[tuple[int, ...], tuple[float, ...]]  # ids and their log-probabilities
Replier = Callable[[Sequence[tuple[int, ...]]], list[Reply]]


class Played(NamedTuple):
    """One step."""

    prompt_ids: tuple[int, ...]
    action_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(slots=True)
class Game:
    """An episode. `outcome` as `EndlessAlfWorld` has it."""

    steps: list[Played] = field(default_factory=list)
    outcome: float = 0.0

    @property
    def tokens(self) -> int:
        """Prompt, replies and observations, each once."""
        return len(self.steps[-1].prompt_ids) + len(self.steps[-1].action_ids)

    @property
    def sampled(self) -> int:
        return sum(len(step.action_ids) for step in self.steps)


def play(
    refs: Sequence[TaskRef],
    envs: Sequence[EndlessAlfWorld],
    prompter: Prompter,
    reply: Replier,
    turns: int,
) -> list[Game]:
    """One episode of `turns` replies for every ref, side by side."""
    games = [Game() for _ in refs]
    conversations = []
    for ref, env in zip(refs, envs, strict=True):
        goal, observation = env.reset(ref.task, ref.variation)
        conversations.append(prompter.begin(goal, observation.text))
    for _ in range(turns):
        prompts = [conversation.prompt_ids for conversation in conversations]
        replies = reply(prompts)
        for game, env, conversation, (ids, logprobs) in zip(
            games, envs, conversations, replies, strict=True
        ):
            game.steps.append(Played(conversation.prompt_ids, ids, logprobs))
            text, ended = prompter.chat.decode(ids)
            parsed = parse_reply(text, ended=ended, thoughts=False)
            if parsed.command is None:
                answer = PROBLEM_FEEDBACK[parsed.problem or "empty"]
            else:
                answer = env.step(parsed.command).text
            conversation.advance(ids, parsed.command or text, answer)
    for game, env in zip(games, envs, strict=True):
        game.outcome = env.outcome
    return games


def left_padded(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[list[list[int]], int]:
    """(ids with padding on the left, their common length)."""
    width = max(map(len, prompts))
    return [[pad] * (width - len(ids)) + list(ids) for ids in prompts], width


def cut(ids: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    """Ids up to the first end token, which is kept."""
    for position, token in enumerate(ids):
        if token in ends:
            return tuple(ids[: position + 1])
    return tuple(ids)
