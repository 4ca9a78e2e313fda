"""`head`: a linear classifier on what the actor thinks of its own action (the ablation of GCD).

    z = w . h + b,    h = mean over the action's tokens of the last hidden state
    L = mean over labelled actions of  log(1 + exp(-y z)),   y = +1 for good, -1 for flawed

The action is read in its acting prompt, so no verdict prompt is asked and no token is added to what
the policy already computes there. w and b are weights of their own, 0 at first.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import softplus

from untwine.batch import Row
from untwine.gcd.objectives.protocol import Exercise, Means
from untwine.gcd.questions import Judged, balanced, judged_steps
from untwine.policy.trie import build_trie
from untwine.records import Episode


class VerdictHead:
    """An `Objective` with a linear layer of its own."""

    def __init__(self, means: Means) -> None:
        self._means = means
        policy = means.policy
        width = policy.model.get_input_embeddings().weight.shape[1]
        self.linear = torch.nn.Linear(width, 1).to(policy.device)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        self.module: torch.nn.Module | None = self.linear

    def exercise(
        self, episodes: Sequence[Episode], rng: random.Random, generator: torch.Generator
    ) -> Exercise | None:
        rows: list[Row] = []
        used = 0
        for pair in balanced(judged_steps(episodes), rng, self._means.config.contrast):
            new = [_row(judged) for judged in pair]
            used += sum(row.length for row in new)
            if used > self._means.config.token_budget:
                break
            rows += new
        if not rows:
            return None
        total = len(rows)

        def loss(some: Sequence[Row]) -> tuple[torch.Tensor, dict[str, float]]:
            margins_n = self.margins(some)
            right = int((margins_n > 0).sum())
            return softplus(-margins_n).sum() / total, {"verdict_accuracy": right / total}

        return Exercise(rows, loss, {"verdicts": total})

    def margins(self, rows: Sequence[Row]) -> torch.Tensor:
        """y z of each row, (n,): positive where the head is right."""
        policy = self._means.policy
        trie = build_trie([row.ids for row in rows], "auto", policy.costs)
        nodes = [path[row.targets] for path, row in zip(trie.paths, rows, strict=True)]
        places_U = np.unique(np.concatenate(nodes))
        with policy.autocast():
            hidden_UD = policy.hidden_states_along(trie, places_U)
        where = [torch.from_numpy(np.searchsorted(places_U, n)).to(policy.device) for n in nodes]
        pooled = torch.stack([hidden_UD[places].float().mean(0) for places in where])
        signs_n = torch.tensor([float(row.advantages[0]) for row in rows], device=policy.device)
        scores_n: torch.Tensor = self.linear(pooled)[:, 0]
        return scores_n * signs_n


def _row(judged: Judged) -> Row:
    """The action in its acting prompt: its tokens are the targets, its sign the advantage."""
    step = judged.episode.steps[judged.t]
    n = len(step.action_ids)
    sign = 1.0 if judged.verdict == "good" else -1.0
    return Row(
        ids=np.array(step.prompt_ids + step.action_ids, dtype=np.int64),
        targets=np.arange(len(step.prompt_ids), len(step.prompt_ids) + n, dtype=np.int64),
        weights=np.full(n, 1.0, dtype=np.float32),
        old_logprobs=np.zeros(n, dtype=np.float32),
        advantages=np.full(n, sign, dtype=np.float32),
    )
