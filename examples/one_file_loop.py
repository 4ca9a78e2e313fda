"""GRPO and GCD in one file: a tiny Llama learns to bring things through a house.

GRPO (arXiv 2402.03300). G episodes of one task form a group; R_g is the return of episode g:
    A_g = (R_g - mean R) / (std R + eps)                      one advantage for every step of g
    L_policy = - mean over action tokens of min(rho A, clip(rho, 1 - c, 1 + c) A)
    rho = pi(token) / pi_old(token)
GCD (arXiv 2509.23870). The same weights also learn to judge actions. A verdict prompt is the
acting prompt, an action and <judge>; the answer is one word, <good> or <flawed>:
    L = L_policy + lambda * cross-entropy(verdict word)
Shape suffixes: G episodes of a group, B rows, T tokens, V words, N distinct beginnings of rows.

Left out, and found in the package: a KL penalty, an entropy bonus, labels from other episodes or
from branches (here three plain rules), and a history (here the prompt is the goal and the view).
The loop trains on eight houses, so most of what it learns is how to walk in these; the return in
houses never trained on is measured before and after it.

    python examples/one_file_loop.py --iterations 30 --seed 0
"""

import argparse
import random
import re
from collections.abc import Sequence
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as Policy

from untwine.config import SamplingConfig
from untwine.envs.protocol import Env
from untwine.envs.registry import make_env
from untwine.envs.rooms import OBJECTS, ROOM_NAMES, SPLIT_RANGES
from untwine.policy.attention import adopt
from untwine.policy.loading import Policy as Agent
from untwine.policy.sampler import Sampler
from untwine.policy.tree_attention import hidden_states_along
from untwine.policy.trie import build_trie

PAD, END, JUDGE, GOOD, FLAWED = range(5)
PLAIN = "| bring to in see nothing carry north east south west go open closed door take drop can't"
WORDS = ["<pad>", "<end>", "<judge>", "<good>", "<flawed>", *PLAIN.split(), *ROOM_NAMES, *OBJECTS]
HOUSES, G, MINIBATCHES = 8, 12, 4
MAX_STEPS, MAX_TOKENS = 10, 5  # of an episode, of an action
Pair = tuple[list[int], list[int]]  # prompt, answer
Episode = tuple[list["Step"], float]  # steps, return


def build_policy() -> Policy:
    """A causal transformer of 0.1 million weights."""
    size = {"hidden_size": 64, "intermediate_size": 192, "initializer_range": 0.1}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(WORDS), "pad_token_id": PAD, "eos_token_id": END}
    policy = Policy(LlamaConfig(**size, **depth, **ids))
    adopt(policy)
    return policy


def encode(text: str) -> list[int]:
    """One token for each word; those that tell little are not in WORDS, and are passed over."""
    return [WORDS.index(w) for w in re.findall(r"[a-z']+|\|", text.lower()) if w in WORDS]


def next_logp(policy: Policy, rows: Sequence[list[int]]) -> tuple[Tensor, list[Tensor]]:
    """log pi of what comes after each of the N distinct beginnings of the rows, (N, V), and which
    of these belong to each row. Rows with a common beginning share its computation."""
    trie = build_trie([np.array(row) for row in rows])
    hidden_ND = hidden_states_along(policy.model, trie, policy.device)
    return policy.lm_head(hidden_ND).log_softmax(-1), [torch.from_numpy(p) for p in trie.paths]


def answer_logp(policy: Policy, pairs: Sequence[Pair]) -> list[Tensor]:
    """log pi of the answer's tokens: one (T,) tensor for each (prompt, answer)."""
    logp_NV, paths = next_logp(policy, [prompt + answer[:-1] for prompt, answer in pairs])
    answers = [answer for _, answer in pairs]
    return [logp_NV[p[-len(a) :], a] for p, a in zip(paths, answers, strict=True)]


@torch.no_grad()
def sample_actions(policy: Policy, prompts: Sequence[list[int]]) -> list[tuple[Pair, Tensor]]:
    """Every prompt with an action, and the action's log pi: the pi_old of the ratio. Prompts with a
    common beginning share its keys and values."""
    ends: Any = SimpleNamespace(end_ids={END})
    agent = Agent(policy, None, ends, policy.device, torch.float32, "one file")
    config = SamplingConfig(max_new_tokens=MAX_TOKENS)
    found = Sampler(agent, config, torch.default_generator).sample(dict(enumerate(prompts)))
    return [
        ((prompt, list(found[n].ids)), torch.tensor(found[n].logprobs))
        for n, prompt in enumerate(prompts)
    ]


class Step(NamedTuple):
    pair: Pair  # prompt, action
    verdict: int  # GOOD or FLAWED
    old_logp_T: Tensor = torch.empty(0)  # of a sampled action


def rollout(policy: Policy, envs: list[Env], houses: Sequence[int]) -> list[Episode]:
    """One episode for each entry of `houses`, all played at once."""
    resets = [env.reset("fetch", house) for env, house in zip(envs, houses, strict=True)]
    seen = [[reset.observation] for reset in resets]
    steps: list[list[Step]] = [[] for _ in resets]
    while alive := [n for n, s in enumerate(steps) if len(s) < MAX_STEPS and not seen[n][-1].done]:
        prompts = [encode(f"{resets[n].goal} | {seen[n][-1].text}") for n in alive]
        for n, (pair, old_logp_T) in zip(alive, sample_actions(policy, prompts), strict=True):
            now = envs[n].step(" ".join(WORDS[token] for token in pair[1] if token != END))
            # Flawed: nothing changed, back in a state of this episode, or score lost. Else good.
            keys = {observation.state_key for observation in seen[n]}
            flawed = now.state_key in keys or now.score < seen[n][-1].score
            steps[n].append(Step(pair, FLAWED if flawed else GOOD, old_logp_T))
            seen[n].append(now)
    return [(s, observations[-1].outcome) for s, observations in zip(steps, seen, strict=True)]


