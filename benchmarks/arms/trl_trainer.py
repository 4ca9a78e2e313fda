"""TRL's GRPOTrainer in the same games (extra `bench`), in the two ways it offers.

rollout      `rollout_func`: our prompts and parser, Hugging Face `generate` at every turn
environment  `environment_factory`: TRL's own loop of tool calls. A whole reply counts as the call
             of a tool, so prompts and replies are, token for token, those of the other arms. TRL
             does not carry out the last call, so the environment sees one command less.

Nothing costly is switched on: no reference model, no gradient checkpointing, one forward and
backward pass over all episodes of an iteration, each a single sequence.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from arms.generate import generate
from arms.machine import clock
from arms.turns import Reply, play
from arms.world import Count, EndlessAlfWorld, Setting, Turn, load
from untwine.prompting.prompter import Prompter, system_text
from untwine.records import TaskRef

# Shows answers of tools as ordinary questions.
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant\n",
    "fields": {
        "tool_calls": {
            "close_pattern": r"<\|end\|>",
            "content": "text",
            "repeats": True,
            "transform": {
                "type": "function",
                "function": {"name": "act", "arguments": {"command": "{content}"}},
            },
        }
    },
}


class Household:
    """An environment as TRL wants it: its public methods are the tools."""

    def __init__(self) -> None:
        self._world = EndlessAlfWorld({})

    def reset(self, task: str, variation: int, **_: Any) -> str:
        goal, observation = self._world.reset(task, variation)
        return f"Task: {goal}\n\n{observation.text}"

    def act(self, command: str) -> str:
        """
        Do something.

        Args:
            command: what to do

        Returns:
            What is seen then.
        """
        return self._world.step(command).text


class Pace(TrainerCallback):  # type: ignore[misc]
    """Lets TRL's loop wait for its turn, and counts what it did."""

    def __init__(self, setting: Setting, turn: Turn, worlds: list[EndlessAlfWorld]) -> None:
        self._setting, self._turn, self._worlds = setting, turn, worlds
        self._now = clock(setting.threads)
        self._started = self._rolled = self._ended = 0.0
        self._completions = self._seen = 0
        self._before = (0, 0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._before = self._reached()
        self._turn.wait()
        self._started = self._now()

    def rolled(self, completion_ids: Sequence[Sequence[int]]) -> None:
        """The episodes are over; `completion_ids` hold replies and observations."""
        self._rolled = self._now()
        self._completions = sum(map(len, completion_ids))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._ended = self._now()

    def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, float], **____: Any) -> None:
        if "num_tokens" not in logs:
            return  # the summary after the last step
        episodes = self._setting.episodes
        sampled = round(logs["completions/mean_length"] * episodes)
        prompts = round(logs["num_tokens"]) - self._seen - sampled
        self._seen = round(logs["num_tokens"])
        calls = logs.get("tools/call_frequency", self._setting.turns - 1)
        sent, valid = (a - b for a, b in zip(self._reached(), self._before, strict=True))
        self._turn.done(
            Count(
                seconds=self._ended - self._started,
                seconds_rollout=self._rolled - self._started,
                episodes=episodes,
                steps=round((1 + calls) * episodes),
                sent=sent,
                valid=valid,
                sampled=sampled,
                tokens=self._completions + prompts,
            )
        )

    def _reached(self) -> tuple[int, int]:
        return sum(w.sent for w in self._worlds), sum(w.valid for w in self._worlds)


def run_rollout(setting: Setting, model: Path, turn: Turn) -> None:
    network, tokenizer, chat = load(setting, model)
    prompter = Prompter(chat, setting.recipe().prompt)
    worlds = [EndlessAlfWorld({}) for _ in range(setting.episodes)]
    pace = Pace(setting, turn, worlds)

    def rollout(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        refs = [TaskRef("alfworld", *json.loads(prompt[-1]["content"])) for prompt in prompts]
        mine = trainer.accelerator.unwrap_model(trainer.model)

        def reply(histories: Sequence[tuple[int, ...]]) -> list[Reply]:
            ids = generate(
                mine,
                histories,
                setting.new_tokens,
                pad=tokenizer.pad_token_id,
                ends=chat.end_ids,
            )
            return [(row, (0.0,) * len(row)) for row in ids]

        mine.eval()
        games = play(refs, worlds, prompter, reply, setting.turns)
        mine.train()
        heads = [game.steps[0].prompt_ids for game in games]
        whole = [game.steps[-1].prompt_ids + game.steps[-1].action_ids for game in games]
        masks = []
        for game, head, ids in zip(games, heads, whole, strict=True):
            mask = [0] * len(ids)
            for step in game.steps:
                first = len(step.prompt_ids)
                mask[first : first + len(step.action_ids)] = [1] * len(step.action_ids)
            masks.append(mask[len(head) :])
        return {
            "prompt_ids": [list(head) for head in heads],
            "completion_ids": [
                list(ids[len(head) :]) for ids, head in zip(whole, heads, strict=True)
            ],
            "logprobs": None,
            "env_mask": masks,
            "outcome": [game.outcome for game in games],
        }

    def reward(completion_ids: Any, outcome: list[float], **_: Any) -> list[float]:
        pace.rolled(completion_ids)
        return outcome

    rows = [
        {"prompt": [{"role": "user", "content": json.dumps([ref.task, ref.variation])}]}
        for refs in setting.refs()
        for ref in refs
    ]
    _train(setting, network, tokenizer, rows, reward, pace, rollout_func=rollout)


def run_environment(setting: Setting, model: Path, turn: Turn) -> None:
    network, tokenizer, _ = load(setting, model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = RESPONSE
    worlds: list[EndlessAlfWorld] = []
    pace = Pace(setting, turn, worlds)

    def make() -> Household:
        household = Household()
        worlds.append(household._world)
        return household

    def reward(environments: list[Household], completion_ids: Any, **_: Any) -> list[float]:
        pace.rolled(completion_ids)
        return [household._world.outcome for household in environments]

    opening = [
        {"role": "system", "content": system_text(setting.recipe().prompt)},
        {"role": "user", "content": ""},
    ]
    rows = [
        {"prompt": opening, "task": ref.task, "variation": ref.variation}
        for refs in setting.refs()
        for ref in refs
    ]
    _train(setting, network, tokenizer, rows, reward, pace, environment_factory=make)


def _train(
    setting: Setting,
    network: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    reward: Callable[..., list[float]],
    pace: Pace,
    **how: Any,
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            seed=setting.seed,
            per_device_train_batch_size=setting.episodes,
            gradient_accumulation_steps=1,
            num_generations=setting.group_size,
            max_completion_length=4096,
            generation_kwargs={"max_new_tokens": setting.new_tokens},
            max_tool_calling_iterations=setting.turns - 1,
            max_steps=setting.iterations,
            learning_rate=setting.lr,
            lr_scheduler_type="constant",
            adam_beta2=0.98,
            beta=0.0,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            dataloader_pin_memory=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        GRPOTrainer(
            model=network,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[pace],
            **how,
        ).train()
