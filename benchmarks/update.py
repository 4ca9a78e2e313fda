"""One update (forward and backward pass) in four layouts: same model, same loss, alternating.

    python benchmarks/update.py [--turns 10 20 30] [--thoughts] [--repeats 3] [--padded-share 0.1]
    python benchmarks/update.py --growth
    python benchmarks/update.py --device cuda --dtype bfloat16 --model qwen-1.5b --arms trie episode

trie       what the trainer does: every distinct token of the group once (policy/trie.py), the last
           layer only where it is read (policy/last_layer.py)
episode    one sequence per episode, nothing shared between episodes
varlen     every step a sequence of its own with its whole history, packed without padding
padded     the same steps as a rectangle, padded on the left, with transformers' own attention

`episode`, `varlen` and `padded` run every layer over every token, as is common.

A group is G episodes of one task, of T turns each: a prompt of 300 tokens, then observations of
about 40 and actions of 8 tokens, with --thoughts after a thought of about 60. What the environment
says is a function of the actions so far; the agent takes its favourite of 8 actions with
probability --peak, so episodes part sooner or later. The model is a Llama of random weights, or by
--model one of the shape of Qwen2.5, SmolLM2, or any other.

Times are medians of CPU seconds over the repetitions (wall clock with more than one thread, and on
a GPU, which is waited for). Tokens per second are those of the episodes, each once. The slow arms
may be timed on a share of their micro-batches, evenly spread, and scaled by tokens; the table says
so. The gradient error is that of a full pass, against every step by itself in float64 with
transformers' own attention: |g - g64| / |g64|. For a layout that was timed on a share it is left
out. The share of the matrix rate is operations counted (6 per weight and token, 14 x width per
pair) over time, against the best rate of a plain product of like shape and type.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from arms.last_layer import last_layer_everywhere
from arms.machine import clock, heading
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from untwine.batch import Row, microbatches
from untwine.config import PolicyConfig
from untwine.policy.loading import DTYPES, Policy, head_width, load_policy
from untwine.policy.trie import Layout
from untwine.scoring import pack, score

VOCABULARY = 4096
ARMS = ("trie", "episode", "varlen", "padded")
QWEN: Any = {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
SHAPES = {
    "qwen-0.5b": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        **QWEN,
    ),
    "qwen-1.5b": Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        **QWEN,
    ),
}
"""The shapes of Qwen2.5-0.5B and Qwen2.5-1.5B (their config.json)."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One batch, once with a row per episode and once with a row per step."""

    episodes: list[Row]
    steps: list[Row]


@dataclasses.dataclass(frozen=True)
class Timing:
    """seconds of a whole pass, the share of the tokens that was timed, tokens computed."""

    seconds: float
    share: float
    tokens: int


def make_work(groups: int, size: int, turns: int, thoughts: bool, peak: float, seed: int) -> Work:
    episodes: list[Row] = []
    steps: list[Row] = []
    for group in range(groups):
        task = np.random.default_rng([seed, group])
        prompt, commands = draw(task, 300), [draw(task, 8) for _ in range(8)]
        for member in range(size):
            agent = np.random.default_rng([seed, group, member + 1])
            advantage = float(agent.normal())
            ids, taken, spans = [prompt], [0], []
            at = len(prompt)
            for _ in range(turns):
                world = np.random.default_rng([seed, group, 10**6, *taken])
                said, favourite = draw(world, int(world.integers(32, 49))), int(world.integers(8))
                choice = favourite if agent.random() < peak else int(agent.integers(8))
                thought = [draw(agent, int(agent.integers(45, 76)))] if thoughts else []
                reply = np.concatenate([*thought, commands[choice]])
                spans.append((at + len(said), at + len(said) + len(reply)))
                ids += [said, reply]
                taken.append(choice)
                at = spans[-1][1]
            whole = np.concatenate(ids)
            episodes.append(make_row(whole, spans, advantage))
            steps += [make_row(whole[:b], [(a, b)], advantage) for a, b in spans]
    return Work(episodes, steps)


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(5, VOCABULARY, count)


