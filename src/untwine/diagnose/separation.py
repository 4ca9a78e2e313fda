"""Are good and flawed actions apart in the hidden states? Probe, silhouette, margin, map.

Everything but `action_states` works on plain arrays: states_ND and one label per row. Numbers of
few samples in many dimensions look too good; the probe is cross-validated over groups, the others
come with their value under shuffled labels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from untwine.diagnose.parameters import only_these_need_gradients
from untwine.diagnose.samples import SampleLike, as_samples, by_length, cut_chunks
from untwine.diagnose.scoring import Context, Progress, parts_of
from untwine.errors import UntwineError

Pool = Literal["mean", "last"]
Metric = Literal["cosine", "euclidean"]


@torch.no_grad()
def action_states(
    model: Any,
    samples: Sequence[SampleLike],
    *,
    pool: Pool = "mean",
    chunk: int = 16,
    context: Context = contextlib.nullcontext,
    on_progress: Progress = lambda done, total: None,
) -> torch.Tensor:
    """Hidden states of the action tokens at every layer, shape (layers + 1, N, D), float32, CPU.

    Layer 0 is the embedding, layer l the output of block l as transformers gives it (the last one
    after the final norm). `mean` averages over the action's tokens, `last` takes the last of them.
    UntwineError when there are no samples.
    """
    parts, steps = parts_of(model), as_samples(samples)
    if not steps:
        raise UntwineError("separation needs actions that are known to be good or flawed, got none")
    order = by_length(steps)
    chunks = cut_chunks([steps[i] for i in order], chunk, parts.device)
    found = []
    with only_these_need_gradients(model):
        for done, piece in enumerate(chunks):
            with context():
                layers = parts.body(
                    input_ids=piece.ids_BT, use_cache=False, output_hidden_states=True
                ).hidden_states
            lengths_B = torch.bincount(piece.sample_M, minlength=len(piece.rows))
            if pool == "mean":
                share_M = 1.0 / lengths_B[piece.sample_M]
            else:
                share_M = (piece.place_M == lengths_B[piece.sample_M] - 1).float()
            states_SMD = torch.stack([h[piece.sample_M, piece.column_M].float() for h in layers])
            shape = (len(layers), len(piece.rows), states_SMD.shape[-1])
            zeros = torch.zeros(shape, device=states_SMD.device)
            pooled = zeros.index_add(1, piece.sample_M, states_SMD * share_M[:, None])
            found.append(pooled.cpu())
            on_progress(done + 1, len(chunks))
    return torch.cat(found, 1)[:, torch.tensor(order).argsort()]


@dataclass(frozen=True, slots=True)
class Separation:
    """How well two classes are apart at one layer.

    accuracy, balanced  of the cross-validated linear probe: share right, and the mean over the two
                        classes (0.5 is chance); None where folds cannot be made
    majority            share of the larger class: what a constant answer gets right
    silhouette          mean silhouette in [-1, 1]; margin: see `centroid_margin`
    *_shuffled          mean of the same over shuffled labels
    """

    layer: int
    accuracy: float | None
    balanced: float | None
    majority: float
    silhouette: float
    silhouette_shuffled: float
    margin: float
    margin_shuffled: float


def separations(
    states_SND: torch.Tensor,
    flawed_N: Sequence[bool] | torch.Tensor,
    groups: Sequence[Hashable],
    *,
    folds: int = 5,
    penalty: float = 1.0,
    metric: Metric = "cosine",
    shuffles: int = 20,
    seed: int = 0,
) -> list[Separation]:
    """`Separation` of every layer; folds of the probe never split a group (a task instance)."""
    flawed = torch.as_tensor(flawed_N, dtype=torch.bool)
    _check_classes(flawed)
    found = []
    for layer, states_ND in enumerate(states_SND):
        states = states_ND.double()
        probe = probe_accuracy(states, flawed, groups, folds=folds, penalty=penalty, seed=seed)
        accuracy, balanced = probe or (None, None)
        generator = torch.Generator().manual_seed(seed)
        distances_NN = pair_distances(states, metric)
        mixed = [flawed[torch.randperm(len(flawed), generator=generator)] for _ in range(shuffles)]
        silhouettes = [mean_silhouette(distances_NN, labels) for labels in mixed]
        margins = [centroid_margin(states, labels) for labels in mixed]
        found.append(
            Separation(
                layer,
                accuracy,
                balanced,
                max(float(flawed.double().mean()), float((~flawed).double().mean())),
                mean_silhouette(distances_NN, flawed),
                math.fsum(silhouettes) / max(1, shuffles),
                centroid_margin(states, flawed),
                math.fsum(margins) / max(1, shuffles),
            )
        )
    return found


def _check_classes(flawed_N: torch.Tensor) -> None:
    good, flawed = int((~flawed_N).sum()), int(flawed_N.sum())
    if good < 2 or flawed < 2:
        raise UntwineError(
            f"separation needs at least two good and two flawed actions, got {good} and {flawed}"
        )


def grouped_folds(groups: Sequence[Hashable], folds: int, seed: int = 0) -> torch.Tensor:
    """Fold of each sample, (N,): whole groups, the largest first, each into the smallest fold so
    far; groups of equal size in an order that depends on the seed. Fewer groups, fewer folds."""
    names = sorted(set(groups), key=str)
    if len(names) < 2:
        raise UntwineError("a probe grouped by task needs samples of at least two tasks")
    generator = torch.Generator().manual_seed(seed)
    shuffled = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    sizes = {name: sum(g == name for g in groups) for name in shuffled}
    filled = [0] * min(folds, len(names))
    fold_of: dict[Hashable, int] = {}
    for name in sorted(shuffled, key=lambda n: -sizes[n]):
        fold_of[name] = filled.index(min(filled))
        filled[fold_of[name]] += sizes[name]
    return torch.tensor([fold_of[g] for g in groups])


def probe_accuracy(
    states_ND: torch.Tensor,
    flawed_N: torch.Tensor,
    groups: Sequence[Hashable],
    *,
    folds: int = 5,
    penalty: float = 1.0,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Accuracy and balanced accuracy of a linear probe on groups it has not seen.

    States are standardised with mean and deviation of the training folds. A fold whose training
    part holds one class only is left out; None when no fold is left, or a class is never tested.
    """
    fold_N = grouped_folds(groups, folds, seed)
    right, tested = [], []
    for fold in range(int(fold_N.max()) + 1):
        test_N = fold_N == fold
        train_ND, train_labels = states_ND[~test_N].double(), flawed_N[~test_N]
        if train_labels.all() or not train_labels.any():
            continue
        mean_D, spread_D = train_ND.mean(0), train_ND.std(0).clamp_min(1e-8)
        weights_D, bias = fit_logistic((train_ND - mean_D) / spread_D, train_labels, penalty)
        scores = ((states_ND[test_N].double() - mean_D) / spread_D) @ weights_D + bias
        right.append((scores > 0) == flawed_N[test_N])
        tested.append(flawed_N[test_N])
    if not right:
        return None
    correct, labels = torch.cat(right).double(), torch.cat(tested)
    if labels.all() or not labels.any():
        return None
    balanced = (correct[labels].mean() + correct[~labels].mean()) / 2
    return float(correct.mean()), float(balanced)


