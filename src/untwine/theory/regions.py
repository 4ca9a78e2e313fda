"""When does the push from other states beat the correction? Two states that share features.

Action b is flawed in state s (it costs r) and good in s' (it gains r'); q and q' are its
probabilities there, z and z' its logits, and kappa in [0, 1] is the overlap of the features. Exact
gradient ascent on the expected return J = r' q' - r q gives

    dz /dt = -r q (1 - q) + kappa r' q' (1 - q'),
    dz'/dt =  r' q' (1 - q') - kappa r q (1 - q).

The coupled push kappa r' q' (1 - q') does not depend on q, the correction r q (1 - q) vanishes at
both ends. So dq/dt = 0 on q = (1 +- sqrt(1 - 4 c)) / 2 with c = kappa r' q' (1 - q') / r: q falls
between the two branches, rises above the upper one (the danger region) and below the lower one, and
rises everywhere where c > 1/4.

In the long run, for kappa < 1: z - z' falls all the time, at the rate (1 - kappa) times the sum of
the two corrections, and from every inner start q tends to 0 and q' to 1. But while q is near 1 this
takes long: see `peak_odds`.

Letters of shapes: N flows or seeds, T times.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from untwine.errors import ConfigError
from untwine.theory.advantage import (
    NORMALISERS,
    Array,
    Normaliser,
    group_advantages,
    slope,
)
from untwine.theory.flow import RATES, distance_to_flow, integrate, thinned


def sigmoid(z: ArrayLike) -> Array:
    """1 / (1 + exp(-z)), without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(z, dtype=np.float64))))


def logit(q: ArrayLike) -> Array:
    """log(q / (1 - q)) for q between 0 and 1."""
    q = np.asarray(q, dtype=np.float64)
    return np.asarray(np.log(q) - np.log1p(-q))


@dataclass(frozen=True)
class TwoStates:
    """The model: r, r' and kappa; success probabilities without b in s and in s' for sampling."""

    risk: float = 0.3
    gain: float = 0.3
    overlap: float = 0.8
    success: float = 0.6
    success_other: float = 0.3

    def __post_init__(self) -> None:
        for name in ("risk", "gain"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in (0, 1], not {getattr(self, name)}")
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"overlap must lie between 0 and 1, not {self.overlap}")
        if not self.risk <= self.success <= 1:
            raise ConfigError(
                f"success ({self.success}) must lie between risk ({self.risk}) and 1, because the "
                "flawed action lowers it by the risk"
            )
        if not 0 <= self.success_other <= 1 - self.gain + 1e-12:
            raise ConfigError(
                f"success-other ({self.success_other}) plus gain ({self.gain}) must not exceed 1"
            )

    def push(self, q_other: ArrayLike) -> Array:
        """Coupled push on the flawed action, kappa r' q' (1 - q')."""
        q_other = np.asarray(q_other, dtype=np.float64)
        return np.asarray(self.overlap * self.gain * q_other * (1 - q_other))

    def correction(self, q: ArrayLike) -> Array:
        """Self-correction, r q (1 - q)."""
        q = np.asarray(q, dtype=np.float64)
        return np.asarray(self.risk * q * (1 - q))

    def boundary(self, q_other: ArrayLike) -> tuple[Array, Array]:
        """Lower and upper q with dq/dt = 0 for each q'; NaN where q rises at every q."""
        c = self.push(q_other) / self.risk
        with np.errstate(invalid="ignore"):
            root = np.sqrt(1 - 4 * c)
        return (1 - root) / 2, (1 + root) / 2

    def logit_velocity(
        self, z_N2: Array, group_size: int | None = None, normaliser: Normaliser = "none"
    ) -> Array:
        """dz/dt of (z, z'), shape (N, 2); with a group size, of expected GRPO.

        GRPO multiplies the two gradients by D_G of the value of *their* state, so with the group
        standard deviation the path itself changes, not only its speed.
        """
        q, other = sigmoid(z_N2[..., 0]), sigmoid(z_N2[..., 1])
        down, up = self.correction(q), self.gain * other * (1 - other)
        if group_size is not None:
            down = down * slope(self.success - self.risk * q, group_size, normaliser)
            up = up * slope(self.success_other + self.gain * other, group_size, normaliser)
        return np.stack([-down + self.overlap * up, up - self.overlap * down], axis=-1)

    def flow(
        self,
        start_N2: ArrayLike,
        times_T: ArrayLike,
        group_size: int | None = None,
        normaliser: Normaliser = "none",
    ) -> Array:
        """(q, q') along the flow from probabilities `start_N2`, at `times_T`; (T, N, 2)."""

        def field(z_N2: Array) -> Array:
            return self.logit_velocity(z_N2, group_size, normaliser)

        return sigmoid(integrate(field, logit(start_N2), times_T))

    def peak_odds(self, odds: ArrayLike, odds_other: ArrayLike) -> Array:
        """Highest odds q / (1 - q) on the way, for large odds X in s and Y in s'; kappa < 1.

        There the flow is dX/dt = -r + kappa r' X/Y, dY/dt = r' - kappa r Y/X. The ratio rho = X/Y
        falls, X turns round when it reaches rho* = r / (kappa r'), and eliminating time gives

            Y* = Y [((r + r' rho) / (r + r' rho*))^(1 + kappa) (rho* / rho)^kappa]^(1/(1 - kappa)).

        The peak is rho* Y*; where rho <= rho* already, the odds only fall.
        """
        x, y = np.asarray(odds, dtype=np.float64), np.asarray(odds_other, dtype=np.float64)
        if not 0 < self.overlap < 1:
            return x if self.overlap == 0 else np.full_like(x, np.nan)
        rho, turn = x / y, self.risk / (self.overlap * self.gain)
        growth = (1 + self.overlap) * np.log(
            (self.risk + self.gain * rho) / (self.risk + self.gain * turn)
        ) + self.overlap * np.log(turn / rho)
        peak = turn * y * np.exp(growth / (1 - self.overlap))
        return np.asarray(np.where(rho > turn, peak, x))

    def sampled(
        self,
        start_2: ArrayLike,
        group_size: int,
        normaliser: Normaliser,
        rate: float,
        steps: int,
        seeds: int,
        rng: np.random.Generator,
    ) -> Array:
        """(q, q') along GRPO with one group per state and step; (steps + 1, seeds, 2)."""
        base_2 = np.array([self.success, self.success_other])
        effect_2 = np.array([-self.risk, self.gain])
        gram_22 = np.array([[1, self.overlap], [self.overlap, 1]])
        z_N2 = np.tile(logit(start_2), (seeds, 1))
        path = [sigmoid(z_N2)]
        for _ in range(steps):
            q_N21 = path[-1][..., None]
            taken_N2G = rng.random((seeds, 2, group_size)) < q_N21
            chance_N2G = base_2[:, None] + effect_2[:, None] * taken_N2G
            returns_N2G = rng.random(chance_N2G.shape) < chance_N2G
            advantages_N2G = group_advantages(returns_N2G, normaliser)
            direction_N2 = (advantages_N2G * (taken_N2G - q_N21)).mean(axis=-1)
            z_N2 = z_N2 + rate * direction_N2 @ gram_22
            path.append(sigmoid(z_N2))
        return np.stack(path)