def make_row(ids: np.ndarray, spans: Sequence[tuple[int, int]], advantage: float) -> Row:
    targets = np.concatenate([np.arange(a, b) for a, b in spans])
    ones = np.ones(len(targets), np.float32)
    return Row(ids, targets, ones, 0 * ones, advantage * ones)


def make_policy(args: argparse.Namespace) -> Policy:
    """By --model: of random weights in a known shape, or loaded. On the device."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    if args.model and args.model not in SHAPES:
        config = PolicyConfig(model=args.model, device=args.device, dtype=args.dtype)
        return load_policy(config, tuple)
    heads = args.width // 32
    shape: Any = SHAPES.get(args.model) or LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.width,
        intermediate_size=int(args.width * 2.6875),
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with device:
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    unused: Any = None
    return Policy(model, unused, unused, device, DTYPES[args.dtype], args.model or "benchmark")


# The four arms: each gives the seconds of a pass and leaves its gradient in the model


def packed_arm(
    policy: Policy, rows: Sequence[Row], layout: Layout, budget: int, share: float
) -> Timing:
    if layout != "separate":
        batches = list(microbatches(rows, budget))
        return timed(policy, batches, share, lambda batch: packed_pass(policy, batch, layout))
    with last_layer_everywhere(policy.model):
        batches = fixed(rows, budget)
        return timed(policy, batches, share, lambda batch: packed_pass(policy, batch, layout))


def packed_pass(policy: Policy, batch: Sequence[Row], layout: Layout) -> int:
    targets = score(policy, batch, layout=layout)
    (-targets.advantages_N * targets.logprobs_N).sum().backward()  # type: ignore[no-untyped-call]
    return targets.computed_tokens


def fixed(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Rows that are packed one behind the other, `budget` tokens at a time."""
    batches: list[list[Row]] = [[]]
    for i in np.random.default_rng(0).permutation(len(rows)):
        if batches[-1] and sum(r.length for r in batches[-1]) + rows[i].length > budget:
            batches.append([])
        batches[-1].append(rows[i])
    return batches


def padded_arm(policy: Policy, rows: Sequence[Row], size: int, share: float) -> Timing:
    order = np.random.default_rng(0).permutation(len(rows))
    batches = [[rows[i] for i in order[a : a + size]] for a in range(0, len(rows), size)]
    longest = max(row.length for row in rows)
    return timed(policy, batches, share, lambda batch: padded_pass(policy, batch, longest))


def padded_pass(policy: Policy, batch: Sequence[Row], longest: int) -> int:
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    real, trained = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    weight = torch.zeros(len(batch), longest)
    for b, row in enumerate(batch):
        ids[b, longest - row.length :] = torch.from_numpy(row.ids)
        real[b, longest - row.length :] = 1
        trained[b, longest - row.length + row.targets] = True
        weight[b] = float(row.advantages[0])
    ids, real, trained, weight = (x.to(policy.device) for x in (ids, real, trained, weight))
    position = (real.cumsum(-1) - 1).clamp_min(0)
    with policy.autocast():
        hidden = policy.hidden_states(
            ids, attention_mask=real, position_ids=position, use_cache=False
        )
        b_N, t_N = trained.nonzero(as_tuple=True)
        logits = policy.project(hidden[b_N, t_N - 1])
    logprobs = logits.log_softmax(-1).gather(-1, ids[b_N, t_N][:, None])[:, 0]
    (-weight[b_N, t_N] * logprobs).sum().backward()  # type: ignore[no-untyped-call]
    return ids.numel()


def timed(
    policy: Policy, batches: Sequence[list[Row]], share: float, run: Callable[[list[Row]], int]
) -> Timing:
    """Run a share of the micro-batches, evenly spread, and scale by their tokens."""
    count = max(1, round(share * len(batches)))
    spread = (np.arange(count) + 0.5) * len(batches) / count
    taken = [batches[int(i)] for i in spread]
    now = clock(torch.get_num_threads(), policy.device.type)
    started = now()
    tokens = sum(run(batch) for batch in taken)
    seconds = now() - started
    done = sum(r.length for b in taken for r in b) / sum(r.length for b in batches for r in b)
    return Timing(seconds / done, done, round(tokens / done))