def expert_steps(env: Env, houses: Sequence[int], rng: random.Random) -> list[Step]:
    """The expert's commands, which are good, and some out of turn, which would change nothing."""
    steps = []
    for house in houses:
        plan = env.expert("fetch", house) or ()
        goal, now = env.reset("fetch", house)
        for command in plan:
            prompt, other = encode(f"{goal} | {now.text}"), rng.choice(plan)
            steps.append(Step((prompt, [*encode(command), END]), GOOD))
            if other not in env.admissible():
                steps.append(Step((prompt, [*encode(other), END]), FLAWED))
            now = env.step(command)
    return steps


def group_advantages(returns_G: Sequence[float], eps: float = 1e-6) -> list[float]:
    """Each episode counts once, whatever its length. A group without spread gives zeros."""
    centre, spread = mean(returns_G), stdev(returns_G) if len(returns_G) > 1 else 0.0
    return [(R - centre) / (spread + eps) for R in returns_G]


def policy_loss(logp_T: Tensor, old_logp_T: Tensor, adv_T: Tensor, clip: float = 0.2) -> Tensor:
    ratio_T = (logp_T - old_logp_T).exp()
    return -torch.minimum(ratio_T * adv_T, ratio_T.clamp(1 - clip, 1 + clip) * adv_T).mean()


def verdict_pairs(steps: Sequence[Step], rng: random.Random) -> list[Pair]:
    """Verdict prompts and words: each prompt once, as many good as flawed."""
    known = {(*s.pair[0], *s.pair[1], JUDGE): s.verdict for s in steps}
    of = {word: [p for p, verdict in known.items() if verdict == word] for word in (GOOD, FLAWED)}
    each = min(map(len, of.values()))
    return [(list(p), [word]) for word in of for p in rng.sample(of[word], each)]


def verdict_loss(policy: Policy, pairs: Sequence[Pair]) -> tuple[Tensor, float]:
    """Cross-entropy of the right word, and the share where it is the likelier of the two."""
    if not pairs:
        return torch.zeros(()), 0.5
    logp_NV, paths = next_logp(policy, [prompt for prompt, _ in pairs])
    logp_BV = logp_NV[[int(p[-1]) for p in paths]]
    right_B = torch.tensor([word for _, (word,) in pairs])
    said_B = torch.where(logp_BV[:, FLAWED] > logp_BV[:, GOOD], FLAWED, GOOD)
    loss = nn.functional.nll_loss(logp_BV, right_B)
    return loss, (said_B == right_B).float().mean().item()


def update(policy: Policy, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gcd-weight", type=float, default=0.1, help="lambda; 0 is plain GRPO")
    parser.add_argument("--warm-steps", type=int, default=300, help="steps of behaviour cloning")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    rng, policy, lam = random.Random(args.seed), build_policy(), args.gcd_weight
    envs = [make_env("rooms", {"rooms": 4, "distractors": 0}) for _ in range(HOUSES * G)]
    houses, unseen = SPLIT_RANGES["train"], SPLIT_RANGES["dev"][: len(envs)]

    # Cold start: behaviour cloning, and verdicts with known answers.
    steps = expert_steps(envs[0], houses, rng)
    imitation, verdicts = [s.pair for s in steps if s.verdict == GOOD], verdict_pairs(steps, rng)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for _ in range(args.warm_steps):
        logp_T = torch.cat(answer_logp(policy, rng.sample(imitation, 32)))
        judged, _ = verdict_loss(policy, rng.sample(verdicts, 32))
        update(policy, optimizer, lam * judged - logp_T.mean())
    result = {"unseen_return_before": mean(R for _, R in rollout(policy, envs, unseen))}

    # The loop: play, judge, learn.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4)
    for iteration in range(args.iterations + 1):
        episodes = rollout(policy, envs, [h for h in houses[:HOUSES] for _ in range(G)])
        returns = [R for _, R in episodes]
        verdicts = verdict_pairs([step for steps, _ in episodes for step in steps], rng)
        success, accuracy = returns.count(1.0) / len(returns), verdict_loss(policy, verdicts)[1]
        now = {"return": mean(returns), "success": success, "verdict_accuracy": accuracy}
        result |= {f"{'final' if iteration else 'cold'}_{name}": now[name] for name in now}
        print(f"iteration {iteration:2d}", *(f" {name} {now[name]:.3f}" for name in now))
        if iteration == args.iterations:
            break  # the last round only measures
        advantages = [a for n in range(HOUSES) for a in group_advantages(returns[n * G :][:G])]
        batch = [(s, a) for (steps, _), a in zip(episodes, advantages, strict=True) for s in steps]
        for m in range(MINIBATCHES):
            part = batch[m::MINIBATCHES]
            logp_T = torch.cat(answer_logp(policy, [s.pair for s, _ in part]))
            old_logp_T = torch.cat([s.old_logp_T for s, _ in part])
            adv_T = torch.cat([torch.full_like(s.old_logp_T, a) for s, a in part])
            judged, _ = verdict_loss(policy, verdicts[m::MINIBATCHES])
            update(policy, optimizer, policy_loss(logp_T, old_logp_T, adv_T) + lam * judged)

    result["unseen_return_after"] = mean(R for _, R in rollout(policy, envs, unseen))
    print(*(f"{name} {value:.3f}" for name, value in result.items()), sep="\n")
    return result


if __name__ == "__main__":
    main()
