"""What a Gram says about training: functions of plain tensors and lists.

A step of gradient ascent of rate eta on sum_j w_j log pi(a_j|s_j) changes log pi of sample i, to
first order, by

    Delta_i = eta sum_j w_j K_ij = eta ( w_i K_ii  +  sum_{j != i} w_j K_ij )  =  self + coupled.

Flawed samples are those labelled so or, where no labels are given, those with w_i < 0. One is
reinforced though flawed when Delta_i > 0. In a single batch this happens to many samples by chance,
so every rate comes with the rate under permuted weights.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from untwine.diagnose.coupling import cosines
from untwine.errors import UntwineError

PROBABILITY_EDGES = (0.05, 0.5)
_FEWEST = 20  # permutations that an interval and a p-value need


@dataclass(frozen=True, slots=True)
class Merged:
    """Distinct samples of a list.

    first    (U) index of the first occurrence of each
    member   (N) which distinct sample each of the list is
    weights  (U) summed weights, float64
    counts   (U) how often each occurs
    """

    first: tuple[int, ...]
    member: tuple[int, ...]
    weights: torch.Tensor
    counts: torch.Tensor


def merge_duplicates(keys: Sequence[Hashable], weights_N: Sequence[float] | torch.Tensor) -> Merged:
    """Merge samples of equal key, as equal (state, action) have one gradient; weights are summed.

    keys  what makes two samples the same: token ids of prompt and action, for instance
    """
    numbers: dict[Hashable, int] = {}
    member = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
    first = tuple(member.index(u) for u in range(len(numbers)))
    index = torch.tensor(member, dtype=torch.long)
    weights = torch.as_tensor(weights_N, dtype=torch.float64)
    if len(weights) != len(index):
        raise UntwineError(f"{len(index)} samples but {len(weights)} weights")
    zeros = torch.zeros(len(first), dtype=torch.float64)
    ones = torch.ones_like(weights)
    return Merged(
        first, member, zeros.index_add(0, index, weights), zeros.index_add(0, index, ones)
    )


@dataclass(frozen=True, slots=True)
class Decomposition:
    """Change of log pi of each sample in nats, (N,) each; `delta` = `own` + `coupled`."""

    delta: torch.Tensor
    own: torch.Tensor
    coupled: torch.Tensor


def decompose(K_NN: torch.Tensor, weights_N: torch.Tensor, rate: float = 1.0) -> Decomposition:
    """Self and coupled term of every sample (docs/diagnose/coupling.md)."""
    weights_N = weights_N.to(K_NN)
    delta_N = rate * (K_NN @ weights_N)
    own_N = rate * weights_N * K_NN.diagonal()
    return Decomposition(delta_N, own_N, delta_N - own_N)


def push_from_other_states(
    K_NN: torch.Tensor,
    weights_N: torch.Tensor,
    logprobs_N: torch.Tensor,
    states: Sequence[Hashable],
    visits_N: torch.Tensor,
) -> torch.Tensor:
    """The coupled push of the theory's two states, kappa r' q' (1 - q'), for each sample; (N,).

    There z is the logit of an action and its feature has length 1. Where log pi has the gradient
    (1 - q) in z, samples j of other states move z of sample i by

        dz_i/dt = (1 - q_i) / K_ii  sum_j w_j K_ij / visits_i

    in the units of r q (1 - q), the correction when the state is visited once per unit of time and
    r is the risk in units of the advantages that the weights are made of. NaN where K_ii is 0.

    weights_N  advantage x weight in the loss
    states     equal for samples of one state of one task instance
    visits_N   weight in the loss of all visits to the state of each sample
    """
    others_NN = K_NN * ~_same(states).to(K_NN.device)
    pushed_N = others_NN @ weights_N.to(K_NN)
    free_N = -torch.expm1(logprobs_N.to(K_NN))
    return pushed_N * free_N / (K_NN.diagonal() * visits_N.to(K_NN))


@dataclass(frozen=True, slots=True)
class Rate:
    """Share of flawed samples with Delta > 0, and the same under permuted weights.

    null           mean share under permutation; interval: its 2.5 % and 97.5 % points
    p_value        share of permutations with a rate at least as large (one-sided)
    share and null are None where there is no flawed sample, interval and p_value also where there
    are fewer than 20 permutations
    """

    flawed: int
    reinforced: int
    share: float | None
    null: float | None
    interval: tuple[float, float] | None
    p_value: float | None


def reinforced_rates(
    K_NN: torch.Tensor,
    weights_N: torch.Tensor,
    flawed_N: torch.Tensor | None = None,
    strata: Mapping[str, torch.Tensor] | None = None,
    *,
    punished: bool = False,
    permutations: int = 1000,
    seed: int = 0,
) -> dict[str, Rate]:
    """The reinforced-though-flawed rate over all samples (key `all`) and over each stratum.

    flawed_N   who is flawed; None: those with a negative weight, in a permutation those to whom a
               negative weight fell
    punished   of the flawed, count those with a negative weight only: credit was right about them,
               so that coupling alone can lift them
    strata     name -> mask (N,)
    The null permutes the weights over all samples and keeps the Gram, labels and strata.
    """
    count = len(weights_N)
    weights_N = weights_N.to(K_NN)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(count, generator=generator) for _ in range(permutations)])
    permuted_RN = weights_N[orders.to(weights_N.device)]
    up_RN = permuted_RN @ K_NN > 0
    up_N = K_NN @ weights_N > 0
    everyone = torch.ones(count, dtype=torch.bool, device=K_NN.device)
    rates = {}
    for name, mask in {"all": everyone, **(strata or {})}.items():
        who = mask if flawed_N is None else flawed_N & mask
        if flawed_N is None or punished:
            chosen_N, chosen_RN = (weights_N < 0) & who, (permuted_RN < 0) & who
        else:
            chosen_N, chosen_RN = who, who.expand(permutations, -1)
        rates[name] = _rate(chosen_N, up_N, chosen_RN, up_RN)
    return rates


def push_rates(
    push_N: torch.Tensor,
    null_RN: torch.Tensor,
    flawed_N: torch.Tensor,
    strata: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Rate]:
    """Share of flawed probes that the mean gradient pushes up (`steps.mean_push`), over all and by
    stratum, beside its null pushes."""
    everyone = torch.ones_like(flawed_N)
    return {
        name: _rate(
            flawed_N & mask,
            push_N > 0,
            (flawed_N & mask).expand(len(null_RN), -1),
            null_RN > 0,
        )
        for name, mask in {"all": everyone, **(strata or {})}.items()
    }


def _rate(
    chosen_N: torch.Tensor, up_N: torch.Tensor, chosen_RN: torch.Tensor, up_RN: torch.Tensor
) -> Rate:
    flawed, reinforced = int(chosen_N.sum()), int((chosen_N & up_N).sum())
    totals_R = chosen_RN.sum(1)
    some_R = totals_R > 0
    if not flawed or not some_R.any():
        return Rate(flawed, reinforced, None, None, None, None)
    null_R = (chosen_RN & up_RN).sum(1)[some_R].double() / totals_R[some_R]
    share = reinforced / flawed
    if len(null_R) < _FEWEST:
        return Rate(flawed, reinforced, share, float(null_R.mean()), None, None)
    low, high = torch.quantile(null_R, torch.tensor([0.025, 0.975]).to(null_R)).tolist()
    as_large = int((null_R >= share - 1e-12).sum())
    p_value = (1 + as_large) / (1 + len(null_R))
    return Rate(flawed, reinforced, share, float(null_R.mean()), (low, high), p_value)


def probability_strata(logprobs_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """Masks by pi(a|s): rare (below 0.05), middle, likely (above 0.5, the danger region)."""
    low, high = PROBABILITY_EDGES
    pi_N = logprobs_N.exp()
    return {
        f"pi < {low:g}": pi_N < low,
        f"{low:g} <= pi <= {high:g}": (pi_N >= low) & (pi_N <= high),
        f"pi > {high:g}": pi_N > high,
    }


def kind_strata(kinds: Sequence[str | None]) -> dict[str, torch.Tensor]:
    """Masks by action kind; samples without one are in none."""
    names = sorted({kind for kind in kinds if kind is not None})
    return {name: torch.tensor([kind == name for kind in kinds]) for name in names}


@dataclass(frozen=True, slots=True)
class Offender:
    """A flawed sample whose probability rises, and who lifts it.

    pushers  (j, w_j K_ij times the rate) of the samples with the largest push, j != sample
    """

    sample: int
    delta: float
    own: float
    coupled: float
    pushers: tuple[tuple[int, float], ...]


def worst_offenders(
    K_NN: torch.Tensor,
    weights_N: torch.Tensor,
    flawed_N: torch.Tensor,
    *,
    count: int = 10,
    pushers: int = 3,
    rate: float = 1.0,
) -> list[Offender]:
    """Flawed samples with Delta > 0, largest first, each with the samples that pushed it most."""
    parts = decompose(K_NN, weights_N, rate)
    pushes_NN = rate * K_NN * weights_N.to(K_NN)
    pushes_NN.fill_diagonal_(-torch.inf)
    ranked = sorted(flawed_N.nonzero()[:, 0].tolist(), key=lambda i: -float(parts.delta[i]))
    found = []
    for i in ranked[:count]:
        if parts.delta[i] <= 0:
            break
        values, who = pushes_NN[i].topk(min(pushers, len(pushes_NN) - 1))
        pairs = zip(who.tolist(), values.tolist(), strict=True)
        found.append(
            Offender(
                i,
                float(parts.delta[i]),
                float(parts.own[i]),
                float(parts.coupled[i]),
                tuple((j, value) for j, value in pairs if value > 0),
            )
        )
    return found


Credit = Literal["rewarded", "punished"]
LIFT_RELATIONS = ("same state", "same command", "same first word", "other")


@dataclass(frozen=True, slots=True)
class Lift:
    """What samples of one sort add to the change of log pi of a set of targets.

    relation  of a sample to its target: the first of LIFT_RELATIONS that holds
    credit    rewarded (w > 0) or punished (w < 0)
    verdict   what the labels say of them: good, flawed, or None
    mean      their summed push w_j K_ij times the rate, mean over the targets
    """

    relation: str
    credit: Credit
    verdict: str | None
    mean: float


@dataclass(frozen=True, slots=True)
class Lifted:
    """`own` + the means of all `sources` = mean change of log pi of `targets` samples."""

    targets: int
    own: float
    sources: tuple[Lift, ...]

    @property
    def delta(self) -> float:
        return self.own + math.fsum(source.mean for source in self.sources)


def lifts_by_source(
    K_NN: torch.Tensor,
    weights_N: torch.Tensor,
    target_N: torch.Tensor,
    states: Sequence[Hashable],
    commands: Sequence[str],
    verdicts: Sequence[str | None],
    *,
    rate: float = 1.0,
) -> Lifted:
    """Who lifts the targets, and who holds them down: the coupled term of `decompose`, split by
    what other samples have to do with a target, how they were credited, and what labels say.

    target_N  mask (N,), at least one of them set
    states    equal for samples of one state of one task instance
    """
    if not bool(target_N.any()):
        raise UntwineError("no sample is a target; ask for those that there are")
    weights_N = weights_N.to(K_NN)
    pushes_TN = rate * (K_NN * weights_N)[target_N]
    own_TN = torch.eye(len(weights_N), dtype=torch.bool, device=K_NN.device)[target_N]
    own = float(pushes_TN[own_TN].mean())
    pushes_TN = pushes_TN.masked_fill(own_TN, 0.0)
    words = [(command.split() or [""])[0] for command in commands]
    labelled: dict[str | None, torch.Tensor] = {
        verdict: torch.tensor([v == verdict for v in verdicts], device=K_NN.device)
        for verdict in ("good", "flawed", None)
    }
    credits: dict[Credit, torch.Tensor] = {"rewarded": weights_N > 0, "punished": weights_N < 0}
    left_TN = ~own_TN
    sources = []
    for relation, keys in zip(LIFT_RELATIONS, (states, commands, words, None), strict=True):
        related_TN = left_TN if keys is None else left_TN & _same(keys).to(K_NN.device)[target_N]
        left_TN = left_TN & ~related_TN
        for credit, credited_N in credits.items():
            for verdict, of_N in labelled.items():
                mask_TN = related_TN & credited_N & of_N
                if mask_TN.any():
                    mean = float((pushes_TN * mask_TN).sum() / len(pushes_TN))
                    sources.append(Lift(relation, credit, verdict, mean))
    return Lifted(len(pushes_TN), own, tuple(sources))


@dataclass(frozen=True, slots=True)
class Parted:
    """What a step does to samples that were not its own: mean change of log pi, in units of the
    mean norm of the samples' gradients, for a step of length 1."""

    good: float
    flawed: float

    @property
    def difference(self) -> float:
        return self.good - self.flawed


