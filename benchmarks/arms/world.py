"""Where the arms of the iteration benchmark act: ALFWorld that goes on for T turns, and a model
that has been warmed up by imitation, so that it really acts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from untwine.config import Recipe, make_recipe
from untwine.demonstrations import play_experts
from untwine.envs.alfworld.env import AlfWorldEnv, Catalogue
from untwine.envs.pool import EnvPool
from untwine.envs.protocol import EnvFamily, Reset
from untwine.envs.splits import load_splits
from untwine.progress import Display
from untwine.prompting.chat import Chat
from untwine.records import Observation, TaskRef
from untwine.training.loop import train
from untwine.workshop import TaskCursor, training_refs

ENDLESS = "endless-alfworld"
TASKS = ("look_at_obj_in_light",)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for all arms.

    An iteration plays `groups * group_size` episodes of `turns` replies with at most `new_tokens`
    tokens each. Forward passes with a token budget hold `microbatch_tokens`. Every prompt begins
    with `examples` worked games, as those for pretrained models do: ReAct (arXiv 2210.03629) shows
    two or three.
    """

    groups: int
    group_size: int
    turns: int
    new_tokens: int
    hidden: int
    layers: int
    warm_up: int
    repeats: int
    seed: int
    threads: int
    examples: int = 0
    microbatch_tokens: int = 16384
    lr: float = 1e-5

    @property
    def episodes(self) -> int:
        return self.groups * self.group_size

    @property
    def iterations(self) -> int:
        """The first one is not counted."""
        return 1 + self.repeats

    def recipe(self) -> Recipe:
        """The recipe of the warm-up, and of the untwine arm."""
        tiny = {
            "hidden_size": self.hidden,
            "layers": self.layers,
            "heads": self.hidden // 32,
            "kv_heads": self.hidden // 64,
            "intermediate_size": 8 * self.hidden // 3,
        }
        return make_recipe(
            {
                "name": "warm-up",
                "seed": self.seed,
                "env": {
                    "name": "alfworld",
                    "tasks": list(TASKS),
                    "max_steps": self.turns,
                    "sessions": self.episodes,
                },
                "prompt": {"instructions": worked_examples(self.examples)},
                "policy": {"device": "cpu", "threads": self.threads, "tiny": tiny},
                "sampling": {"max_new_tokens": self.new_tokens},
                "cold_start": {
                    "episodes": 256,
                    "steps": self.warm_up,
                    "batch_tokens": 2048 * (1 + self.examples),
                    "optimizer": {"lr": 3e-3, "warmup": 10},
                },
                "rl": {
                    "iterations": 0,
                    "microbatch_tokens": self.microbatch_tokens,
                    "optimizer": {"lr": self.lr},
                },
                "evaluate": {"episodes": 0},
            }
        )

    def refs(self) -> list[list[TaskRef]]:
        """The games of each iteration, the same for every arm."""
        env = self.recipe().env
        splits = load_splits(env.name, env.splits, env.options, env.held_out_tasks)
        cursor = TaskCursor(training_refs(env, splits), self.seed)
        return [cursor.take(self.groups) for _ in range(self.iterations)]


class Count(NamedTuple):
    """One iteration of one arm.

    steps          replies
    sent, valid    commands that reached the environment, and those that it understood
    sampled        tokens of replies
    tokens         tokens of the episodes, prompt and observations included, each once
    """

    seconds: float
    seconds_rollout: float
    episodes: int
    steps: int
    sent: int
    valid: int
    sampled: int
    tokens: int


class Arm(Protocol):
    """One way of doing an iteration."""

    def run(self, setting: Setting, model: Path, turn: Turn) -> None:
        """Do all iterations, each between `turn.wait()` and `turn.done(count)`."""


class Turn(Protocol):
    def wait(self) -> None:
        """Until it is this arm's turn."""

    def done(self, count: Count) -> None:
        """Say what this iteration was."""


class EndlessAlfWorld(AlfWorldEnv):
    """ALFWorld that goes on after it is won, as the real one can be played on. So episodes of every
    arm have the same length. The outcome is the share of commands that were understood, so that
    episodes of a group differ and the advantages are not zero.

    sent, valid   commands since the environment was made
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.sent = self.valid = 0
        self._begun = (0, 0)

    def reset(self, task: str, variation: int) -> Reset:
        self._begun = (self.sent, self.valid)
        goal, observation = super().reset(task, variation)
        return Reset(goal, self._endless(observation))

    def step(self, command: str) -> Observation:
        observation = super().step(command)
        self.sent += 1
        self.valid += observation.invalid is None
        return self._endless(observation)

    @property
    def outcome(self) -> float:
        sent, valid = self.sent - self._begun[0], self.valid - self._begun[1]
        return valid / sent if sent else 0.0

    def _endless(self, observation: Observation) -> Observation:
        return dataclasses.replace(
            observation, score=self.outcome, outcome=self.outcome, done=False, success=False
        )


@functools.cache
def worked_examples(count: int) -> str:
    """Episodes of an expert that searches, as text; of games that no arm plays (the set `dev`)."""
    if not count:
        return ""
    refs = load_splits("alfworld", "default", {}, None).refs("dev", tasks=TASKS, limit=4 * count)
    with EnvPool("alfworld", {}, workers=0, sessions=8, timeout_s=60) as pool:
        played = play_experts(pool, refs, max_steps=30, expert="search")[:count]
    shown = ["Examples of solved tasks:"]
    for transcript in played:
        lines = [f"Task: {transcript.goal}", transcript.moves[0].before.text]
        for move in transcript.moves:
            lines += [f"> {move.command.text}", move.after.text]
        shown.append("\n".join(lines))
    return "\n\n".join(shown)


FAMILY = EnvFamily(Catalogue(), EndlessAlfWorld, ())


def warm_up(setting: Setting, folder: Path) -> Path:
    """The folder of a model that has imitated experts, made in `folder`."""
    return train(setting.recipe(), folder, Display(quiet=True))


def load(setting: Setting, model: Path) -> tuple[Any, Any, Chat]:
    """(model, tokenizer, view of its chat template), as transformers loads them, for the arms that
    are not ours."""
    torch.set_num_threads(setting.threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    )
    return loaded, tokenizer, Chat(tokenizer)
