"""The figures of the theory lab."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from untwine.drawing import COLOURS, drawing
from untwine.theory import calibration, horizon, regions, squeezing
from untwine.theory.advantage import NORMALISERS, Array, as_normaliser, slope

Format = Literal["svg", "png"]


def draw_calibration(
    path: Path, group_sizes: Sequence[int], groups: int, seed: int, tasks: horizon.Tasks
) -> None:
    """Closed form and samples; what the standard deviation does to the size; several steps."""
    rng = np.random.default_rng(seed)
    with drawing(path, (11, 3.4)) as figure:
        left, middle, right = figure.subplots(1, 3)
        q = np.linspace(0, 1, 101)
        for colour, size in zip(COLOURS, group_sizes, strict=False):
            for normaliser, line, mark in (("none", "-", "o"), ("std", "--", "s")):
                chosen = as_normaliser(normaliser)
                exact = slope(0.6 - 0.3 * q, size, chosen) * 0.3 * q * (q - 1)
                left.plot(q, exact, line, color=colour, lw=1.2)
                for rate in (0.1, 0.3, 0.5, 0.7, 0.9):
                    bandit = calibration.Bandit(0.6, rate, 0.3)
                    mean = calibration.sample_group_advantage(bandit, size, chosen, groups, rng)
                    left.errorbar(
                        rate, rate * mean.mean, rate * 1.96 * mean.error,
                        fmt=mark, ms=3, color=colour, lw=1,
                    )  # fmt: skip
        left.axhline(0, color="grey", lw=0.6)
        left.set(
            title="push on a flawed action (p = .6, r = .3)\nsolid: no std, dashed: std",
            xlabel="q, probability of the flawed action",
            ylabel="q · E[Â | flawed]",
        )
        value = np.linspace(0.01, 0.99, 99)
        for colour, size in zip(COLOURS, group_sizes, strict=False):
            ratio = slope(value, size, "std") * np.sqrt(value * (1 - value))
            middle.plot(value, ratio, color=colour, label=f"G = {size}")
        middle.set(
            title="std: size of the advantage\nagainst a very large group",
            xlabel="V, success probability of the group",
            ylabel="D_G(V) · sqrt(V (1 − V))",
            ylim=(0, 1.02),
        )
        middle.legend(frameon=False)
        _draw_horizon(right, tasks)


def _draw_horizon(axes: Axes, tasks: horizon.Tasks) -> None:
    for colour, unit in zip(COLOURS, horizon.UNITS, strict=False):
        judgement = horizon.judge(tasks, 8, "none", unit)
        for kind, style in (("flawed", "-"), ("good", ":")):
            sign = -1 if kind == "flawed" else 1
            chosen = (sign * judgement.truth > horizon.FLAWED) & (judgement.visit > 0)
            means = horizon.mean_over(judgement, chosen)
            axes.hist(
                means[np.isfinite(means)], bins=np.linspace(-0.5, 0.5, 81).tolist(),
                histtype="step", color=colour, ls=style, label=f"{kind}, per {unit}",
            )  # fmt: skip
    axes.axvline(0, color="grey", lw=0.6)
    axes.set(
        title="several steps: mean advantage of flawed\nand good steps, one count per random task",
        xlabel="E[Â] over the steps of a kind (G = 8, no std)",
        ylabel="tasks",
    )
    axes.legend(frameon=False, fontsize=7)


def _corner(pi_NA: Array) -> tuple[Array, Array]:
    """Plane coordinates of probabilities: good on top, worst left, mild right."""
    return pi_NA[..., 2] + pi_NA[..., 0] / 2, pi_NA[..., 0] * np.sqrt(3) / 2


def draw_squeezing(path: Path, gram_AA: Array, ratios: Sequence[float], seed: int) -> None:
    """Where the flawed mass rises on the simplex; one flow; sampled GRPO beside its flow."""
    with drawing(path, (11, 3.6)) as figure:
        left, middle, right = figure.subplots(1, 3)
        ratio = min(ratios)
        risks = np.array([0.0, 1.0, ratio])
        starts = squeezing.simplex_grid(60)
        rises = squeezing.velocity(starts, risks, gram_AA)[:, 0] < -squeezing.RISES
        x, y = _corner(starts)
        left.scatter(x[~rises], y[~rises], s=2, color="#c9d6df", rasterized=True)
        left.scatter(x[rises], y[rises], s=2, color=COLOURS[1], rasterized=True)
        times = np.r_[0.0, np.geomspace(0.1, 3000, 200)]
        for corner in ([0.1, 0.35, 0.55], [0.05, 0.6, 0.35], [0.3, 0.6, 0.1], [0.02, 0.1, 0.88]):
            flow = squeezing.flow(np.array([corner]), risks, gram_AA, times)[:, 0]
            left.plot(*_corner(flow), color="black", lw=0.8)
            left.plot(*_corner(flow[0]), "o", color="black", ms=3)
        for label, place in (
            ("good", (0.5, 0.9)),
            ("worst", (-0.02, -0.07)),
            ("mild", (1.02, -0.07)),
        ):
            left.text(*place, label, ha="center")
        left.set(aspect="equal")
        left.set_title(f"red: the flawed mass rises (r3 / r2 = {ratio:g})", pad=14)
        left.axis("off")
        start = np.array(squeezing.SAMPLED_START)
        flow = squeezing.flow(start[None], risks, gram_AA, times)[:, 0]
        for colour, name, values in zip(
            (COLOURS[3], COLOURS[1], COLOURS[2]), ("good", "worst", "mild"), flow.T, strict=True
        ):
            middle.plot(times[1:], values[1:], color=colour, label=name)
        middle.plot(times[1:], 1 - flow[1:, 0], "k--", label="both flawed")
        middle.plot(times[1:], flow[1:] @ risks, ":", color="black", label="risk-weighted, w")
        middle.set(
            xscale="log", ylim=(0, 1.02), xlabel="time, in 1 / r2", ylabel="probability",
            title=f"exact flow from {', '.join(f'{p:g}' for p in start)}",
        )  # fmt: skip
        middle.legend(frameon=False, fontsize=7)
        _draw_sampled(right, gram_AA, seed)


def _draw_sampled(axes: Axes, gram_AA: Array, seed: int) -> None:
    start, risks = np.array(squeezing.SAMPLED_START), np.array(squeezing.SAMPLED_RISKS)
    success, size, rate, steps = squeezing.SAMPLED_SUCCESS, squeezing.SAMPLED_GROUP_SIZE, 0.2, 1500
    times = np.arange(steps + 1) * rate
    for colour, normaliser in zip(COLOURS, NORMALISERS, strict=False):
        rng = np.random.default_rng(seed)
        path = squeezing.sampled(
            start, risks, gram_AA, success, size, normaliser, rate, steps, 200, rng
        )
        clock = (success, size, normaliser)
        flow = squeezing.flow(start[None], risks, gram_AA, times[::10], clock=clock)
        mass = 1 - path[..., 0]
        low, high = np.percentile(mass, [5, 95], axis=1)
        axes.fill_between(times[::10], low[::10], high[::10], color=colour, alpha=0.15, lw=0)
        axes.plot(times[::10], mass.mean(axis=1)[::10], color=colour, label=f"GRPO, {normaliser}")
        axes.plot(times[::10], 1 - flow[:, 0, 0], "--", color=colour, label=f"flow, {normaliser}")
    axes.set(
        xlabel="rate · steps", ylabel="flawed mass",
        title="sampled GRPO (G = 8): mean and 5-95 %\nof 200 seeds, and its flow",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=7)


def draw_regions(
    path: Path,
    model: regions.TwoStates,
    horizon_time: float,
    points: Sequence[regions.Point] = (),
) -> None:
    """Field, boundary and flows over (q, q'); push against correction; the time near q = 1."""
    with drawing(path, (11.5, 3.6)) as figure:
        left, middle, right = figure.subplots(1, 3)
        _draw_plane(left, model, horizon_time, points)
        _draw_push(middle, model, points)
        n = 40
        starts = regions.square_grid(n)
        times = np.r_[0.0, np.geomspace(horizon_time / 1e4, horizon_time, 200)]
        stay = regions.time_near_one(model.flow(starts, times), times).reshape(n, n)
        edges = np.linspace(0, 1, n + 1)
        shown = np.log10(np.maximum(stay, 1.0)).T
        mesh = right.pcolormesh(edges, edges, shown, cmap="magma_r", rasterized=True)
        figure.colorbar(mesh, ax=right, label=f"log10 of time with q > {regions.NEAR_ONE:g}")
        right.set(
            xlabel="q at the start", ylabel="q' at the start",
            title=f"time near q = 1, up to {horizon_time:g}",
        )  # fmt: skip


def _draw_plane(
    axes: Axes, model: regions.TwoStates, horizon_time: float, points: Sequence[regions.Point]
) -> None:
    other = np.linspace(0.001, 0.999, 240)
    low, high = model.boundary(other)
    inside = np.isfinite(low)
    safe_low = np.where(inside, low, 0.5)
    safe_high = np.where(inside, high, 0.5)
    axes.fill_betweenx(other, safe_high, 1, color=COLOURS[1], alpha=0.18, lw=0)
    axes.fill_betweenx(other, 0, safe_low, color=COLOURS[2], alpha=0.18, lw=0)
    axes.plot(low, other, color=COLOURS[2], lw=1)
    axes.plot(high, other, color=COLOURS[1], lw=1)
    grid = regions.square_grid(11)
    q, q_other = grid.T
    speed = model.logit_velocity(regions.logit(grid)) * grid * (1 - grid)
    speed /= np.linalg.norm(speed, axis=1, keepdims=True) + 1e-12
    axes.quiver(q, q_other, *speed.T, color="#8a97a3", width=0.004, scale=28)
    times = np.r_[0.0, np.geomspace(0.1, horizon_time, 300)]
    starts = np.array([[0.15, 0.4], [0.5, 0.2], [0.75, 0.3], [0.9, 0.1], [0.9, 0.5]])
    for flow in model.flow(starts, times).transpose(1, 0, 2):
        axes.plot(*flow.T, color="black", lw=0.9)
        axes.plot(*flow[0], "o", color="black", ms=3)
    placed = [p for p in points if p.q_other is not None]
    if placed:
        axes.plot([p.q for p in placed], [p.q_other or 0.0 for p in placed], "x", color=COLOURS[0])
    axes.set(
        xlim=(0, 1), ylim=(0, 1), xlabel="q (flawed here)", ylabel="q' (good there)",
        title=f"coloured: q is lifted (κ = {model.overlap:g}, "
        f"r = {model.risk:g}, r' = {model.gain:g})",
    )  # fmt: skip


def _draw_push(axes: Axes, model: regions.TwoStates, points: Sequence[regions.Point]) -> None:
    q = np.linspace(0, 1, 201)
    correction = model.correction(q)
    top = max([model.risk / 3, *(1.1 * p.push for p in points)])
    axes.fill_between(q, correction, top, color=COLOURS[1], alpha=0.12, lw=0)
    axes.plot(q, correction, color=COLOURS[3], label="correction r q (1 − q)")
    strongest = float(model.push(0.5))
    axes.axhline(strongest, ls="--", color=COLOURS[1], label="strongest push, κ r' / 4")
    kinds = list(dict.fromkeys(p.label for p in points))
    for index, colour in zip(range(len(kinds)), COLOURS, strict=False):
        # kinds beyond the colours share the last one
        last = index == len(COLOURS) - 1
        shown = kinds[index:] if last else kinds[index : index + 1]
        chosen = [p for p in points if p.label in shown]
        name = "others" if len(shown) > 1 else shown[0] or "measured"
        axes.plot(
            [p.q for p in chosen], [p.push for p in chosen], "x", color=colour, label=_plain(name)
        )
    axes.set(
        xlim=(0, 1), xlabel="q", ylabel="dz/dt", title="lifted where the push is above the curve"
    )
    axes.legend(frameon=False, fontsize=7)


def _plain(text: str) -> str:
    """A label as it is: no formula between dollar signs, and not hidden by a leading `_`."""
    return " " + text.replace("$", r"\$")
