"""GRPO and GCD in one file: an agent learns to walk through a small house.

The whole method, to be read from top to bottom. Only the house comes from the package.

GRPO (arXiv 2402.03300). G episodes of one task form a group; R_g is the return of episode g:

    A_g = (R_g - mean R) / (std R + eps)                      one advantage for every step of g
    L_policy = - mean over action tokens of min(rho A, clip(rho, 1 - e, 1 + e) A)
    rho = pi(token) / pi_old(token)

GCD (arXiv 2509.23870). The same weights also learn to judge actions. A verdict prompt is the
acting prompt, then an action, then <judge>; the answer is the word `good` or `flawed`:

    L = L_policy + lambda * cross-entropy(verdict word)

Shape suffixes: G episodes of a group, N episodes or samples, B rows of a batch, T tokens.

Left out, because one pass over one batch on one small model does not need it (the package has it):
  - KV cache: every sampled token reads its whole prompt again. The package keeps the cache.
  - KL to a reference policy and an entropy bonus: short runs do not drift far.
  - Minibatches and epochs: there is one optimizer step per batch, so rho is 1 up to rounding and
    the clip never binds. It is written out because it is half of the equation.
  - Labels from branches, groups or experts: the verdicts come from three plain rules.
  - Prompts with history: the model reads the last command and what the house answered.

    python examples/one_file_loop.py --iterations 30 --seed 0
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untwine.envs.protocol import Env
from untwine.envs.registry import make_env
from untwine.records import Observation

PAD, END, JUDGE, GOOD, FLAWED = range(5)
TASK = "fetch"
SPECIAL = ("<pad>", "<end>", "<judge>", "good", "flawed")
VOCAB, MAX_WORDS, GROUPS, G, MAX_STEPS, ROWS = 96, 4, 8, 8, 12, 256


# ---- the text: one token per word --------------------------------------------------------------
class Words:
    """A vocabulary that takes in new words as they are met, up to VOCAB."""

    def __init__(self) -> None:
        self.ids = {word: i for i, word in enumerate(SPECIAL)}

    def encode(self, text: str) -> list[int]:
        words = re.findall(r"[a-z']+|[|>]", text.lower())
        return [self.ids.setdefault(word, min(len(self.ids), VOCAB - 1)) for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        words = list(self.ids)
        return " ".join(words[i] if i < len(words) else "<unused>" for i in ids if i != END)


# ---- the model: a causal transformer -----------------------------------------------------------
class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BTD: Tensor, mask_B1TT: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TT)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return x_BTD + self.mlp(self.norm2(x_BTD))


class Policy(nn.Module):
    def __init__(self, vocab: int = VOCAB, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab, width), nn.Embedding(128, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of shape (B, T, vocab); rows are padded on the left."""
        real_BT = tokens_BT != PAD
        position_BT = (real_BT.cumsum(1) - 1).clamp(min=0)
        T = tokens_BT.shape[1]
        causal_TT = torch.ones(T, T, dtype=torch.bool).tril()
        # A padding row must see something, or its softmax is 0/0: it sees itself.
        mask_BTT = (causal_TT & real_BT[:, None, :]) | torch.eye(T, dtype=torch.bool)
        x_BTD = self.embed(tokens_BT) + self.position(position_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_BTT[:, None])
        return F.linear(self.norm(x_BTD), self.embed.weight)


def pad_left(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows])