def parted(
    K_NN: torch.Tensor,
    weights_N: torch.Tensor,
    good_N: torch.Tensor,
    flawed_N: torch.Tensor,
    prompts: Sequence[Hashable],
) -> Parted:
    """How far a step along sum_j w_j g_j, made as long as any other, parts good from flawed
    samples. Only what comes from samples with other prompts counts: what was not sampled is to be
    learnt, too.

    good_N, flawed_N  masks (N,), each with at least one set
    """
    if not bool(good_N.any()) or not bool(flawed_N.any()):
        raise UntwineError("good and flawed samples are both needed to see how they are parted")
    weights_N = weights_N.to(K_NN)
    length = (weights_N @ K_NN @ weights_N).clamp_min(0).sqrt()
    if length == 0:
        return Parted(0.0, 0.0)
    unit = K_NN.diagonal().clamp_min(0).sqrt().mean()
    pushed_N = (K_NN * ~_same(prompts).to(K_NN.device)) @ weights_N / (length * unit)
    return Parted(float(pushed_N[good_N].mean()), float(pushed_N[flawed_N].mean()))


PAIR_KINDS = ("good-good", "good-flawed", "flawed-flawed")
RELATIONS = ("same state", "same command", "same task", "other")


@dataclass(frozen=True, slots=True)
class CosineHistogram:
    """Cosine coupling K_ij / sqrt(K_ii K_jj) of pairs i < j of one kind and relation.

    counts  over `bins` equal bins of [-1, 1]; mean is None where there is no pair
    """

    kind: str
    relation: str
    pairs: int
    mean: float | None
    counts: tuple[int, ...]