@dataclass(frozen=True)
class Point:
    """A measured probe: q, its coupled push in the units of r q (1 - q), and q' if known."""

    q: float
    push: float
    q_other: float | None = None
    label: str = ""


def read_points(path: Path) -> list[Point]:
    """Points from a file of JSON lines with `q`, `push` and optionally `q_other`, `label`; or the
    flawed samples of a run directory or coupling file (`untwine diagnose coupling`)."""
    if path.is_dir():
        path = path / "diagnose" / "coupling.json"
        if not path.is_file():
            raise ConfigError(
                f"there is no {path}; run `untwine diagnose coupling {path.parents[1]}` first"
            )
    if path.suffix == ".json":
        return _coupling_points(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the points in {path}: {error}") from None
    points = [_point(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not points:
        raise ConfigError(f"{path} holds no points; write one JSON object with q and push per line")
    return points


def _coupling_points(path: Path) -> list[Point]:
    """Samples labelled flawed; where none is, those with a negative weight."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["sample_list"]
        flawed = [r for r in rows if r["verdict"] == "flawed"] or [
            r for r in rows if r["weight"] < 0
        ]
        points = [
            Point(min(1.0, math.exp(r["logprob"])), float(r["push"]), None, r["kind"] or "")
            for r in flawed
            if r["push"] is not None
        ]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no coupling file of this version ({error!r}); "
            "run `untwine diagnose coupling` again"
        ) from None
    if not points:
        raise ConfigError(f"{path} holds no flawed sample with a gradient, so there is no point")
    return points


def _point(line: str, where: str) -> Point:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error.msg}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where} must be a JSON object with q and push")
    for key in ("q", "push"):
        if key not in row:
            raise ConfigError(f"{where} has no {key!r}; a point needs q and push")
    for key in ("q", "push", "q_other"):
        value = row.get(key)
        if value is None and key == "q_other":
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ConfigError(f"{where}: {key} must be a finite number, not {value!r}")
        if key != "push" and not 0 <= value <= 1:
            raise ConfigError(f"{where}: {key} is a probability, so it cannot be {value}")
    other = row.get("q_other")
    return Point(
        float(row["q"]),
        float(row["push"]),
        None if other is None else float(other),
        str(row.get("label", "")),
    )


NEAR_ONE = 0.95
LOW, HIGH = 0.2, 0.8
"""Starts with q < LOW are called low, those with HIGH < q < NEAR_ONE high."""


def square_grid(points: int) -> Array:
    """Starts (q, q') in the middle of points x points cells of the unit square; (N, 2)."""
    if points < 3:
        raise ConfigError(f"the grid needs at least 3 points per side, not {points}")
    middle = (np.arange(points) + 0.5) / points
    q, other = np.meshgrid(middle, middle, indexing="ij")
    return np.stack([q.ravel(), other.ravel()], axis=-1)


def time_near_one(path_TN2: Array, times_T: Array) -> Array:
    """Time that each flow spends with q above NEAR_ONE, by the trapezoid rule; (N,)."""
    above_TN = (path_TN2[..., 0] > NEAR_ONE).astype(np.float64)
    return np.asarray(np.trapezoid(above_TN, times_T, axis=0))


def study(
    model: TwoStates, points: int, horizon: float, group_size: int, seed: int
) -> dict[str, Any]:
    """The statement over starts and overlaps, the closed form of the peak, and GRPO."""
    if not 0 < horizon < math.inf:
        raise ConfigError(f"the horizon must be positive and finite, not {horizon}")
    overlaps = sorted({0.0, 0.3, 0.6, 0.9, 0.99, model.overlap})
    gains = sorted({g for g in (model.gain / 2, model.gain, 2 * model.gain) if g <= 1})
    # the rates of success without b matter to sampling only
    models = [TwoStates(model.risk, gain, k, 1.0, 0.0) for gain in gains for k in overlaps]
    return {
        "model": vars(model),
        "starts": points**2,
        "horizon": horizon,
        "rows": [_region_row(m, points, horizon) for m in models],
        "sampled": [_sampled_row(model, n, group_size, seed) for n in NORMALISERS],
        "normaliser": _normaliser_row(model, points, group_size),
    }


def _region_row(model: TwoStates, points: int, horizon: float) -> dict[str, Any]:
    starts = square_grid(points)
    times = np.r_[0.0, np.geomspace(horizon / 1e4, horizon, 150)]
    path = model.flow(starts, times)
    q_TN, q0_N = path[..., 0], starts[:, 0]
    rises_N = model.push(starts[:, 1]) > model.correction(q0_N)
    peak_N, stay_N = q_TN.max(axis=0), time_near_one(path, times)
    low, high = q0_N < LOW, (q0_N > HIGH) & (q0_N < NEAR_ONE)
    reached = low & (peak_N > NEAR_ONE)
    return {
        "gain": model.gain,
        "overlap": model.overlap,
        "rises_at_start": float(rises_N.mean()),
        "rises_at_start_low": float(rises_N[low].mean()),
        "rises_at_start_high": float(rises_N[high].mean()),
        "near_one_from_low": float((peak_N[low] > NEAR_ONE).mean()),
        "near_one_from_high": float((peak_N[high] > NEAR_ONE).mean()),
        "mean_time_near_one_low": float(stay_N[low].mean()),
        "mean_time_near_one_high": float(stay_N[high].mean()),
        "above_half_at_end": float((q_TN[-1] > 0.5).mean()),
        "above_half_at_end_low": float((q_TN[-1, low] > 0.5).mean()),
        "above_half_at_end_high": float((q_TN[-1, high] > 0.5).mean()),
        "low_start_near_one": starts[reached][0].round(6).tolist() if reached.any() else None,
        "difference_rises": float(
            (np.diff(logit(path).clip(-700, 700) @ [1, -1], axis=0) > 1e-6).any(axis=0).mean()
        ),
    }


def _sampled_row(
    model: TwoStates, normaliser: Normaliser, group_size: int, seed: int
) -> dict[str, Any]:
    """Mean over seeds of sampled GRPO against the flow, with smaller and smaller steps."""
    start, span, rows = np.array([0.85, 0.4]), 60.0, []
    for rate in RATES:
        steps, seeds = round(span / rate), 400
        rng = np.random.default_rng(seed)
        path = model.sampled(start, group_size, normaliser, rate, steps, seeds, rng)
        path, times = thinned(path, rate)
        exact = model.flow(start[None], times, group_size, normaliser)
        rows.append(
            {
                "rate": rate,
                "seeds": seeds,
                **distance_to_flow(path, exact[:, 0]),
                "flow_q_at_end": float(exact[-1, 0, 0]),
                "mean_q_at_end": float(path[-1, :, 0].mean()),
                "seeds_with_q_above_half": float((path[-1, :, 0] > 0.5).mean()),
            }
        )
    return {"normaliser": normaliser, "start": start.tolist(), "rows": rows}


def _normaliser_row(model: TwoStates, points: int, group_size: int) -> dict[str, Any]:
    """Share of starts where expected GRPO lifts q, with and without the standard deviation."""
    z = logit(square_grid(points))
    shares = {
        name: float((model.logit_velocity(z, group_size, name)[:, 0] > 0).mean())
        for name in NORMALISERS
    }
    return {"group_size": group_size, "rises_at_start": shares}


def judge_points(model: TwoStates, points: list[Point]) -> dict[str, Any]:
    """How many measured points have a coupled push above the correction r q (1 - q)."""
    q_N = np.array([p.q for p in points])
    beaten_N = np.array([p.push for p in points]) > model.correction(q_N)
    return {
        "points": len(points),
        "lifted": int(beaten_N.sum()),
        "lifted_high": int(beaten_N[q_N > HIGH].sum()),
        "high": int((q_N > HIGH).sum()),
        "lifted_low": int(beaten_N[q_N < LOW].sum()),
        "low": int((q_N < LOW).sum()),
    }
