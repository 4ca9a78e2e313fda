"""`untwine diagnose coupling`: everything about the coupling of one iteration's samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from untwine.batch import LossMean
from untwine.config import Recipe
from untwine.credit.by_label import labels_alone, penalise, veto
from untwine.diagnose.analysis import (
    Offender,
    decompose,
    kind_strata,
    probability_strata,
    push_rates,
    worst_offenders,
)
from untwine.diagnose.coupling import (
    Gram,
    cosines,
    gram,
    head_gram,
    off_diagonal_correlation,
)
from untwine.diagnose.coupling_numbers import (
    LARGEST_CHANGE,
    context_of,
    cosine_numbers,
    credit_numbers,
    lift_numbers,
    rate_numbers,
    reinforced_numbers,
    sample_numbers,
    sample_record,
)
from untwine.diagnose.output import save_results
from untwine.diagnose.parameters import ParameterChoice
from untwine.diagnose.recorded import (
    episode_file,
    iteration_files,
    load_recorded_policy,
    read_recorded,
    recorded_adam,
)
from untwine.diagnose.run_samples import (
    RunSample,
    check_tokens,
    distinct_samples,
    draw_samples,
    whole_batch,
)
from untwine.diagnose.steps import check_prediction, mean_push
from untwine.errors import ModelError, UntwineError
from untwine.policy.loading import Policy
from untwine.progress import Display
from untwine.records import Group

CREDITS: Mapping[str, Callable[[Group, Sequence[str]], Group]] = {
    "penalty of 0.3": lambda group, sources: penalise(group, 0.3, sources),
    "veto": lambda group, sources: veto(group, ("flawed", "good"), sources),
    "labels alone": labels_alone,
}
"""What other uses of the labels would make of the advantages that were trained with."""


@dataclass(frozen=True, slots=True)
class CouplingOptions:
    """count: samples at most; batches: of other iterations, for the mean push, at most;
    recompute, memory_mib and folder as in `coupling.gram`; taught: sources whose labels other
    credit would go by, by default all."""

    count: int = 128
    batches: int = 16
    seed: int = 0
    mean: LossMean = "token"
    temperature: float = 1.0
    chunk: int = 16
    recompute: bool = False
    memory_mib: float | None = None
    folder: Path | None = None
    parameters: ParameterChoice = None
    preconditioner: Mapping[str, torch.Tensor] | None = None
    offenders: int = 10
    taught: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class CouplingReport:
    """numbers: ready for JSON (docs/diagnose/coupling.md); tensors: K_NN, head_NN, cosines_NN."""

    numbers: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def find_coupling(
    run: Path,
    recipe: Recipe,
    options: CouplingOptions,
    display: Display,
    *,
    iteration: int | None = None,
    checkpoint: str = "",
    adam: bool = False,
    double: bool = False,
) -> dict[str, Any]:
    """Measure one iteration of a run, save what was found, and return the numbers.

    options     mean, temperature, preconditioner and taught are replaced by what the run has
    iteration   by default the last one
    checkpoint  the policy; by default the one that played the episodes, or else RUN/model
    adam        in the metric of the optimizer at the checkpoint
    double      compute in float64, whatever the run computed in
    """
    iteration, file = episode_file(run, iteration)
    found = load_recorded_policy(run, recipe, iteration, checkpoint, or_last=True)
    options = dataclasses.replace(
        options,
        mean=recipe.loss.mean,
        temperature=recipe.sampling.temperature,
        taught=recipe.gcd.taught,
        preconditioner=recorded_adam(found, recipe) if adam else None,
    )
    policy = in_float64(found.policy) if double else found.policy
    files = iteration_files(run)
    near = sorted(files.keys() - {iteration}, key=lambda k: (abs(k - iteration), k))
    report = measure_coupling(
        policy,
        read_recorded(file, recipe),
        [read_recorded(files[k], recipe) for k in sorted(near[: options.batches])],
        options,
        display,
    )
    numbers = {
        "format": "untwine-coupling-1",
        "iteration": iteration,
        "policy": found.source,
        "metric": "adam" if adam else "sgd",
        "dtype": str(policy.dtype).removeprefix("torch."),
        **report.numbers,
    }
    save_results(run, "coupling", numbers, report.tensors)
    return numbers


def in_float64(policy: Policy) -> Policy:
    """The same policy, its weights and computations in float64; `policy` itself is used up."""
    return dataclasses.replace(policy, model=policy.model.double(), dtype=torch.float64)


def measure_coupling(
    policy: Policy,
    groups: Sequence[Group],
    others: Sequence[Sequence[Group]],
    options: CouplingOptions,
    display: Display,
) -> CouplingReport:
    """Gram, decomposition, rates with their nulls, offenders, cosines, honesty, mean push.

    groups  one iteration; others: further iterations, the batches of the mean push
    """
    everyone = distinct_samples(groups, options.mean)
    chosen = draw_samples(everyone, options.count, options.seed)
    if len(chosen) < 2:
        raise UntwineError(
            f"the iteration holds {len(chosen)} distinct trained steps, and coupling needs two; "
            "take another iteration (groups without spread are not trained on)"
        )
    check_tokens(chosen, policy.model.get_input_embeddings().weight.shape[0])
    samples = [s.sample for s in chosen]
    weights_N = torch.tensor([s.weight for s in chosen], dtype=torch.float64)
    found, head, correlation = _grams(policy, samples, options, display)
    whole_NN = whole_batch(found.K_NN, len(everyone))
    top = float((whole_NN @ weights_N).abs().max())
    rate = LARGEST_CHANGE / top if top > 0 else 1.0
    parts = decompose(whole_NN, weights_N, rate)
    labelled_N = torch.tensor([s.verdict == "flawed" for s in chosen])
    strata = {
        **probability_strata(found.logprobs_N),
        **kind_strata([s.kind if s.verdict == "flawed" else None for s in chosen]),
    }
    flawed_N = labelled_N if labelled_N.any() else weights_N < 0
    offenders = worst_offenders(whole_NN, weights_N, flawed_N, count=options.offenders, rate=rate)
    recorded_N = torch.tensor([s.recorded_logprob for s in chosen], dtype=torch.float64)
    drift_N = (found.logprobs_N - recorded_N).abs()
    numbers = {
        "steps": sum(s.count for s in everyone),
        "distinct": len(everyone),
        "samples": len(chosen),
        "seed": options.seed,
        "temperature": options.temperature,
        "parameters": len(found.parameters),
        "looped_parameters": list(found.looped),
        "drift": {"mean": float(drift_N.mean()), "largest": float(drift_N.max())},
        "head_correlation": correlation,
        "reinforced": reinforced_numbers(whole_NN, weights_N, labelled_N, strata),
        "lifts": lift_numbers(whole_NN, weights_N, chosen, rate),
        "credits": credit_numbers(found.K_NN, chosen, _weights_by_credit(chosen, groups, options)),
        "honesty": _honesty(policy, samples, weights_N, found, options, display),
        "mean_push": _mean_push(policy, chosen, flawed_N, strata, others, options, display),
        "cosines": cosine_numbers(found, chosen),
        "largest_change": LARGEST_CHANGE,
        "offenders": [_offender(o, chosen, found, policy) for o in offenders],
        "sample_list": sample_numbers(chosen, found, parts, everyone),
    }
    tensors = {"K_NN": found.K_NN, "weights_N": weights_N, "logprobs_N": found.logprobs_N}
    return CouplingReport(numbers, tensors if head is None else {**tensors, "head_NN": head.K_NN})


def _weights_by_credit(
    chosen: Sequence[RunSample], groups: Sequence[Group], options: CouplingOptions
) -> dict[str, list[float]]:
    """Weights of the chosen samples as they were trained with, and with other uses of labels."""
    found = {"as trained": [s.weight for s in chosen]}
    for name, credit in CREDITS.items():
        samples = distinct_samples(
            [credit(group, options.taught) for group in groups], options.mean
        )
        found[name] = [s.weight for s in draw_samples(samples, options.count, options.seed)]
    return found


def _grams(
    policy: Policy, samples: Sequence[Any], options: CouplingOptions, display: Display
) -> tuple[Gram, Gram | None, float | None]:
    common: dict[str, Any] = {
        "temperature": options.temperature,
        "chunk": options.chunk,
        "memory_mib": options.memory_mib,
        "folder": options.folder,
        "context": context_of(policy),
    }
    with display.bar("gradient Gram", 1, "pass") as bar:
        found = gram(
            policy.model,
            samples,
            parameters=options.parameters,
            preconditioner=options.preconditioner,
            recompute=options.recompute,
            on_progress=bar.update,
            **common,
        )
    try:
        with display.bar("head alone", 1, "chunk") as bar:
            head = head_gram(policy.model, samples, on_progress=bar.update, **common)
    except ModelError:  # a projection that is not plain has no forward-only Gram
        return found, None, None
    return found, head, off_diagonal_correlation(head.K_NN, found.K_NN)


def _honesty(
    policy: Policy,
    samples: Sequence[Any],
    weights_N: torch.Tensor,
    found: Gram,
    options: CouplingOptions,
    display: Display,
) -> dict[str, Any] | None:
    if not (found.K_NN @ weights_N).any():
        return None
    with display.bar("honesty check", 1, "step"):
        honesty = check_prediction(
            policy.model,
            samples,
            weights_N,
            found.K_NN,
            preconditioner=options.preconditioner,
            parameters=options.parameters,
            largest=LARGEST_CHANGE,
            temperature=options.temperature,
            chunk=options.chunk,
            context=context_of(policy),
        )
    return {
        "correlation": honesty.correlation,
        "slope": honesty.slope,
        "rate": honesty.rate,
        "predicted": honesty.predicted.tolist(),
        "measured": honesty.measured.tolist(),
    }


def _mean_push(
    policy: Policy,
    chosen: Sequence[RunSample],
    flawed_N: torch.Tensor,
    strata: Mapping[str, torch.Tensor],
    others: Sequence[Sequence[Group]],
    options: CouplingOptions,
    display: Display,
) -> dict[str, Any] | None:
    batches = []
    for number, groups in enumerate(others):
        drawn = draw_samples(
            distinct_samples(groups, options.mean), options.count, options.seed + number
        )
        if len(drawn) > 1:
            weights = torch.tensor([s.weight for s in drawn], dtype=torch.float64)
            batches.append(([s.sample for s in drawn], weights))
    if not batches:
        return None
    with display.bar("mean push", 1, "pass") as bar:
        found = mean_push(
            policy.model,
            [s.sample for s in chosen],
            batches,
            preconditioner=options.preconditioner,
            parameters=options.parameters,
            seed=options.seed,
            temperature=options.temperature,
            chunk=options.chunk,
            memory_mib=options.memory_mib,
            folder=options.folder,
            context=context_of(policy),
            on_progress=bar.update,
        )
    return {
        "batches": found.batches,
        "signal_share": found.signal_share,
        "rates": rate_numbers(push_rates(found.push, found.null, flawed_N, strata)),
        "push": found.push.tolist(),
    }


def _offender(
    offender: Offender, chosen: Sequence[RunSample], found: Gram, policy: Policy
) -> dict[str, Any]:
    """One offender and its pushers, with their prompts as text so that they can be compared."""
    alike_NN = cosines(found.K_NN)

    def shown(i: int) -> dict[str, Any]:
        prompt = policy.tokenizer.decode(list(chosen[i].sample.prompt_ids))
        probability = float(found.logprobs_N[i].exp())
        return {
            "sample": i,
            **sample_record(chosen[i]),
            "probability": probability,
            "prompt": prompt,
        }

    return {
        **shown(offender.sample),
        "delta": offender.delta,
        "own": offender.own,
        "coupled": offender.coupled,
        "pushers": [
            {**shown(j), "push": push, "cosine": float(alike_NN[offender.sample, j])}
            for j, push in offender.pushers
        ],
    }