def answer_logp(policy: Policy, samples: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
    """log pi of each answer token, for (prompt, answer) pairs; one (T,) tensor per pair."""
    logp = []
    for start in range(0, len(samples), ROWS):
        part = samples[start : start + ROWS]
        tokens_BT = pad_left([prompt + answer for prompt, answer in part])
        longest = max(len(answer) for _, answer in part)
        # Row t predicts token t + 1, and answers lie at the right edge.
        logits_BTV = policy(tokens_BT)[:, -longest - 1 : -1]
        target_BT = tokens_BT[:, -longest:]
        logp_BT = logits_BTV.log_softmax(-1).gather(-1, target_BT[..., None])[..., 0]
        logp += [row_T[-len(answer) :] for row_T, (_, answer) in zip(logp_BT, part, strict=True)]
    return logp


@torch.no_grad()
def sample_actions(policy: Policy, prompts: Sequence[list[int]]) -> list[tuple[list[int], Tensor]]:
    """One action for every prompt, all at once, up to <end> or MAX_WORDS words, with its log pi."""
    tokens_BT = pad_left(prompts)
    for _ in range(MAX_WORDS + 1):
        logits_BV = policy(tokens_BT)[:, -1]
        tokens_BT = torch.cat([tokens_BT, torch.multinomial(logits_BV.softmax(-1), 1)], dim=1)
        new_BT = tokens_BT[:, len(max(prompts, key=len)) :]
        if bool((new_BT == END).any(1).all()):
            break
    answers = [row[: row.index(END) + 1] if END in row else row for row in new_BT.tolist()]
    logp = answer_logp(policy, list(zip(prompts, answers, strict=True)))
    return list(zip(answers, logp, strict=True))


# ---- rollout -----------------------------------------------------------------------------------
@dataclass
class Step:
    prompt: list[int]
    action: list[int]
    old_logp_T: Tensor
    verdict: int
    advantage: float = 0.0


@dataclass
class Episode:
    steps: list[Step] = field(default_factory=list)
    outcome: float = 0.0
    success: bool = False


def prompt_text(goal: str, last: str, observation: str) -> str:
    return f"{goal} | {last} | {observation} >"


def rule_verdict(before: Observation, after: Observation, seen: set[str]) -> int:
    """Flawed: nothing changed, back in a state of this episode, or score lost. Else good."""
    return FLAWED if after.state_key in seen or after.score < before.score else GOOD


def rollout(policy: Policy, words: Words, envs: Sequence[Env], starts: Sequence[int]) -> list[Episode]:
    """Play one episode per start, all in step."""
    resets = [env.reset(TASK, v) for env, v in zip(envs, starts, strict=False)]
    now = [reset.observation for reset in resets]
    last = ["" for _ in starts]
    seen = [{observation.state_key} for observation in now]
    episodes = [Episode() for _ in starts]
    for _ in range(MAX_STEPS):
        alive = [n for n, observation in enumerate(now) if not observation.done]
        if not alive:
            break
        prompts = [words.encode(prompt_text(resets[n].goal, last[n], now[n].text)) for n in alive]
        actions = sample_actions(policy, prompts)
        for n, prompt, (action, logp_T) in zip(alive, prompts, actions, strict=True):
            before, last[n] = now[n], words.decode(action)
            now[n] = envs[n].step(last[n])
            verdict = rule_verdict(before, now[n], seen[n])
            seen[n].add(now[n].state_key)
            episodes[n].steps.append(Step(prompt, action, logp_T, verdict))
    for episode, observation in zip(episodes, now, strict=True):
        episode.outcome, episode.success = observation.outcome, observation.success
    return episodes


# ---- the method --------------------------------------------------------------------------------
def group_advantages(rewards_G: Tensor, eps: float = 1e-4) -> Tensor:
    """GRPO: each episode counts once, whatever its length. A group without spread gives zeros."""
    centred_G = rewards_G - rewards_G.mean()
    return centred_G / (rewards_G.std(unbiased=False) + eps)


def policy_loss(logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, clip: float = 0.2) -> Tensor:
    ratio_T = (logp_T - old_logp_T).exp()
    clipped_T = ratio_T.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T).mean()


def right_verdict_share(logits_NV: Tensor, target_N: Tensor) -> float:
    """Share of verdict prompts where the right word is the likelier of the two."""
    says_flawed_N = logits_NV[:, FLAWED] > logits_NV[:, GOOD]
    return float((says_flawed_N == (target_N == FLAWED)).float().mean())


def balanced(good, flawed, rng: random.Random, most: int) -> list[tuple[list[int], list[int]]]:
    """(verdict prompt, verdict word) pairs, as many good as flawed ones."""
    fewer = min(len(good), len(flawed), most)
    return [(p, [GOOD]) for p in rng.sample(good, fewer)] + [(p, [FLAWED]) for p in rng.sample(flawed, fewer)]

def split(verdicts):
    return [list(p) for p, v in verdicts.items() if v == GOOD], [list(p) for p, v in verdicts.items() if v == FLAWED]

