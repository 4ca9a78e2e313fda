"""A label source and an objective of one's own, for the safe of own_environment.py.

From the folder above this one:

    untwine train examples/own_environment.yaml cold_start.steps=18 rl.iterations=10 \\
        rl.optimizer.lr=1e-3 'gcd.labels=[examples.own_teaching:side]' \\
        gcd.objective=examples.own_teaching:Imitation gcd.weight_of=gradient gcd.weight=0.3

They show the interface, no better method: what the policy already does well is not what it lacks.
docs/methods/gcd.md says what each part is for.
"""

import itertools
import random
from collections.abc import Sequence

import torch

from untwine.batch import Row, completion_row
from untwine.envs.protocol import EnvInfo
from untwine.gcd.labels import agreed_verdict
from untwine.gcd.objectives import Exercise, Means
from untwine.records import Episode, Group, Label, Step
from untwine.scoring import score


def side(group: Group, info: EnvInfo) -> list[list[Label | None]]:
    """Turning towards the number is good, turning elsewhere flawed; of a pull nothing is said."""
    return [[_side(step) for step in episode.steps] for episode in group.episodes]


def _side(step: Step) -> Label | None:
    if step.command not in ("turn left", "turn right"):
        return None
    towards = step.command.replace("turn", "to the") in step.observation
    return Label("side", "good", "towards") if towards else Label("side", "flawed", "away")


class Imitation:
    """Imitates what the policy itself did well:

    L = - mean over good actions of (mean over their tokens) log pi(token | before)
    """

    module = None  # it has no weights of its own

    def __init__(self, means: Means) -> None:
        self._means = means

    def exercise(
        self, episodes: Sequence[Episode], rng: random.Random, generator: torch.Generator
    ) -> Exercise | None:
        good = [s for e in episodes for s in e.steps if agreed_verdict(s) == "good"]
        rng.shuffle(good)
        ends = itertools.accumulate(len(s.prompt_ids) + len(s.action_ids) for s in good)
        chosen = good[: sum(end <= self._means.config.token_budget for end in ends)]
        rows = [completion_row(s.prompt_ids, s.action_ids, 1 / len(chosen)) for s in chosen]
        return Exercise(rows, self._loss, {"verdicts": len(rows)}) if rows else None

    def _loss(self, rows: Sequence[Row]) -> tuple[torch.Tensor, dict[str, float]]:
        """Of some of the rows; weights add up to 1 over all of them, and so do the measures."""
        targets = score(self._means.policy, rows)
        mean = (targets.weights_N * targets.logprobs_N).sum()
        return -mean, {"good_logprob": mean.item()}
