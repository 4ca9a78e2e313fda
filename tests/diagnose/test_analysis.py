"""Numbers from a Gram: hand-worked cases, brute force, and permutations that can be listed."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict

import pytest
import torch

from untwine.diagnose.analysis import (
    cosine_histograms,
    decompose,
    kind_strata,
    lifts_by_source,
    merge_duplicates,
    parted,
    probability_strata,
    push_from_other_states,
    push_rates,
    reinforced_rates,
    worst_offenders,
)
from untwine.errors import UntwineError
from untwine.theory.regions import TwoStates

# Gradients in the plane: 0 and 1 alike, 2 against them, 3 across.
G = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
K = G @ G.T
W = torch.tensor([-1.0, 1.0, -0.5, -2.0], dtype=torch.float64)


def random_gram(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return g @ g.T, torch.randn(count, generator=generator, dtype=torch.float64)


def test_duplicates_are_merged_and_their_weights_summed() -> None:
    merged = merge_duplicates(["a", "b", "a", "c", "b", "a"], [1, 2, 3, 4, -2, 0.5])
    assert merged.first == (0, 1, 3)
    assert merged.member == (0, 1, 0, 2, 1, 0)
    assert merged.weights.tolist() == [4.5, 0.0, 4.0]
    assert merged.counts.tolist() == [3, 2, 1]


def test_merging_does_not_change_any_push() -> None:
    k, _ = random_gram(5, 0)
    twice = [0, 1, 2, 2, 3, 4, 4, 4]
    weights = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    merged = merge_duplicates(twice, weights)
    whole = decompose(k[twice][:, twice], weights).delta
    torch.testing.assert_close(whole[list(merged.first)], decompose(k, merged.weights).delta)


def test_the_two_terms_by_hand() -> None:
    parts = decompose(K, W, rate=0.1)
    # sample 0: self -1 * 1, coupled 1 * 2 + (-0.5) * (-1) + 0
    assert parts.own.tolist() == pytest.approx([-0.1, 0.4, -0.05, -1.8])
    assert parts.coupled.tolist() == pytest.approx([0.25, -0.1, -0.1, 0.0])
    assert parts.delta.tolist() == pytest.approx([0.15, 0.3, -0.15, -1.8])


def test_offenders_and_who_pushed_them() -> None:
    flawed = torch.tensor([True, False, True, True])
    (worst,) = worst_offenders(K, W, flawed)
    assert (worst.sample, worst.pushers) == (0, ((1, 2.0), (2, 0.5)))
    assert (worst.own, worst.coupled, worst.delta) == (-1.0, 2.5, 1.5)
    assert worst_offenders(K, W, flawed, pushers=1)[0].pushers == ((1, 2.0),)
    assert worst_offenders(K, -W, torch.tensor([False, True, False, False])) == []


def test_who_lifts_by_hand() -> None:
    """Target 0 (w -1): itself -1; 1 is rewarded, in another state, the same command; 2 is punished
    and shares the first word; 3 across it."""
    found = lifts_by_source(
        K,
        W,
        torch.tensor([True, False, False, False]),
        ["s", "t", "t", "s"],
        ["open door", "open door", "open box", ""],
        ["flawed", "good", None, "flawed"],
    )
    assert (found.targets, found.own) == (1, -1.0)
    assert [(s.relation, s.credit, s.verdict, s.mean) for s in found.sources] == [
        ("same state", "punished", "flawed", 0.0),
        ("same command", "rewarded", "good", 2.0),
        ("same first word", "punished", None, 0.5),
    ]
    assert found.delta == 1.5
    with pytest.raises(UntwineError, match="no sample is a target"):
        lifts_by_source(K, W, torch.zeros(4, dtype=torch.bool), "abcd", list("abcd"), [None] * 4)


@pytest.mark.parametrize("seed", range(4))
def test_who_lifts_against_a_loop(seed: int) -> None:
    rng = random.Random(seed)
    count = 30
    k, weights = random_gram(count, seed)
    weights[rng.randrange(count)] = 0.0
    states = [rng.randrange(5) for _ in range(count)]
    commands = [f"{rng.choice('ab')} {rng.choice('xyz')}" for _ in range(count)]
    verdicts = [rng.choice(["good", "flawed", None]) for _ in range(count)]
    targets = [i for i in range(count) if rng.random() < 0.3]
    mask = torch.tensor([i in targets for i in range(count)])
    sums: dict[tuple[str, str, str | None], float] = defaultdict(float)
    for i in targets:
        for j in set(range(count)) - {i}:
            if states[i] == states[j]:
                relation = "same state"
            elif commands[i] == commands[j]:
                relation = "same command"
            elif commands[i][0] == commands[j][0]:
                relation = "same first word"
            else:
                relation = "other"
            if weights[j] != 0:
                credit = "rewarded" if weights[j] > 0 else "punished"
                push = 0.3 * float(weights[j] * k[i, j]) / len(targets)
                sums[relation, credit, verdicts[j]] += push
    found = lifts_by_source(k, weights, mask, states, commands, verdicts, rate=0.3)
    ours = {(s.relation, s.credit, s.verdict): s.mean for s in found.sources}
    assert ours == pytest.approx(sums)
    parts = decompose(k, weights, rate=0.3)
    assert found.own == pytest.approx(float(parts.own[mask].mean()))
    assert found.delta == pytest.approx(float(parts.delta[mask].mean()))


@pytest.mark.parametrize("seed", range(4))
def test_parting_is_that_of_a_step_of_length_one(seed: int) -> None:
    """Against gradients themselves: the step is a sum of vectors, a prompt's own ones left out."""
    generator = torch.Generator().manual_seed(seed)
    g_ND = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    weights_N = torch.randn(12, dtype=torch.float64, generator=generator)
    prompts = [i // 2 for i in range(12)]
    good, flawed = [0, 3, 4], [1, 6, 9, 11]
    length = (weights_N @ g_ND).norm()
    unit = g_ND.norm(dim=1).mean()

    def change(i: int) -> float:
        others = [j for j in range(12) if prompts[j] != prompts[i]]
        return float(g_ND[i] @ (weights_N[others] @ g_ND[others]) / (length * unit))

    masks = [torch.tensor([i in chosen for i in range(12)]) for chosen in (good, flawed)]
    found = parted(g_ND @ g_ND.T, weights_N, *masks, prompts)
    means = [sum(map(change, chosen)) / len(chosen) for chosen in (good, flawed)]
    assert [found.good, found.flawed] == pytest.approx(means)
    assert found.difference == pytest.approx(means[0] - means[1])
    still = parted(g_ND @ g_ND.T, 0 * weights_N, *masks, prompts)
    assert (still.good, still.flawed) == (0.0, 0.0)
    with pytest.raises(UntwineError, match="both needed"):
        parted(g_ND @ g_ND.T, weights_N, masks[0], masks[0] & ~masks[0], prompts)


def test_rate_and_its_null_against_all_permutations() -> None:
    k, w = random_gram(5, 3)
    flawed = torch.tensor([True, False, True, True, False])
    every = [torch.tensor(p) for p in itertools.permutations(range(5))]
    fixed = [float((((k @ w[p]) > 0) & flawed).sum()) / 3 for p in every]
    moving = [float((((k @ w[p]) > 0) & (w[p] < 0)).sum()) / int((w < 0).sum()) for p in every]
    both = [
        float((((k @ w[p]) > 0) & (w[p] < 0) & flawed).sum()) / int(((w[p] < 0) & flawed).sum())
        for p in every
        if ((w[p] < 0) & flawed).any()
    ]
    for mask, punished, values in (
        (flawed, False, fixed), (None, False, moving), (flawed, True, both)
    ):  # fmt: skip
        rate = reinforced_rates(k, w, mask, punished=punished, permutations=20000)["all"]
        chosen = flawed & (w < 0) if punished else flawed if mask is not None else w < 0
        assert rate.flawed == int(chosen.sum())
        assert rate.share == pytest.approx(values[0])
        assert rate.null == pytest.approx(sum(values) / len(values), abs=0.01)
        p_value = sum(v >= values[0] - 1e-9 for v in values) / len(values)
        assert rate.p_value == pytest.approx(p_value, abs=0.01)
        low, high = rate.interval or (math.nan, math.nan)
        assert min(values) <= low <= high <= max(values)


def test_rates_by_stratum_and_without_flawed_samples() -> None:
    k, w = random_gram(6, 4)
    flawed = torch.tensor([True, True, True, False, False, False])
    strata = {"x": torch.tensor([True, False, True, True, False, False]), "none": ~flawed}
    rates = reinforced_rates(k, w, flawed, strata, permutations=50)
    up = k @ w > 0
    assert rates["x"].flawed == 2
    assert rates["x"].reinforced == int(up[0]) + int(up[2])
    assert rates["none"].share is None
    assert rates["none"].null is None


def test_a_gram_without_coupling_reinforces_nothing_flawed() -> None:
    w = torch.tensor([-1.0, 1.0, -2.0, 0.5], dtype=torch.float64)
    rate = reinforced_rates(torch.eye(4, dtype=torch.float64), w)["all"]
    assert (rate.share, rate.null, rate.p_value) == (0.0, 0.0, 1.0)


def test_strata() -> None:
    masks = probability_strata(torch.tensor([0.01, 0.06, 0.3, 0.49, 0.9]).log())
    assert [m.tolist() for m in masks.values()] == [
        [True, False, False, False, False],
        [False, True, True, True, False],
        [False, False, False, False, True],
    ]
    kinds = kind_strata(["undo", None, "invalid", "undo"])
    assert {n: m.tolist() for n, m in kinds.items()} == {
        "invalid": [False, False, True, False],
        "undo": [True, False, False, True],
    }


def test_rates_of_mean_pushes() -> None:
    push = torch.tensor([1.0, -1.0, 2.0, 3.0])
    null = torch.tensor([[1.0, 1.0, -1.0, 1.0], [-1.0, -1.0, -1.0, 1.0]])
    flawed = torch.tensor([True, True, True, False])
    rate = push_rates(push, null, flawed)["all"]
    assert (rate.flawed, rate.reinforced) == (3, 2)
    assert rate.null == pytest.approx((2 / 3 + 0) / 2)
    assert (rate.interval, rate.p_value) == (None, None)  # two permutations say nothing about it


def test_cosine_histograms_against_a_loop() -> None:
    k, _ = random_gram(9, 5)
    k[8] = k[:, 8] = 0  # a forced action has no gradient
    verdicts = ["good", "flawed", None, "good", "flawed", "flawed", "good", "flawed", "good"]
    states = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    commands = ["a", "b", "a", "a", "b", "c", "c", "a", "b"]
    tasks = [0, 0, 1, 0, 0, 1, 1, 1, 0]
    expected: dict[tuple[str, str], list[float]] = {}
    for i, j in itertools.combinations(range(8), 2):
        if verdicts[i] is None or verdicts[j] is None:
            continue
        kind = "-".join(sorted([verdicts[i], verdicts[j]], key=["good", "flawed"].index))
        relation = (
            "same state" if states[i] == states[j] and tasks[i] == tasks[j]
            else "same command" if commands[i] == commands[j]
            else "same task" if tasks[i] == tasks[j]
            else "other"
        )  # fmt: skip
        value = float(k[i, j] / (k[i, i] * k[j, j]).sqrt())
        expected.setdefault((kind, relation), []).append(value)
    found = cosine_histograms(k, verdicts, states, commands, tasks, bins=4)
    assert len(found) == 12
    for h in found:
        values = expected.get((h.kind, h.relation), [])
        assert h.pairs == len(values)
        if values:
            assert h.mean == pytest.approx(sum(values) / len(values))
            counts = [sum(-1 + b / 2 <= v < -0.5 + b / 2 for v in values) for b in range(4)]
            assert list(h.counts) == counts
        else:
            assert h.mean is None


def test_the_push_is_that_of_the_theory() -> None:
    """The two states of `untwine theory regions`, with every action once in its exact weight: what
    the other state does to the flawed action, and the correction by its own."""
    model, q, other = TwoStates(risk=0.3, gain=0.5, overlap=0.8), 0.7, 0.4
    visits, length = 0.25, 3.0  # of each state in the loss, and of the features
    here = length * torch.tensor([1.0, 0.0], dtype=torch.float64)
    there = length * torch.tensor([0.8, 0.6], dtype=torch.float64)  # overlap 0.8
    gradients = torch.stack(((1 - q) * here, -q * here, (1 - other) * there, -other * there))
    chances = torch.tensor([q, 1 - q, other, 1 - other], dtype=torch.float64)
    advantages = torch.tensor(
        [-model.risk * (1 - q), model.risk * q, model.gain * (1 - other), -model.gain * other],
        dtype=torch.float64,
    )
    weights = visits * chances * advantages
    gram = gradients @ gradients.T
    every_visit = torch.full((4,), visits, dtype=torch.float64)
    found = push_from_other_states(gram, weights, chances.log(), ["s", "s", "t", "t"], every_visit)
    assert found[0].item() == pytest.approx(float(model.push(other)))
    # seen from s', the flawed action of s pushes down
    assert found[2].item() == pytest.approx(-model.overlap * float(model.correction(q)))
    alone = push_from_other_states(gram, weights, chances.log(), [0, 1, 2, 3], every_visit)
    own = weights[0] * gram[0, 0] * (1 - q) / gram[0, 0] / visits
    same_state = alone[0] - found[0] + own
    assert same_state.item() == pytest.approx(-float(model.correction(q)))
    forced = torch.zeros(2, 2, dtype=torch.float64)
    nothing = push_from_other_states(forced, weights[:2], torch.zeros(2), [0, 1], every_visit[:2])
    assert nothing.isnan().all()
