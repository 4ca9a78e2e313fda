"""Probe, silhouette, margin and map against brute force and cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.diagnose.reference import small_model, small_samples
from untwine.diagnose.separation import (
    action_states,
    centroid_margin,
    fit_logistic,
    grouped_folds,
    mean_silhouette,
    pair_distances,
    plane,
    probe_accuracy,
    separations,
)
from untwine.errors import UntwineError


def cloud(count: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


def labels_of(count: int) -> torch.Tensor:
    return torch.arange(count) % 3 == 0


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_silhouette_by_brute_force(metric: str) -> None:
    x, flawed = cloud(12, 4, 0).tolist(), labels_of(12).tolist()

    def distance(i: int, j: int) -> float:
        if metric == "euclidean":
            return math.dist(x[i], x[j])
        dot = sum(a * b for a, b in zip(x[i], x[j], strict=True))
        return 1 - dot / (math.hypot(*x[i]) * math.hypot(*x[j]))

    total = 0.0
    for i in range(12):
        own = [distance(i, j) for j in range(12) if j != i and flawed[j] == flawed[i]]
        other = [distance(i, j) for j in range(12) if flawed[j] != flawed[i]]
        a, b = sum(own) / len(own), sum(other) / len(other)
        total += (b - a) / max(a, b)
    distances = pair_distances(torch.tensor(x), metric)  # type: ignore[arg-type]
    assert mean_silhouette(distances, torch.tensor(flawed)) == pytest.approx(total / 12)


def test_silhouette_by_hand_and_of_a_class_of_one() -> None:
    distances = pair_distances(torch.tensor([[0.0], [1.0], [10.0]]), "euclidean")
    labels = torch.tensor([False, False, True])
    expected = ((10 - 1) / 10 + (9 - 1) / 9 + 0) / 3
    assert mean_silhouette(distances, labels) == pytest.approx(expected)


def test_margin_by_hand() -> None:
    x = torch.tensor([[0.0, 5.0], [2.0, -5.0], [10.0, 3.0], [12.0, -3.0]])
    labels = torch.tensor([False, False, True, True])
    # centroids 1 and 11 on the first axis; squares within 1 + 1 + 1 + 1, two degrees lost
    assert centroid_margin(x, labels) == pytest.approx(10 / math.sqrt(4 / 2))
    assert centroid_margin(torch.ones(4, 2), labels) == 0.0


def test_the_probe_solves_its_equations() -> None:
    """At the minimum the gradient of the stated objective is 0, by autograd."""
    for count, size in ((40, 5), (8, 30)):
        x, labels = cloud(count, size, 1), labels_of(count)
        weights, bias = fit_logistic(x, labels, penalty=0.7)
        w = weights.clone().requires_grad_()
        b = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
        y = labels.double() * 2 - 1
        loss = torch.log1p(torch.exp(-y * (x @ w + b))).sum() + 0.7 * (w @ w) / 2
        loss.backward()
        assert float(w.grad.abs().max()) < 1e-6
        assert float(b.grad.abs()) < 1e-6


def test_the_probe_in_one_dimension_by_search() -> None:
    x = torch.tensor([[-1.0], [0.5], [1.0], [3.0]], dtype=torch.float64)
    labels = torch.tensor([False, True, False, True])
    weights, bias = fit_logistic(x, labels, penalty=1.0)
    y = labels.double() * 2 - 1
    w, b = torch.meshgrid(
        torch.linspace(-2, 2, 801, dtype=torch.float64),
        torch.linspace(-2, 2, 801, dtype=torch.float64),
        indexing="ij",
    )
    loss = torch.log1p(torch.exp(-y * (w[..., None] * x[:, 0] + b[..., None]))).sum(-1) + w**2 / 2
    best = int(loss.argmin())
    assert float(weights[0]) == pytest.approx(float(w.flatten()[best]), abs=6e-3)
    assert bias == pytest.approx(float(b.flatten()[best]), abs=6e-3)


def test_separable_and_inseparable_data() -> None:
    x, labels = cloud(200, 6, 2), labels_of(200)
    groups = [i // 10 for i in range(200)]
    apart = x + 8.0 * labels[:, None]
    assert probe_accuracy(apart, labels, groups) == (1.0, 1.0)
    found = probe_accuracy(x, labels, groups)
    assert found is not None
    assert 0.35 < found[1] < 0.65
    near, far = separations(torch.stack((x, apart)), labels, groups, metric="euclidean")
    assert far.silhouette > 0.4 > 0.1 > abs(near.silhouette)
    assert far.margin > 5 > 1 > near.margin
    assert far.margin_shuffled < 1
    assert near.majority == pytest.approx(133 / 200)


def test_no_group_leaks_between_folds() -> None:
    """Labels are constant within a group and every group has a mark of its own: a probe that sees
    other members of a group would be right always; one that does not, can only guess."""
    groups = [i // 8 for i in range(320)]
    marks = torch.nn.functional.one_hot(torch.tensor(groups)).double()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([bool(order[g] % 2) for g in groups])
    leaking = probe_accuracy(marks, labels, list(range(320)))
    grouped = probe_accuracy(marks, labels, groups)
    assert leaking is not None
    assert grouped is not None
    assert leaking[1] == 1.0
    assert grouped[1] < 0.6


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=20),
    folds=st.integers(2, 6),
    seed=st.integers(0, 5),
)
@settings(max_examples=50, deadline=None)
def test_folds_hold_whole_groups_and_are_all_used(sizes: list[int], folds: int, seed: int) -> None:
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    fold = grouped_folds(groups, folds, seed).tolist()
    used = {g: {f for f, h in zip(fold, groups, strict=True) if h == g} for g in set(groups)}
    assert all(len(f) == 1 for f in used.values())
    assert set(fold) == set(range(min(folds, len(sizes))))
    counts = [fold.count(f) for f in set(fold)]
    assert max(counts) - min(counts) <= max(sizes)


def test_too_little_data() -> None:
    x = cloud(6, 3, 3)
    flawed = torch.tensor([True, False, False, False, False, False])
    with pytest.raises(UntwineError, match="at least two good and two flawed actions, got 5 and 1"):
        separations(x[None], flawed, [0, 1, 2, 3, 4, 5])
    with pytest.raises(UntwineError, match="at least two tasks"):
        grouped_folds(["a", "a"], 5)
    assert probe_accuracy(x[:4], torch.tensor([True, True, False, False]), [0, 0, 1, 1]) is None


def test_the_map_keeps_distances_of_a_plane() -> None:
    flat = cloud(10, 2, 4) @ torch.linalg.qr(cloud(7, 7, 5)).Q[:2]
    map_N2, shares = plane(flat)
    torch.testing.assert_close(torch.cdist(map_N2, map_N2), torch.cdist(flat, flat))
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] >= shares[1]
    for axis in range(2):
        assert map_N2[map_N2[:, axis].abs().argmax(), axis] > 0
    assert plane(torch.ones(3, 2))[0].abs().max() == 0


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_states_of_actions_one_sample_at_a_time(pool: str) -> None:
    model, samples = small_model("qwen3"), small_samples(7)
    found = action_states(model, samples, pool=pool, chunk=3)  # type: ignore[arg-type]
    assert found.shape == (3, 7, 32)
    model.eval()
    for i, sample in enumerate(samples):
        ids = torch.tensor([[*sample.prompt_ids, *sample.action_ids]])
        with torch.no_grad():
            layers = model(input_ids=ids, output_hidden_states=True).hidden_states
        for layer, hidden in enumerate(layers):
            own = hidden[0, len(sample.prompt_ids) :]
            expected = own.mean(0) if pool == "mean" else own[-1]
            torch.testing.assert_close(found[layer, i], expected, atol=1e-5, rtol=1e-4)