def fit_logistic(
    x_ND: torch.Tensor, labels_N: torch.Tensor, penalty: float = 1.0, steps: int = 50
) -> tuple[torch.Tensor, float]:
    """Weights (D,) and bias that minimise sum_i log(1 + exp(-y_i (w x_i + b))) + penalty |w|^2 / 2,
    y in {-1, 1}; the bias is not penalised. Newton's method with halved steps, in the span of the
    samples when there are fewer of them than dimensions."""
    x_ND = x_ND.double()
    basis = None
    if len(x_ND) < x_ND.shape[1]:  # the solution is a combination of the samples
        basis = torch.linalg.svd(x_ND, full_matrices=False).Vh
        x_ND = x_ND @ basis.T
    x = torch.cat((x_ND, torch.ones(len(x_ND), 1, dtype=x_ND.dtype)), 1)
    y = labels_N.double() * 2 - 1
    ridge = torch.full((x.shape[1],), float(penalty), dtype=x.dtype)
    ridge[-1] = 1e-9
    w = torch.zeros(x.shape[1], dtype=x.dtype)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(-y * (x @ w)).sum() + (ridge * w * w).sum() / 2

    for _ in range(steps):
        p = torch.sigmoid(-y * (x @ w))
        gradient = ridge * w - x.T @ (y * p)
        if gradient.norm() < 1e-9 * (1 + w.norm()):
            break
        hessian = (x.T * (p * (1 - p))) @ x + torch.diag(ridge)
        direction = torch.linalg.solve(hessian, gradient)
        size, before = 1.0, loss(w)
        while size > 1e-6 and loss(w - size * direction) > before:
            size /= 2
        w = w - size * direction
    weights = w[:-1] if basis is None else w[:-1] @ basis
    return weights, float(w[-1])


