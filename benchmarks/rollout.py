"""Rollouts that keep keys and values between turns, against reading the history anew every time.

    python benchmarks/rollout.py [--turns 10,20,30] [--repeats 3]

A Llama with random weights and 16 episodes side by side: a first prompt of about 300 tokens, about
40 tokens of observation at every turn (both ragged), 8 tokens of reply, greedy, without an end
token, so that all replies have that length. Arms:

kept       the sampler of this package
re-read    the same sampler, made to forget all it holds before every turn
generate   Hugging Face `generate` at every turn, histories padded on the left

They take turns in one process. Times are medians, with one thread those of the processor. The run
stops when two arms do not say the same, token for token.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from arms.generate import generate
from arms.machine import clock, heading
from transformers import LlamaConfig, LlamaForCausalLM

from untwine.config import SamplingConfig
from untwine.policy.loading import Policy
from untwine.policy.sampler import Sampler
from untwine.policy.tiny import build_tokenizer
from untwine.prompting.chat import Chat

PAD = 0
Replier = Callable[[Sequence[list[int]]], list[tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class World:
    """What is read, as token ids: one first prompt per episode, `observations[turn][episode]`."""

    prompts: list[list[int]]
    observations: list[list[list[int]]]


def make_world(options: argparse.Namespace, turns: int) -> World:
    generator = torch.Generator().manual_seed(options.seed)

    def ragged(length: int, spread: float) -> list[int]:
        most = int(length * spread)
        change = int(torch.randint(-most, most + 1, (1,), generator=generator))
        drawn = torch.randint(5, options.vocab, (length + change,), generator=generator)
        return [int(token) for token in drawn]

    return World(
        prompts=[ragged(options.prompt, 0.13) for _ in range(options.episodes)],
        observations=[
            [ragged(options.observation, 0.37) for _ in range(options.episodes)]
            for _ in range(turns)
        ],
    )


def make_policy(options: argparse.Namespace, turns: int) -> Policy:
    """A model with random weights that never ends a reply."""
    torch.manual_seed(options.seed)
    longest = 2 * options.prompt + turns * (2 * options.observation + options.reply)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocab,
            hidden_size=options.hidden,
            intermediate_size=8 * options.hidden // 3,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 32,
            num_key_value_heads=options.hidden // 64,
            max_position_embeddings=longest,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    tokenizer = build_tokenizer(["nothing here is read as text"], 300)
    chat = Chat(tokenizer)
    chat.end_ids = frozenset()
    return Policy(model, tokenizer, chat, torch.device("cpu"), torch.float32, "random")


def arms(policy: Policy, reply: int) -> dict[str, Callable[[], Replier]]:
    """How each arm begins a rollout; what it returns answers one turn after the other."""
    config = SamplingConfig(max_new_tokens=reply)

    def sampled(forgetful: bool) -> Replier:
        sampler = Sampler(policy, config, torch.Generator(), greedy=True)

        def answer(histories: Sequence[list[int]]) -> list[tuple[int, ...]]:
            prompts = dict(enumerate(histories))
            if forgetful:
                for slot in prompts:
                    sampler.forget(slot)
            samples = sampler.sample(prompts)
            if forgetful and sampler.computed_tokens < sampler.prompt_tokens:
                sys.exit("'re-read' did not read everything")
            return [samples[slot].ids for slot in prompts]

        return answer

    plain = copy.deepcopy(policy.model)

    def generated(histories: Sequence[list[int]]) -> list[tuple[int, ...]]:
        return generate(plain, histories, reply, pad=PAD, greedy=True)

    return {
        "kept": lambda: sampled(forgetful=False),
        "re-read": lambda: sampled(forgetful=True),
        "generate": lambda: generated,
    }


def play(world: World, answer: Replier) -> list[list[tuple[int, ...]]]:
    """The replies of all turns."""
    histories = [list(prompt) for prompt in world.prompts]
    said = []
    for observations in world.observations:
        for history, observation in zip(histories, observations, strict=True):
            history += observation
        said.append(answer(histories))
        for history, reply in zip(histories, said[-1], strict=True):
            history += reply
    return said


def measure(options: argparse.Namespace, turns: int) -> dict[str, list[float]]:
    """Seconds of every repeat of every arm."""
    policy, world = make_policy(options, turns), make_world(options, turns)
    now = clock(options.threads)
    beginners = arms(policy, options.reply)
    short = World(world.prompts, world.observations[:1])
    for begin in beginners.values():
        play(short, begin())  # so that no arm pays for what happens only once
    seconds: dict[str, list[float]] = {name: [] for name in beginners}
    for _ in range(options.repeats):
        said = {}
        for name, begin in beginners.items():
            started = now()
            said[name] = play(world, begin())
            seconds[name].append(now() - started)
            print(f"{turns} turns, {name}: {seconds[name][-1]:.3g} s", file=sys.stderr, flush=True)
        compare(said, options.reply)
    return seconds


def compare(said: dict[str, list[list[tuple[int, ...]]]], reply: int) -> None:
    """Stop where the arms differ, or where a reply is not as long as it should be."""
    kept = said["kept"]
    if any(len(ids) != reply for turn in kept for ids in turn):
        sys.exit(f"a reply does not have {reply} tokens")
    for name, other in said.items():
        for turn, (ours, theirs) in enumerate(zip(kept, other, strict=True)):
            if ours != theirs:
                sys.exit(f"'kept' and {name!r} do not say the same in turn {turn}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", default="10,20,30", help="with commas between")
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=300, help="tokens")
    parser.add_argument("--observation", type=int, default=40, help="tokens")
    parser.add_argument("--reply", type=int, default=8, help="tokens")
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        heading(
            "rollout.py",
            f"{options.episodes} episodes, prompt {options.prompt}, observation "
            f"{options.observation}, reply {options.reply} tokens; Llama with hidden size "
            f"{options.hidden}, {options.layers} layers, {options.vocab} tokens; seed "
            f"{options.seed}, {options.threads} thread{'s' if options.threads > 1 else ''}, "
            f"{options.repeats} repeats",
        )
    )
    print("| turns | kept | re-read | generate | episodes/s, kept | re-read / kept ", end="")
    print("| generate / kept |\n|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for turns in map(int, options.turns.split(",")):
        seconds = measure(options, turns)
        kept, again, other = (median(found) for found in seconds.values())
        print(
            f"| {turns} | {kept:.3g} s | {again:.3g} s | {other:.3g} s "
            f"| {options.episodes / kept:.3g} | {again / kept:.1f} | {other / kept:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
