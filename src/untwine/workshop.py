"""Everything a recipe needs in order to act, put together once: pool, policy, collector."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from untwine.config import EnvConfig, Recipe
from untwine.demonstrations import Transcript, play_experts
from untwine.envs.pool import EnvPool
from untwine.envs.registry import get_catalogue
from untwine.envs.splits import SplitFile, load_splits
from untwine.errors import EnvError
from untwine.policy.loading import Policy, check_exactness, load_policy
from untwine.policy.sampler import Sampler
from untwine.progress import Display
from untwine.prompting.corrections import instructions
from untwine.records import TaskRef
from untwine.rollout import Collector


def open_pool(env: EnvConfig, *, list_commands: bool = False) -> EnvPool:
    """The pool a recipe asks for; `list_commands` has every observation list the commands."""
    info = get_catalogue(env.name, env.options).info
    if info.remote and env.workers == 0:
        raise EnvError(f"{info.title} needs worker processes; set env.workers=1 or more")
    options = {**env.options, "list_commands": True} if list_commands else env.options
    return EnvPool(
        env.name,
        options,
        workers=env.workers,
        sessions=env.sessions,
        timeout_s=env.timeout_s,
    )


def read_splits(env: EnvConfig) -> SplitFile:
    """The sets of the environment. EnvError when they cannot be read."""
    return load_splits(env.name, env.splits, env.options, env.held_out_tasks)


def training_refs(env: EnvConfig, splits: SplitFile, variations: int = 0) -> list[TaskRef]:
    """The task instances of the training set, or the first `variations` of every task. EnvError
    when there are none."""
    limits = [limit for limit in (env.variations, variations) if limit]
    refs = splits.refs(env.train_set, tasks=env.tasks, limit=min(limits, default=0))
    if not refs:
        raise EnvError(
            f"set {env.train_set!r} of environment {env.name!r} is empty, so there is nothing to "
            "train on; choose another env.train_set or env.splits"
        )
    return list(refs)


class TaskCursor:
    """Hands out task instances: every pass over them in a new order that depends on the seed and
    the number of the pass only, so the place in the stream is one integer."""

    def __init__(self, refs: Sequence[TaskRef], seed: int, position: int = 0) -> None:
        self._refs = list(refs)
        self._seed = seed
        self.position = position

    def take(self, count: int) -> list[TaskRef]:
        return [self._next() for _ in range(count)]

    def _next(self) -> TaskRef:
        passes, index = divmod(self.position, len(self._refs))
        order = list(range(len(self._refs)))
        random.Random(f"{self._seed}/{passes}").shuffle(order)
        self.position += 1
        return self._refs[order[index]]


class Workshop:
    """Pool, policy and collector of one recipe. Close it, or use it as a context.

    model   folder to load the policy from; by default what the recipe says
    splits  of the environment, where they have been read before
    """

    def __init__(
        self,
        recipe: Recipe,
        display: Display,
        model: Path | None = None,
        splits: SplitFile | None = None,
    ) -> None:
        self.recipe = recipe
        self.display = display
        env = recipe.env
        self.splits = splits or read_splits(env)
        self.refs = training_refs(env, self.splits)
        self.pool = open_pool(env, list_commands=recipe.lists_commands)
        self.info = self.pool.info
        self._transcripts: list[Transcript] | None = None
        try:
            policy = recipe.policy
            if model is not None:
                policy = policy.model_copy(update={"model": str(model)})
            self.policy = load_policy(policy, self._texts, recipe.seed)
            self.collector = make_collector(self.policy, self.pool, recipe)
            self.collector.check_room(self.refs[0])
        except BaseException:
            self.pool.close()
            raise

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    @property
    def transcripts(self) -> list[Transcript]:
        """Expert episodes for tokenizer and cold start, played on first use."""
        if self._transcripts is None:
            self._transcripts = self._play_experts()
            if not self._transcripts:
                raise EnvError(
                    "no expert episode could be played on the training tasks: its plans are longer "
                    "than env.max_steps, or do not solve them when they are played"
                )
        return self._transcripts

    def _play_experts(self) -> list[Transcript]:
        """Every instance once before any of them is played again, with other errors."""
        if not self.info.has_expert:
            raise EnvError(
                f"{self.info.title} has no expert, so there is nothing to imitate; set "
                "cold_start.episodes to 0 and policy.model to a model that needs no cold start"
            )
        config, seed = self.recipe.cold_start, self.recipe.seed
        prompt = self.recipe.prompt
        forgets = config.expert == "systematic" and prompt.layout == "window"
        memory = prompt.history + 1 if forgets else 0  # it knows what the policy can know
        once, wanted = len(self.refs), config.episodes or 64
        if self.info.deterministic and not config.noise and config.expert == "oracle":
            wanted = min(wanted, once)
        refs = TaskCursor(self.refs, seed).take(wanted)
        found: list[Transcript] = []
        with self.display.bar("expert episodes", wanted, "episode") as bar:
            for first in range(0, wanted, once):

                def on_progress(done: int, _: int, first: int = first) -> None:
                    bar.update(first + done)

                found += play_experts(
                    self.pool,
                    refs[first : first + once],
                    self.recipe.env.max_steps,
                    noise=config.noise,
                    seed=1000 * seed + first // once,
                    valid_only=self.recipe.sampling.constrained,
                    expert=config.expert,
                    alternatives=config.alternatives,
                    memory=memory,
                    on_progress=on_progress,
                )
        return found

    def _texts(self) -> Iterator[str]:
        recipe = self.recipe
        told: list[str] = []
        if recipe.correction.kinds or recipe.cold_start.instructed:
            told = list(instructions(recipe.correction).values())
        for transcript in self.transcripts:
            yield from transcript.texts(recipe.prompt, told)


def make_collector(policy: Policy, pool: EnvPool, recipe: Recipe) -> Collector:
    """A collector for a policy whose sampling has been checked against a plain forward pass."""
    import torch

    probe = Sampler(policy, recipe.sampling, torch.Generator())
    check_exactness(policy, probe.logits_piecewise)
    return Collector(policy, pool, recipe.env.max_steps, recipe.prompt, recipe.sampling)