def expert_samples(env, words, variations, rng):
    """Behaviour cloning: the expert's steps. Verdicts: its actions, and flawed ones beside them."""
    imitation, verdicts = [], {}
    for variation in variations:
        plan = env.expert(TASK, variation) or ()
        goal, now = env.reset(TASK, variation)
        last, seen = "", {now.state_key}
        commands = sorted({f"{verb} {way}{door}" for verb, door in (("go", ""), ("open", " door")) for way in ("north", "south", "east", "west")} | {c for c in plan if c[:2] != "go"})
        for command in plan:
            prompt = words.encode(prompt_text(goal, last, now.text))
            here = env.snapshot()
            for c in (command, *commands):
                after = env.step(c)
                v = rule_verdict(now, after, seen)
                verdicts[*prompt, *words.encode(c), END, JUDGE] = v
                env.restore(here)
            imitation.append((prompt, [*words.encode(command), END]))
            now, last = env.step(command), command
            seen.add(now.state_key)
    return imitation, verdicts


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gcd-weight", type=float, default=0.5, help="lambda; 0 is plain GRPO")
    parser.add_argument("--warm-steps", type=int, default=300, help="steps of behaviour cloning")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--warm-lr", type=float, default=2e-3)
    parser.add_argument("--houses", type=int, default=16)
    parser.add_argument("--mb", type=int, default=4)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    began = time.perf_counter()

    envs = [make_env("rooms", {"rooms": 4, "distractors": 0}) for _ in range(GROUPS * G)]
    words = Words()
    imitation, verdicts = expert_samples(envs[0], words, range(900), rng)
    policy = Policy()
    gf = split(verdicts)
    print("param", sum(p.numel() for p in policy.parameters()), len(words.ids), len(imitation), len(verdicts), sum(v==FLAWED for v in verdicts.values()), time.perf_counter()-began)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.warm_lr)
    for i in range(args.warm_steps):
        loss = -torch.cat(answer_logp(policy, rng.sample(imitation, 32))).mean()
        if args.gcd_weight:
            loss = loss - args.gcd_weight * torch.cat(answer_logp(policy, balanced(*gf, rng, 16))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 100 == 99: print(loss.item())
    def evaluate():
        eps = rollout(policy, words, envs, [v % args.houses for v in range(64)])
        print(sum(e.outcome for e in eps)/len(eps), sum(e.success for e in eps)/len(eps))
        eps = rollout(policy, words, envs, range(900, 900+GROUPS*G))
        eps += rollout(policy, words, envs, range(900, 900+GROUPS*G))
        return sum(e.outcome for e in eps)/len(eps), sum(e.success for e in eps)/len(eps)
    print(evaluate(), time.perf_counter()-began)
    if args.iterations==0:
        for v in (0,1,2,900,901):
            [ep]=rollout(policy, words, envs, [v])
            print(envs[0].expert(TASK,v))
            for st in ep.steps: print(words.decode(st.prompt), '=>', words.decode(st.action), SPECIAL[st.verdict], round(st.old_logp_T.sum().exp().item(),2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.98))
    for iteration in range(args.iterations):
        t0=time.perf_counter()
        starts = [v for v in rng.sample(range(args.houses), GROUPS) for _ in range(G)]
        episodes = rollout(policy, words, envs, starts)
        t1=time.perf_counter()
        rewards_NG = torch.tensor([e.outcome for e in episodes]).view(GROUPS, G)
        advantages_N = torch.cat([group_advantages(r) for r in rewards_NG]).tolist()
        for e, a in zip(episodes, advantages_N):
            for s in e.steps: s.advantage = a
        steps = [s for e in episodes for s in e.steps]
        trained = [s for s in steps if s.advantage]
        vs = balanced(*split({(*s.prompt, *s.action, JUDGE): s.verdict for s in steps}), rng, 64)
        acc = float("nan")
        if vs:
          with torch.no_grad():
            logits = policy(pad_left([p for p, _ in vs]))[:, -1]
          acc = right_verdict_share(logits, torch.tensor([v[0] for _, v in vs]))
        rng.shuffle(trained); rng.shuffle(vs)
        for m in range(args.mb):
            part, vpart = trained[m::args.mb], vs[m::args.mb]
            loss = torch.zeros(())
            if part:
                logp_T = torch.cat(answer_logp(policy, [(s.prompt, s.action) for s in part]))
                adv_T = torch.cat([torch.full((len(s.action),), s.advantage) for s in part])
                loss = policy_loss(logp_T, torch.cat([s.old_logp_T for s in part]), adv_T)
            if vpart and args.gcd_weight:
                loss = loss - args.gcd_weight * torch.cat(answer_logp(policy, vpart)).mean()
            if loss.grad_fn is None: continue
            optimizer.zero_grad(); loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        print(iteration, f"{rewards_NG.mean():.3f} {sum(e.success for e in episodes)/64:.2f} flawed {sum(s.verdict == FLAWED for s in steps)/len(steps):.2f} acc {acc:.2f} n {len(vs)} steps {len(steps)} {t1-t0:.2f} {time.perf_counter()-t1:.2f}")
    print(evaluate(), time.perf_counter()-began)
    return {}


if __name__ == "__main__":
    main()
