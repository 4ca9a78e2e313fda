"""Common practice, in plain torch: every turn reads the whole history again, and every step is a
padded sample of its own.

It is done as well as it can be done: keys and values are kept within a turn, training samples of
similar length share a micro-batch, and the vocabulary is projected at action positions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from arms.machine import clock
from arms.turns import Game, Played, Reply, left_padded, play
from arms.world import Count, EndlessAlfWorld, Setting, Turn, load
from untwine.prompting.prompter import Prompter


class Sample(NamedTuple):
    step: Played
    advantage: float


def run(setting: Setting, model: Path, turn: Turn) -> None:
    recipe, now = setting.recipe(), clock(setting.threads)
    network, _, chat = load(setting, model)
    prompter = Prompter(chat, recipe.prompt)
    generator = torch.Generator().manual_seed(setting.seed)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=setting.lr, betas=(0.9, 0.98), weight_decay=0.0
    )
    envs = [EndlessAlfWorld({}) for _ in range(setting.episodes)]

    def reply(prompts: Sequence[Sequence[int]]) -> list[Reply]:
        return sample(network, prompts, setting.new_tokens, chat.end_ids, generator)

    for refs in setting.refs():
        before = [(env.sent, env.valid) for env in envs]
        turn.wait()
        started = now()
        jobs = [ref for ref in refs for _ in range(setting.group_size)]
        games = play(jobs, envs, prompter, reply, setting.turns)
        rolled = now()
        update(network, optimizer, with_advantages(games, setting.group_size), setting)
        ended = now()
        turn.done(
            Count(
                seconds=ended - started,
                seconds_rollout=rolled - started,
                episodes=len(games),
                steps=sum(len(game.steps) for game in games),
                sent=sum(e.sent - b[0] for e, b in zip(envs, before, strict=True)),
                valid=sum(e.valid - b[1] for e, b in zip(envs, before, strict=True)),
                sampled=sum(game.sampled for game in games),
                tokens=sum(game.tokens for game in games),
            )
        )


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    ends: frozenset[int],
    generator: torch.Generator,
) -> list[Reply]:
    """One reply to each prompt, at temperature 1."""
    padded, width = left_padded(prompts)
    ids = torch.tensor(padded)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = (torch.arange(width)[None] >= width - lengths[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    drawn: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    live = set(range(len(prompts)))
    for _ in range(new_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        scaled = logits.float().log_softmax(-1)
        ids = torch.multinomial(scaled.exp(), 1, generator=generator)
        chosen = scaled.gather(-1, ids)
        for row in tuple(live):
            token = int(ids[row, 0])
            drawn[row].append(token)
            logprobs[row].append(float(chosen[row, 0]))
            if token in ends:
                live.discard(row)
        if not live:
            break
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=torch.long)], 1)
        positions = positions[:, -1:] + 1
    return [(tuple(i), tuple(p)) for i, p in zip(drawn, logprobs, strict=True)]


def with_advantages(games: Sequence[Game], group_size: int) -> list[Sample]:
    """Every step with (R - mean R) / (std R + 1e-6) of its episode within its group."""
    samples = []
    for first in range(0, len(games), group_size):
        group = games[first : first + group_size]
        outcomes = [game.outcome for game in group]
        mean, spread = fmean(outcomes), stdev(outcomes) + 1e-6
        samples += [
            Sample(step, (game.outcome - mean) / spread) for game in group for step in game.steps
        ]
    return samples


def update(
    model: Any, optimizer: torch.optim.Optimizer, samples: Sequence[Sample], setting: Setting
) -> None:
    """One step down the clipped surrogate, a mean over all action tokens."""
    optimizer.zero_grad(set_to_none=True)
    actions = sum(len(s.step.action_ids) for s in samples)
    for batch in padded_batches(samples, setting.microbatch_tokens):
        (surrogate(model, batch) / actions).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def padded_batches(samples: Sequence[Sample], budget: int) -> Iterator[list[Sample]]:
    """At most `budget` padded tokens at a time, samples of similar length together."""
    batch: list[Sample] = []
    longest = 0
    for one in sorted(samples, key=lambda s: -len(s.step.prompt_ids) - len(s.step.action_ids)):
        if batch and longest * (len(batch) + 1) > budget:
            yield batch
            batch = []
        longest = longest if batch else len(one.step.prompt_ids) + len(one.step.action_ids)
        batch.append(one)
    yield batch


def surrogate(model: Any, batch: Sequence[Sample]) -> torch.Tensor:
    """The sum of -min(r A, clip(r) A) over the action tokens of a micro-batch."""
    rows = [s.step.prompt_ids + s.step.action_ids for s in batch]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *([0] * (width - len(row)))] for row in rows])
    where = [
        (b, position)
        for b, s in enumerate(batch)
        for position in range(len(s.step.prompt_ids), len(rows[b]))
    ]
    row_N, column_N = torch.tensor(where).unbind(-1)
    old_N = torch.tensor([p for s in batch for p in s.step.logprobs])
    advantage_N = torch.tensor([s.advantage for s in batch for _ in s.step.action_ids])
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits_NV = model.get_output_embeddings()(hidden[row_N, column_N - 1])
    logprob_N = logits_NV.log_softmax(-1).gather(-1, ids[row_N, column_N, None])[:, 0]
    ratio_N = (logprob_N - old_N).exp()
    clipped_N = ratio_N.clamp(0.8, 1.2)
    return -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N).sum()
