"""Diagnosis during training: every k iterations a cheap part of the microscope, between the
rollout and the update (docs/diagnose/online.md).

It looks at the policy that played the iteration, at its episodes and at the gradient they are about
to give, and leaves weights, gradients and random generators as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from untwine.config import Recipe
from untwine.diagnose.analysis import PAIR_KINDS, decompose, kind_strata, probability_strata
from untwine.diagnose.calibration import SIGNS, Judged, calibrate
from untwine.diagnose.coupling import gram
from untwine.diagnose.coupling_numbers import (
    LARGEST_CHANGE,
    context_of,
    cosine_numbers,
    reinforced_numbers,
    sample_numbers,
)
from untwine.diagnose.output import results_folder, to_json, write_text
from untwine.diagnose.probes import (
    ProbeSet,
    choose_probes,
    find_probes,
    load_probes,
    probes_path,
    read_probes,
    summarise_probes,
    write_probes,
)
from untwine.diagnose.run_samples import distinct_samples, draw_samples, whole_batch
from untwine.envs.protocol import EnvInfo
from untwine.errors import Interrupted, UntwineError
from untwine.gcd.labels import group_labels
from untwine.records import Group
from untwine.rollout import Collector

FORMAT = "untwine-online-1"

Values = dict[str, float | None]
Check = Callable[[], None]


@dataclass(slots=True)
class Findings:
    """values: for the metrics; numbers: for the file; notes: one sentence per part left out."""

    values: Values = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self, seconds: float) -> list[str]:
        """What the terminal shows; `seconds` is how long the whole iteration took. Nothing where
        nothing was measured."""
        spent = self.values.get("seconds_diagnose")
        if spent is None:
            return []
        cost = f"({spent:.1f} s, {spent / seconds:.0%} of the iteration)"
        return [f"diagnosis: {_in_words(self.values)}  {cost}", *self.notes]


class OnlineDiagnosis:
    """What section `diagnose` of a recipe asks for, in one run directory.

    CheckpointError when the run holds a damaged probe file.
    """

    def __init__(self, recipe: Recipe, run: Path, collector: Collector) -> None:
        self._recipe = recipe
        self._run = run
        self._collector = collector
        kept = find_probes(run) if recipe.diagnose.every and recipe.diagnose.probes else None
        self._probes: ProbeSet | None = load_probes(kept) if kept else None

    def due(self, iteration: int) -> bool:
        every = self._recipe.diagnose.every
        return every > 0 and iteration % every == 0

    def measure(
        self, groups: Sequence[Group], iteration: int, budget: int, check: Check
    ) -> Findings:
        """All parts for one iteration, and its file RUN/diagnose/online-iter-000000.json.

        groups   with labels and advantages, before the update
        budget   distinct tokens per forward pass over the probes
        check    called now and then; may raise to stop
        A part that cannot be had (a model whose gradients cannot be followed, no memory left on the
        GPU) is left out with a note; training goes on.
        """
        started = time.perf_counter()
        config = self._recipe.diagnose
        found = Findings()
        if config.probes:
            self._part(found, "probes", lambda: self._follow(groups, iteration, budget))
        check()
        self._part(found, "calibration", lambda: _calibration(groups, self._collector.info))
        if config.samples:
            self._part(found, "coupling", lambda: self._coupling(groups, iteration, check))
        numbers = {"format": FORMAT, "iteration": iteration, **found.numbers}
        write_text(
            results_folder(self._run) / f"online-iter-{iteration:06d}.json", to_json(numbers)
        )
        found.values["seconds_diagnose"] = time.perf_counter() - started
        return found

    def _part(
        self, found: Findings, name: str, make: Callable[[], tuple[Values, Mapping[str, Any]]]
    ) -> None:
        started = time.perf_counter()
        try:
            values, found.numbers[name] = make()
            found.values |= values
        except Interrupted:
            raise
        except UntwineError as error:
            self._left_out(found, name, str(error))
        except torch.cuda.OutOfMemoryError:
            lower = "diagnose.samples" if name == "coupling" else "rl.microbatch_tokens"
            reason = f"they do not fit into the memory of the GPU; lower {lower}"
            self._left_out(found, name, reason)
        found.values[f"seconds_{name}"] = time.perf_counter() - started

    def _left_out(self, found: Findings, name: str, reason: str) -> None:
        found.numbers[name] = {"left_out": reason}
        found.notes.append(f"{name} left out: {reason}")

    def _follow(
        self, groups: Sequence[Group], iteration: int, budget: int
    ) -> tuple[Values, Mapping[str, Any]]:
        recipe, policy = self._recipe, self._collector.policy
        if self._probes is None:
            seed = f"{recipe.seed}/probes"
            self._probes = choose_probes(groups, self._collector, recipe.diagnose.probes, seed)
            write_probes(probes_path(self._run, iteration), self._probes)
        chosen = self._probes
        readings = read_probes(policy, chosen, recipe.sampling.temperature, budget)
        kinds = summarise_probes(chosen, readings)
        values: Values = {"probe_tokens": chosen.tokens}
        for kind, means in kinds.items():
            values[f"probe_{kind}"] = means["probability"]
            values |= {f"probe_{x}_{kind}": means[x] for x in ("logprob", "rank", "argmax")}
        return values, {
            "tokens": chosen.tokens,
            "kinds": kinds,
            "probe_list": [
                {"kind": p.kind, "logprob": r.logprob, "rank": r.rank, "argmax": r.argmax}
                for p, r in zip(chosen.probes, readings, strict=True)
            ],
        }

    def _coupling(
        self, groups: Sequence[Group], iteration: int, check: Check
    ) -> tuple[Values, Mapping[str, Any]]:
        recipe, policy = self._recipe, self._collector.policy
        everyone = distinct_samples(groups, recipe.loss.mean)
        chosen = draw_samples(everyone, recipe.diagnose.samples, recipe.seed + iteration)
        if len(chosen) < 2:
            raise UntwineError(
                f"the iteration holds {len(chosen)} distinct trained steps, and coupling needs two"
            )
        found = gram(
            policy.model,
            [s.sample for s in chosen],
            temperature=recipe.sampling.temperature,
            recompute=True,
            context=context_of(policy),
            on_progress=lambda done, total: check(),
        )
        weights_N = torch.tensor([s.weight for s in chosen], dtype=torch.float64)
        whole_NN = whole_batch(found.K_NN, len(everyone))
        top = float((whole_NN @ weights_N).abs().max())
        parts = decompose(whole_NN, weights_N, LARGEST_CHANGE / top if top > 0 else 1.0)
        flawed_N = torch.tensor([s.verdict == "flawed" for s in chosen])
        kinds = kind_strata([s.kind if s.verdict == "flawed" else None for s in chosen])
        strata = {**probability_strata(found.logprobs_N), **kinds}
        rates = reinforced_numbers(whole_NN, weights_N, flawed_N, strata)
        cosines = cosine_numbers(found, chosen)
        values: Values = {}
        for name, meaning in _MEANINGS.items():
            rate = rates[meaning]["all"]
            values |= {name: rate["share"], f"{name}_null": rate["null"]}
        for verdict in ("good", "flawed"):
            who_N = torch.tensor([s.verdict == verdict for s in chosen])
            values[f"push_self_{verdict}"] = _mean_over(parts.own, who_N)
            values[f"push_coupled_{verdict}"] = _mean_over(parts.coupled, who_N)
        for kind in PAIR_KINDS:
            values[f"cosine_{kind.replace('-', '_')}"] = _mean_cosine(cosines, kind)
        return values, {
            "distinct": len(everyone),
            "samples": len(chosen),
            "parameters": len(found.parameters),
            "largest_change": LARGEST_CHANGE,
            "reinforced": rates,
            "cosines": cosines,
            "sample_list": sample_numbers(chosen, found, parts, everyone),
        }


_MEANINGS = {
    "reinforced": "labelled flawed",
    "reinforced_punished": "labelled flawed, advantage below 0",
}


def _calibration(groups: Sequence[Group], info: EnvInfo) -> tuple[Values, Mapping[str, Any]]:
    """The advantages the steps carry against `group` labels, as `untwine diagnose calibration
    --labels group` has it for the method of the recipe."""
    found = [
        (step.advantage, SIGNS[label.verdict], g, episode.id)
        for g, group in enumerate(groups)
        for episode, labels in zip(group.episodes, group_labels(group, info), strict=True)
        for step, label in zip(episode.steps, labels, strict=True)
        if label is not None and step.advantage is not None
    ]
    if not found:
        raise UntwineError("no trained step has a `group` label")
    estimates, verdicts, numbers, names = zip(*found, strict=True)
    measures = calibrate(Judged.of(estimates, verdicts, groups=numbers, episodes=names))
    values: Values = {
        "calibration_good": _value(measures["good_mean"]),
        "calibration_flawed": _value(measures["flawed_mean"]),
        "calibration_difference": _value(measures["difference"]),
        "miscalibration": _value(measures["miscalibration"]),
        "sign_agreement": measures["sign_agreement"],
    }
    return values, {"source": "group", **measures}


def _value(measure: Mapping[str, Any] | None) -> float | None:
    return None if measure is None else measure["value"]


def _mean_over(values_N: torch.Tensor, who_N: torch.Tensor) -> float | None:
    return float(values_N[who_N].mean()) if who_N.any() else None


def _mean_cosine(histograms: Sequence[Mapping[str, Any]], kind: str) -> float | None:
    """Over all pairs of a kind, whatever their relation."""
    own = [h for h in histograms if h["kind"] == kind and h["pairs"]]
    pairs = sum(h["pairs"] for h in own)
    return sum(h["pairs"] * h["mean"] for h in own) / pairs if pairs else None


def _in_words(values: Mapping[str, float | None]) -> str:
    parts = []
    probes = [
        f"{name} {value:.2g}"
        for name, key in (
            ("good", "probe_good"),
            ("flawed", "probe_flawed"),
            ("never sampled", "probe_unsampled"),
        )
        if (value := values.get(key)) is not None
    ]
    if probes:
        parts.append("probes " + ", ".join(probes))
    wrong = values.get("miscalibration")
    if wrong is not None:
        parts.append(f"miscalibrated {wrong:.2f}")
    share, null = values.get("reinforced"), values.get("reinforced_null")
    if share is not None and null is not None:
        parts.append(f"reinforced though flawed {share:.2f} (permuted {null:.2f})")
    return "; ".join(parts) or "nothing to measure"