def pair_distances(states_ND: torch.Tensor, metric: Metric) -> torch.Tensor:
    """(N, N): 1 - cosine similarity, or the Euclidean distance."""
    if metric == "cosine":
        unit = torch.nn.functional.normalize(states_ND.double(), dim=-1)
        distances = (1 - unit @ unit.T).clamp_min(0)
    else:
        distances = torch.cdist(
            states_ND.double(), states_ND.double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
    return distances.fill_diagonal_(0)


def mean_silhouette(distances_NN: torch.Tensor, flawed_N: torch.Tensor) -> float:
    """Mean silhouette (Rousseeuw, 1987) of two classes: (b - a) / max(a, b) with a the mean
    distance to the others of one's class, b to the other class; 0 in a class of one."""
    same_NN = flawed_N[:, None] == flawed_N
    own_N = same_NN.sum(1)
    a_N = (distances_NN * same_NN).sum(1) / (own_N - 1).clamp_min(1)
    b_N = (distances_NN * ~same_NN).sum(1) / (~same_NN).sum(1).clamp_min(1)
    larger_N = torch.maximum(a_N, b_N)
    values_N = torch.where(larger_N > 0, (b_N - a_N) / larger_N.clamp_min(1e-300), 0.0)
    return float(torch.where(own_N > 1, values_N, 0.0).mean())


def centroid_margin(states_ND: torch.Tensor, flawed_N: torch.Tensor) -> float:
    """Distance of the two centroids, in units of the spread within the classes along the line
    between them (root of the pooled unbiased variance): Cohen's d on that line."""
    good, flawed = states_ND[~flawed_N].double(), states_ND[flawed_N].double()
    line = flawed.mean(0) - good.mean(0)
    distance = float(line.norm())
    if distance == 0:
        return 0.0
    line = line / distance
    squares = [float(((c - c.mean(0)) @ line).square().sum()) for c in (good, flawed)]
    spread = math.sqrt(sum(squares) / max(1, len(states_ND) - 2))
    return distance / spread if spread > 0 else math.inf


def plane(states_ND: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """Principal components: a map (N, 2), and the share of variance along each axis. The sign of an
    axis is such that its largest coordinate in size is positive."""
    centred = states_ND.double() - states_ND.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    map_N2 = torch.zeros(len(states_ND), 2, dtype=torch.float64)
    shares = [0.0, 0.0]
    for axis in range(min(2, len(s))):
        values = u[:, axis] * s[axis]
        map_N2[:, axis] = values * torch.sign(values[values.abs().argmax()])
        shares[axis] = float(s[axis] ** 2 / s.square().sum().clamp_min(1e-300))
    return map_N2, (shares[0], shares[1])
