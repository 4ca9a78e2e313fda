"""GRPO and GCD in one file: a small transformer learns to bring things through a house.

GRPO (arXiv 2402.03300). G episodes of one task form a group; R_g is the return of episode g:
    A_g = (R_g - mean R) / (std R + eps)                      one advantage for every step of g
    L_policy = - mean over action tokens of min(rho A, clip(rho, 1 - c, 1 + c) A)
    rho = pi(token) / pi_old(token)
GCD (arXiv 2509.23870). The same weights also learn to judge actions. A verdict prompt is the
acting prompt, an action and <judge>; the answer is one word, <good> or <flawed>:
    L = L_policy + lambda * cross-entropy(verdict word)

Shape suffixes: N samples or episodes, G episodes of a group, B rows, T tokens, D width, V words.

Left out, and found in the package: the KV cache (here each sampled token reads its whole prompt
again), a KL penalty and an entropy bonus (the run is short), labels that need other episodes or
branches (here three plain rules), and a history longer than the last command. Training is on
eight houses, so most of what is learnt is how to walk in these; the return in houses never
trained on is printed beside it.

    python examples/one_file_loop.py --iterations 30 --seed 0
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import AdamW

from untwine.envs.protocol import Env
from untwine.envs.registry import make_env
from untwine.envs.splits import load_splits
from untwine.records import Observation

PAD, END, JUDGE, GOOD, FLAWED = range(5)
SPECIAL = ("<pad>", "<end>", "<judge>", "<good>", "<flawed>")
VOCAB, MAX_WORDS, MAX_STEPS = 96, 4, 10
HOUSES, G, MINIBATCHES = 8, 12, 4
Pair = tuple[list[int], list[int]]  # prompt ids, answer ids


class Words:
    """One token per word; takes in new words as they are met, up to VOCAB."""

    def __init__(self) -> None:
        self.ids = {word: i for i, word in enumerate(SPECIAL)}

    def encode(self, text: str) -> list[int]:
        words = re.findall(r"[a-z']+|[|>]", text.lower())
        return [self.ids.setdefault(word, min(len(self.ids), VOCAB - 1)) for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        words = list(self.ids)
        return " ".join(words[i] if i < len(words) else "<unused>" for i in ids if i != END)


class Policy(nn.Module):
    """A causal transformer of 0.1 million weights."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.position = nn.Embedding(VOCAB, width), nn.Embedding(128, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        block = (width, heads, 4 * width, 0.0, F.gelu, 1e-5, True, True)  # batch and norm first
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(*block) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of shape (B, T, V); rows are padded on the left."""
        T = tokens_BT.shape[1]
        real_BT = tokens_BT != PAD
        causal_TT = torch.ones(T, T, dtype=torch.bool).tril()
        # Padding has nothing to look at, and its softmax would be 0/0: it looks at itself.
        hidden_BTT = ~((causal_TT & real_BT[:, None, :]) | torch.eye(T, dtype=torch.bool))
        hidden_ATT = hidden_BTT.repeat_interleave(self.heads, 0)  # A = B * heads
        x_BTD = self.embed(tokens_BT) + self.position((real_BT.cumsum(1) - 1).clamp(min=0))
        for block in self.blocks:
            x_BTD = block(x_BTD, src_mask=hidden_ATT)
        return F.linear(self.norm(x_BTD), self.embed.weight)


def pad_left(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows])


def answer_logp(policy: Policy, pairs: Sequence[Pair]) -> list[Tensor]:
    """log pi of the answer's tokens: one (T,) tensor for each (prompt, answer)."""
    tokens_BT = pad_left([prompt + answer for prompt, answer in pairs])
    longest = max(len(answer) for _, answer in pairs)
    # Position t predicts token t + 1, and the answers lie at the right edge.
    logp_BTV = policy(tokens_BT)[:, -longest - 1 : -1].log_softmax(-1)
    logp_BT = logp_BTV.gather(-1, tokens_BT[:, -longest:, None])[..., 0]
    return [row_T[-len(answer) :] for row_T, (_, answer) in zip(logp_BT, pairs, strict=True)]


@torch.no_grad()
def sample_actions(policy: Policy, prompts: Sequence[list[int]]) -> list[tuple[list[int], Tensor]]:
    """One action for every prompt, all at once, with its log pi: the pi_old of the ratio."""
    tokens_BT = pad_left(prompts)
    width = tokens_BT.shape[1]
    for _ in range(MAX_WORDS + 1):
        p_BV = policy(tokens_BT)[:, -1].softmax(-1)
        tokens_BT = torch.cat([tokens_BT, torch.multinomial(p_BV, 1)], dim=1)
        if (tokens_BT[:, width:] == END).any(1).all():
            break
    rows = tokens_BT[:, width:].tolist()
    actions = [row[: row.index(END) + 1] if END in row else row for row in rows]
    old_logp = answer_logp(policy, list(zip(prompts, actions, strict=True)))
    return list(zip(actions, old_logp, strict=True))