# References


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def reference(policy: Policy, rows: Sequence[Row]) -> torch.Tensor:
    """Every step by itself, in double precision, with transformers' own attention."""
    model = copy.deepcopy(policy.model).double()
    model.set_attn_implementation("sdpa")
    model.zero_grad()
    for row in rows:
        ids = torch.from_numpy(row.ids).to(policy.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, row.targets - 1]
        logprobs = logits.log_softmax(-1)[range(len(row.targets)), ids[row.targets]]
        (-float(row.advantages[0]) * logprobs).sum().backward()
    return gradient(model)


def matrix_rate(policy: Policy) -> float:
    """Best rate of a product of 2048 tokens (on a GPU 8192) in the type of the passes, operations
    per second."""
    config, device = policy.model.config, policy.device
    count = 2048 if device.type == "cpu" else 8192
    a = torch.randn(count, config.hidden_size, dtype=policy.dtype, device=device)
    b = torch.randn(a.shape[1], config.intermediate_size, dtype=policy.dtype, device=device)
    best, now = math.inf, clock(torch.get_num_threads(), device.type)
    for _ in range(40):
        started = now()
        for _ in range(10):
            a @ b
        best = min(best, now() - started)
    return 20 * a.shape[0] * a.shape[1] * b.shape[1] / best


def operations(policy: Policy, rows: Sequence[Row], layout: Layout) -> float:
    """Of the linear layers, attention and the vocabulary, forward and backward. In the last layer
    tokens that are not read have keys and values only."""
    trie, config = pack(policy, rows, layout), policy.model.config
    nodes = np.unique(
        np.concatenate([p[r.targets - 1] for p, r in zip(trie.paths, rows, strict=True)])
    )
    layer = policy.costs.token * trie.size + policy.costs.pair * trie.pairs
    key_values = 12.0 * config.hidden_size * config.num_key_value_heads * head_width(config)
    last = policy.costs.token * len(nodes) + policy.costs.pair * (trie.depth_N[nodes] + 1).sum()
    last += key_values * (trie.size - len(nodes))
    head = 6.0 * config.hidden_size * config.vocab_size * len(nodes)
    return float((config.num_hidden_layers - 1) * layer + last + head)


# Tables


def run_arm(arm: str, policy: Policy, work: Work, args: argparse.Namespace) -> Timing:
    policy.model.zero_grad(set_to_none=True)
    if arm == "trie":
        return packed_arm(policy, work.episodes, "auto", args.budget, 1.0)
    if arm == "episode":
        return packed_arm(policy, work.episodes, "separate", args.budget, 1.0)
    if arm == "varlen":
        return packed_arm(policy, work.steps, "separate", args.budget, args.varlen_share)
    return padded_arm(policy, work.steps, args.padded_batch, args.padded_share)


def compare(policy: Policy, turns: int, args: argparse.Namespace, rate: float) -> None:
    work = make_work(args.groups, args.size, turns, args.thoughts, args.peak, args.seed)
    exact = None if args.no_check else reference(policy, work.steps)
    found: dict[str, list[Timing]] = {arm: [] for arm in args.arms}
    errors: dict[str, float] = {}
    for repeat in range(args.repeats):
        shift = repeat % len(args.arms)
        for arm in [*args.arms[shift:], *args.arms[:shift]]:
            found[arm].append(run_arm(arm, policy, work, args))
            if exact is not None and found[arm][-1].share == 1.0:
                errors[arm] = float((gradient(policy.model) - exact).norm() / exact.norm())
    seconds = {arm: statistics.median(t.seconds for t in found[arm]) for arm in args.arms}
    needed = operations(policy, work.episodes, "auto")
    played = sum(row.length for row in work.episodes)
    for arm in args.arms:
        first = found[arm][0]
        ratios = [
            f"{seconds[slow] / seconds[arm]:.1f}" if slow in seconds else ""
            for slow in ("padded", "varlen")
        ]
        busy = f"{100 * needed / seconds[arm] / rate:.0f} %" if arm == "trie" else ""
        error = f"{errors[arm]:.0e}" if arm in errors else ""
        times = " ".join(f"{t.seconds:.2f}" for t in found[arm])
        print(
            f"| {turns} | {arm} | {first.tokens:,} | {100 * first.share:.0f} % | "
            f"{seconds[arm]:.2f} | {times} | {played / seconds[arm]:,.0f} | {ratios[0]} | "
            f"{ratios[1]} | {error} | {busy} |",
            flush=True,
        )