def cosine_histograms(
    K_NN: torch.Tensor,
    verdicts: Sequence[str | None],
    states: Sequence[Hashable],
    commands: Sequence[Hashable],
    tasks: Sequence[Hashable],
    *,
    bins: int = 40,
) -> list[CosineHistogram]:
    """Histograms by pair kind x relation. A pair counts in the first relation that holds: same
    state (of the same task), same command text, same task, other. Samples without a verdict, and
    those whose gradient is 0, are left out."""
    cosines_NN = cosines(K_NN).cpu()
    good = torch.tensor([v == "good" for v in verdicts])
    flawed = torch.tensor([v == "flawed" for v in verdicts])
    by_kind = {
        "good-good": good[:, None] & good,
        "good-flawed": (good[:, None] & flawed) | (flawed[:, None] & good),
        "flawed-flawed": flawed[:, None] & flawed,
    }
    task_NN = _same(tasks)
    left = torch.ones(K_NN.shape, dtype=torch.bool).triu(1) & cosines_NN.isfinite()
    relations = {}
    for name, mask in (
        ("same state", _same(states) & task_NN),
        ("same command", _same(commands)),
        ("same task", task_NN),
    ):
        relations[name] = left & mask
        left = left & ~mask
    relations["other"] = left
    return [
        _histogram(kind, relation, cosines_NN[by_kind[kind] & relations[relation]], bins)
        for kind in PAIR_KINDS
        for relation in RELATIONS
    ]


def _same(keys: Sequence[Any]) -> torch.Tensor:
    numbers: dict[Hashable, int] = {}
    index = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
    return index[:, None] == index


def _histogram(kind: str, relation: str, values: torch.Tensor, bins: int) -> CosineHistogram:
    counts = torch.histc(values.clamp(-1, 1).float(), bins, -1, 1).long().tolist()
    mean = float(values.mean()) if len(values) else None
    return CosineHistogram(kind, relation, len(values), mean, tuple(counts))