class Step(NamedTuple):
    prompt: list[int]
    action: list[int]
    old_logp_T: Tensor
    verdict: int  # GOOD or FLAWED


class Episode(NamedTuple):
    steps: list[Step]
    outcome: float
    success: bool


def prompt_text(goal: str, last: str, seen: str) -> str:
    return f"{goal} | {last} | {seen} >"


def rule_verdict(before: Observation, after: Observation, seen: set[str]) -> int:
    """Flawed: nothing changed, back in a state of this episode, or score lost. Else good.

    The prompt shows only the last command, so an older state cannot always be recognised.
    """
    return FLAWED if after.state_key in seen or after.score < before.score else GOOD


def rollout(policy: Policy, words: Words, envs: list[Env], houses: Sequence[int]) -> list[Episode]:
    """One episode for each entry of `houses`, all played at once."""
    resets = [env.reset("fetch", house) for env, house in zip(envs, houses, strict=True)]
    now, last = [reset.observation for reset in resets], ["" for _ in resets]
    seen = [{observation.state_key} for observation in now]
    steps: list[list[Step]] = [[] for _ in resets]
    for _ in range(MAX_STEPS):
        alive = [n for n, observation in enumerate(now) if not observation.done]
        if not alive:
            break
        prompts = [words.encode(prompt_text(resets[n].goal, last[n], now[n].text)) for n in alive]
        actions = sample_actions(policy, prompts)
        for n, prompt, (action, old_logp_T) in zip(alive, prompts, actions, strict=True):
            before, last[n] = now[n], words.decode(action)
            now[n] = envs[n].step(last[n])
            verdict = rule_verdict(before, now[n], seen[n])
            steps[n].append(Step(prompt, action, old_logp_T, verdict))
            seen[n].add(now[n].state_key)
    return [Episode(s, o.outcome, o.success) for s, o in zip(steps, now, strict=True)]


def mean_return(episodes: Sequence[Episode]) -> float:
    return sum(e.outcome for e in episodes) / len(episodes)


def group_advantages(rewards_G: Tensor, eps: float = 1e-4) -> Tensor:
    """Each episode counts once, whatever its length. A group without spread gives zeros."""
    return (rewards_G - rewards_G.mean()) / (rewards_G.std(unbiased=False) + eps)


def policy_loss(logp_T: Tensor, old_logp_T: Tensor, adv_T: Tensor, clip: float = 0.2) -> Tensor:
    ratio_T = (logp_T - old_logp_T).exp()
    return -torch.minimum(ratio_T * adv_T, ratio_T.clamp(1 - clip, 1 + clip) * adv_T).mean()


def verdict_pairs(steps: Sequence[Step], rng: random.Random, most: int = 64) -> list[Pair]:
    """Verdict prompts and words: each prompt once, as many good as flawed, in random order."""
    known = {(*s.prompt, *s.action, JUDGE): s.verdict for s in steps}
    of = {word: [p for p, verdict in known.items() if verdict == word] for word in (GOOD, FLAWED)}
    each = min(most, *map(len, of.values()))
    pairs = [(list(p), [word]) for word in of for p in rng.sample(of[word], each)]
    return rng.sample(pairs, len(pairs))


def verdict_loss(policy: Policy, pairs: Sequence[Pair]) -> tuple[Tensor, float]:
    """Cross-entropy of the right word, and the share where it is the likelier of the two."""
    if not pairs:
        return torch.zeros(()), 0.5
    logits_NV = policy(pad_left([prompt for prompt, _ in pairs]))[:, -1]
    right_N = torch.tensor([word for _, (word,) in pairs])
    says_flawed_N = logits_NV[:, FLAWED] > logits_NV[:, GOOD]
    correct = int((says_flawed_N == (right_N == FLAWED)).sum())
    return F.cross_entropy(logits_NV, right_N), correct / len(pairs)