def growth(policy: Policy, args: argparse.Namespace) -> None:
    """Time of the trie, and of varlen where it is asked for, along each axis; fitted exponents."""
    base = {"groups": 1, "size": 8, "turns": 10}
    axes = {"turns": (5, 10, 20, 40), "size": (2, 4, 8, 16), "groups": (1, 2, 4)}
    print("| axis | arm | values | seconds | exponent |\n|---|---|---|---|---:|")
    for axis, values in axes.items():
        for arm in [a for a in args.arms if a in ("trie", "varlen")]:
            seconds = []
            for value in values:
                at = {**base, axis: value}
                work = make_work(
                    at["groups"], at["size"], at["turns"], args.thoughts, args.peak, args.seed
                )
                times = [run_arm(arm, policy, work, args).seconds for _ in range(args.repeats)]
                seconds.append(statistics.median(times))
            slope = np.polyfit(np.log(values), np.log(seconds), 1)[0]
            shown = ", ".join(f"{s:.2f}" for s in seconds)
            print(f"| {axis} | {arm} | {', '.join(map(str, values))} | {shown} | {slope:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, nargs="+", default=[10, 20, 30], help="values of T")
    parser.add_argument("--thoughts", action="store_true", help="a thought before each action")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--size", type=int, default=8, help="episodes per group (G)")
    parser.add_argument("--peak", type=float, default=0.8, help="probability of the favourite")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--model", default="", help=f"{', '.join(SHAPES)}, or what loads")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--budget", type=int, default=8192, help="tokens per forward pass")
    parser.add_argument("--padded-batch", type=int, default=8, help="padded rows per forward pass")
    parser.add_argument("--padded-share", type=float, default=1.0, help="share that is timed")
    parser.add_argument("--varlen-share", type=float, default=1.0, help="share that is timed")
    parser.add_argument("--no-check", action="store_true", help="leave out the gradient error")
    parser.add_argument("--growth", action="store_true", help="exponents against T, G and groups")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy = make_policy(args)
    rate = matrix_rate(policy)
    shape = policy.model.config
    device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    print(
        heading(
            "update.py",
            f"{policy.name}: {shape.num_hidden_layers} layers of width {shape.hidden_size}, "
            f"{args.groups} groups of {args.size} episodes, favourite taken with probability "
            f"{args.peak}, {args.dtype} on {device}; seed {args.seed}, {args.threads} threads, "
            f"{args.repeats} repeats; matrix product {rate / 1e9:,.0f} GFLOP/s",
        ),
        flush=True,
    )
    if args.growth:
        growth(policy, args)
        return
    warm = make_work(1, 2, 2, False, args.peak, args.seed)
    for arm in args.arms:  # kernels and memory are set up before anything is timed
        run_arm(arm, policy, warm, args)
    columns = ["T", "layout", "tokens", "timed", "s", "each", "tokens/s", "x padded", "x varlen"]
    print(f"| {' | '.join([*columns, 'error', 'of rate'])} |")
    print("|---:|---|---:|---:|---:|---|---:|---:|---:|---:|---:|")
    for turns in args.turns:
        compare(policy, turns, args, rate)


if __name__ == "__main__":
    main()
