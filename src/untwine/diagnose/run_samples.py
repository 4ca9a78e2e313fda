"""From recorded groups to step samples with what is known about them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from untwine.batch import LossMean, unit_weights
from untwine.diagnose.analysis import merge_duplicates
from untwine.diagnose.samples import Allowed, StepSample
from untwine.errors import UntwineError
from untwine.gcd.labels import agreed_verdict
from untwine.records import Episode, Group, Label, Step, Verdict


@dataclass(frozen=True, slots=True)
class RunSample:
    """A distinct (prompt, action) of an iteration; `step` and `episode` are where it first occurs.

    weight    advantage x weight of a token in the loss, summed over its occurrences
    share     the same without the advantages
    count     how often it occurs
    verdict   what its labels agree on, over all occurrences; None: not known
    kind      the first label's kind with that verdict (invalid, undo, progress, ...), or None
    source    who gave that label, or None
    """

    sample: StepSample
    episode: Episode
    step: Step
    weight: float
    share: float
    count: int
    verdict: Verdict | None
    kind: str | None
    source: str | None

    @property
    def task(self) -> str:
        return str(self.episode.ref)

    @property
    def state(self) -> tuple[str, str]:
        """Equal for samples of one state of one task instance."""
        return self.task, self.step.state_key

    @property
    def recorded_logprob(self) -> float:
        """log pi(a|s) when it was sampled, in nats."""
        return sum(self.step.logprobs)


def distinct_samples(groups: Sequence[Group], mean: LossMean) -> list[RunSample]:
    """All steps that were trained on (those with an advantage), equal ones merged."""
    episodes = [episode for group in groups for episode in group.episodes]
    weights = unit_weights(episodes, mean)
    found: list[_Found] = [
        (episode, step, step.advantage * weight, weight)
        for episode, row in zip(episodes, weights, strict=True)
        for step, weight in zip(episode.steps, row, strict=True)
        if step.advantage is not None
    ]
    return _merged(found)


def labelled_samples(groups: Sequence[Group]) -> list[RunSample]:
    """All steps whose labels agree on a verdict, trained on or not, equal ones merged; weight 0."""
    found = [(e, step, 0.0, 0.0) for group in groups for e in group.episodes for step in e.steps]
    return [sample for sample in _merged(found) if sample.verdict is not None]


def step_sample(step: Step) -> StepSample:
    """A step as the sample it was."""
    allowed: Allowed | None = None
    if step.allowed is not None:
        allowed = tuple(ids or None for ids in step.allowed)
    return StepSample(step.prompt_ids, step.action_ids, allowed)


_Found = tuple[Episode, Step, float, float]


def _merged(found: Sequence[_Found]) -> list[RunSample]:
    keys = [(step.prompt_ids, step.action_ids, step.allowed) for _, step, _, _ in found]
    merged = merge_duplicates(keys, [weight for _, _, weight, _ in found])
    members: list[list[Step]] = [[] for _ in merged.first]
    shares = [0.0] * len(merged.first)
    for (_, step, _, share), u in zip(found, merged.member, strict=True):
        members[u].append(step)
        shares[u] += share
    samples = []
    for u, first in enumerate(merged.first):
        episode, step, _, _ = found[first]
        verdict = agreed_verdict(*members[u])
        label = _first_label(members[u], verdict)
        samples.append(
            RunSample(
                sample=step_sample(step),
                episode=episode,
                step=step,
                weight=float(merged.weights[u]),
                share=shares[u],
                count=int(merged.counts[u]),
                verdict=verdict,
                kind=label.kind if label else None,
                source=label.source if label else None,
            )
        )
    return samples


def draw_samples(samples: Sequence[RunSample], count: int, seed: int) -> list[RunSample]:
    """`count` of the distinct samples, each as likely as any other, in their old order; all of them
    when there are fewer."""
    if len(samples) <= count:
        return list(samples)
    chosen = random.Random(seed).sample(range(len(samples)), count)
    return [samples[i] for i in sorted(chosen)]


def check_tokens(samples: Sequence[RunSample], rows: int) -> None:
    """UntwineError when a token id has no row in the model's embedding."""
    largest = max(max(s.sample.prompt_ids + s.sample.action_ids) for s in samples)
    if largest >= rows:
        raise UntwineError(
            f"the episodes hold token id {largest}, but the model has {rows} embedding rows: they "
            "were recorded with another model"
        )


def whole_batch(K_NN: torch.Tensor, population: int) -> torch.Tensor:
    """The Gram with which Delta of N samples drawn from a batch of `population` distinct ones
    estimates, without bias, Delta in the whole batch: pairs i != j count (population - 1)/(N - 1)
    times."""
    scaled_NN = K_NN * ((population - 1) / max(1, len(K_NN) - 1))
    scaled_NN.diagonal().copy_(K_NN.diagonal())
    return scaled_NN


def _first_label(steps: Sequence[Step], verdict: Verdict | None) -> Label | None:
    labels = (label for step in steps for label in step.labels if label.verdict == verdict)
    return next(labels, None)