def update(optimizer: AdamW, policy: Policy, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


def expert_data(
    words: Words, env: Env, houses: Sequence[int], rng: random.Random
) -> tuple[list[Pair], list[tuple[Pair, Pair]]]:
    """The expert's steps; and verdicts in twos: its action, and a flawed one in the same state."""
    imitation, twos = [], []
    for house in houses:
        plan, last = env.expert("fetch", house) or (), ""
        goal, now = env.reset("fetch", house)
        seen = {now.state_key}
        for command in plan:
            prompt = words.encode(prompt_text(goal, last, now.text))
            action, here = [*words.encode(command), END], env.snapshot()
            imitation.append((prompt, action))
            way = rng.choice(("north", "east", "south", "west"))
            other = rng.choice((f"go {way}", f"open {way} door"))
            if rule_verdict(now, env.step(other), seen) == FLAWED:
                judged = [*prompt, *words.encode(other), END, JUDGE]
                twos.append((([*prompt, *action, JUDGE], [GOOD]), (judged, [FLAWED])))
            env.restore(here)
            now, last = env.step(command), command
            seen.add(now.state_key)
    return imitation, twos


def train_on(
    policy: Policy, optimizer: AdamW, episodes: Sequence[Episode], verdicts: list[Pair], lam: float
) -> None:
    """One pass over a batch of episodes, in minibatches; GRPO plus lambda times GCD."""
    rewards_NG = torch.tensor([e.outcome for e in episodes]).view(-1, G)
    advantages_N = torch.cat([group_advantages(rewards_G) for rewards_G in rewards_NG]).tolist()
    steps = [(s, a) for e, a in zip(episodes, advantages_N, strict=True) for s in e.steps if a]
    for m in range(MINIBATCHES):
        part, judged = steps[m::MINIBATCHES], verdicts[m::MINIBATCHES]
        loss = torch.zeros((), requires_grad=True)
        if part:
            logp = answer_logp(policy, [(s.prompt, s.action) for s, _ in part])
            adv_T = torch.cat([torch.full_like(s.old_logp_T, a) for s, a in part])
            old_logp_T = torch.cat([s.old_logp_T for s, _ in part])
            loss = loss + policy_loss(torch.cat(logp), old_logp_T, adv_T)
        if judged and lam:
            loss = loss + lam * verdict_loss(policy, judged)[0]
        update(optimizer, policy, loss)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gcd-weight", type=float, default=0.1, help="lambda; 0 is plain GRPO")
    parser.add_argument("--warm-steps", type=int, default=300, help="steps of behaviour cloning")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    rng, began = random.Random(args.seed), time.process_time()

    splits, words, policy = load_splits("rooms", "default"), Words(), Policy()
    houses = [ref.variation for ref in splits.refs("train", ["fetch"])]
    envs = [make_env("rooms", {"rooms": 4, "distractors": 0}) for _ in range(HOUSES * G)]
    unseen = [ref.variation for ref in splits.refs("L0", ["fetch"])][: len(envs)]

    imitation, twos = expert_data(words, envs[0], houses, rng)
    optimizer = AdamW(policy.parameters(), lr=2e-3)
    for _ in range(args.warm_steps):
        loss = -torch.cat(answer_logp(policy, rng.sample(imitation, 32))).mean()
        if args.gcd_weight:
            judged = [pair for two in rng.sample(twos, 16) for pair in two]
            loss = loss + args.gcd_weight * verdict_loss(policy, judged)[0]
        update(optimizer, policy, loss)
    unseen_before = mean_return(rollout(policy, words, envs, unseen))

    optimizer = AdamW(policy.parameters(), lr=6e-4, betas=(0.9, 0.98))
    history = []
    for iteration in range(args.iterations + 1):
        # The last round only measures; the first measures the cold start before it trains on it.
        episodes = rollout(policy, words, envs, [h for h in houses[:HOUSES] for _ in range(G)])
        verdicts = verdict_pairs([step for e in episodes for step in e.steps], rng)
        with torch.no_grad():
            accuracy = verdict_loss(policy, verdicts)[1]
        success = sum(e.success for e in episodes) / len(episodes)
        history.append((mean_return(episodes), success, accuracy))
        print(
            f"iteration {iteration:3d}  return {history[-1][0]:.3f}  success {success:.3f}  "
            f"verdict accuracy {accuracy:.3f}  {time.process_time() - began:5.1f} s of CPU",
            flush=True,
        )
        if iteration < args.iterations:
            train_on(policy, optimizer, episodes, verdicts, args.gcd_weight)

    names = ("return", "success", "verdict_accuracy")
    result = {f"cold_{name}": value for name, value in zip(names, history[0], strict=True)}
    result |= {f"final_{name}": value for name, value in zip(names, history[-1], strict=True)}
    result["unseen_return_before"] = unseen_before
    result["unseen_return_after"] = mean_return(rollout(policy, words, envs, unseen))
    print("  ".join(f"{name} {value:.3f}" for name, value in result.items()))
    return result


if __name__ == "__main__":
    main()
