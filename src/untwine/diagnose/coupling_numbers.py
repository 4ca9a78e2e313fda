"""What is said of the Gram of a run's samples, as plain numbers ready for JSON: rates beside their
null, cosines by pair kind, the terms of every sample. For `untwine diagnose coupling` (measure.py)
and for the diagnosis during training (online.py)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from untwine.diagnose.analysis import (
    Decomposition,
    Rate,
    cosine_histograms,
    kind_strata,
    lifts_by_source,
    parted,
    push_from_other_states,
    reinforced_rates,
)
from untwine.diagnose.coupling import Gram
from untwine.diagnose.run_samples import RunSample, whole_batch
from untwine.diagnose.scoring import Context
from untwine.policy.loading import Policy

LARGEST_CHANGE = 0.01  # nats: the step at which changes are given


def context_of(policy: Policy) -> Context:
    """The context forward passes of a policy run in."""
    exact = policy.dtype in (torch.float32, torch.float64)
    return contextlib.nullcontext if exact else policy.autocast


def reinforced_numbers(
    whole_NN: torch.Tensor,
    weights_N: torch.Tensor,
    labelled_N: torch.Tensor,
    strata: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """The rate under three meanings of flawed."""
    labelled = reinforced_rates(whole_NN, weights_N, labelled_N, strata)
    punished = reinforced_rates(whole_NN, weights_N, labelled_N, strata, punished=True)
    return {
        "labelled flawed": rate_numbers(labelled),
        "labelled flawed, advantage below 0": rate_numbers(punished),
        "advantage below 0": rate_numbers(reinforced_rates(whole_NN, weights_N, None, strata)),
    }


def lift_numbers(
    whole_NN: torch.Tensor,
    weights_N: torch.Tensor,
    chosen: Sequence[RunSample],
    rate: float,
) -> dict[str, Any]:
    """Who lifts the punished flawed samples (`Lifted`): all of them, and those of each kind."""
    punished_N = weights_N < 0
    punished_N &= torch.tensor([s.verdict == "flawed" for s in chosen])
    strata = {"all": torch.ones_like(punished_N), **kind_strata([s.kind for s in chosen])}
    found = {}
    for name, mask in strata.items():
        if bool((punished_N & mask).any()):
            lifted = lifts_by_source(
                whole_NN,
                weights_N,
                punished_N & mask,
                [s.state for s in chosen],
                [_command(s) for s in chosen],
                [s.verdict for s in chosen],
                rate=rate,
            )
            found[name] = {**dataclasses.asdict(lifted), "delta": lifted.delta}
    return found


def credit_numbers(
    K_NN: torch.Tensor, chosen: Sequence[RunSample], credits: Mapping[str, Sequence[float]]
) -> dict[str, Any] | None:
    """How far steps with the weights of each credit would part good from flawed samples
    (`parted`); None where either are missing."""
    good_N, flawed_N = (
        torch.tensor([s.verdict == verdict for s in chosen]) for verdict in ("good", "flawed")
    )
    if not good_N.any() or not flawed_N.any():
        return None
    prompts = [s.sample.prompt_ids for s in chosen]
    found = {
        name: parted(K_NN, torch.tensor(weights, dtype=torch.float64), good_N, flawed_N, prompts)
        for name, weights in credits.items()
    }
    return {
        name: {**dataclasses.asdict(p), "difference": p.difference} for name, p in found.items()
    }


def cosine_numbers(found: Gram, chosen: Sequence[RunSample]) -> list[dict[str, Any]]:
    """Histograms of cosine coupling by pair kind and relation, as `CosineHistogram`."""
    histograms = cosine_histograms(
        found.K_NN,
        [s.verdict for s in chosen],
        [s.step.state_key for s in chosen],
        [_command(s) for s in chosen],
        [s.task for s in chosen],
    )
    return [dataclasses.asdict(h) for h in histograms]


def sample_numbers(
    chosen: Sequence[RunSample], found: Gram, parts: Decomposition, everyone: Sequence[RunSample]
) -> list[dict[str, Any]]:
    """Every sample with its log pi, the terms of its change in nats, and its `push` for
    `untwine theory regions --points` (analysis.push_from_other_states).

    everyone  all distinct samples of the batch that `chosen` were drawn from
    """
    pushes_N = _pushes(everyone, chosen, found)
    return [
        {
            **sample_record(s),
            "logprob": float(found.logprobs_N[i]),
            "own": float(parts.own[i]),
            "coupled": float(parts.coupled[i]),
            "delta": float(parts.delta[i]),
            "push": float(pushes_N[i]),
        }
        for i, s in enumerate(chosen)
    ]


def _pushes(
    everyone: Sequence[RunSample], chosen: Sequence[RunSample], found: Gram
) -> torch.Tensor:
    visits: dict[tuple[str, str], float] = defaultdict(float)
    for sample in everyone:
        visits[sample.state] += sample.share
    return push_from_other_states(
        whole_batch(found.K_NN, len(everyone)),
        torch.tensor([s.weight for s in chosen], dtype=torch.float64),
        found.logprobs_N,
        [s.state for s in chosen],
        torch.tensor([visits[s.state] for s in chosen], dtype=torch.float64),
    )


def _command(sample: RunSample) -> str:
    """What was said, as far as it could be read."""
    return sample.step.command or sample.step.text


def rate_numbers(rates: Mapping[str, Rate]) -> dict[str, Any]:
    """Rates by stratum, as `Rate`."""
    return {name: dataclasses.asdict(rate) for name, rate in rates.items()}


def sample_record(sample: RunSample) -> dict[str, Any]:
    """Where a sample is from and what is known of it."""
    step = sample.step
    return {
        "task": sample.task,
        "episode": sample.episode.id,
        "step": step.index,
        "state_key": step.state_key,
        "command": step.command,
        "text": step.text,
        "verdict": sample.verdict,
        "kind": sample.kind,
        "weight": sample.weight,
        "count": sample.count,
    }
