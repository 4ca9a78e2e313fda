"""A comparison on the terminal, as a figure, and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from untwine.cost import count, duration
from untwine.drawing import COLOURS, drawing
from untwine.report.page import fill_template, write_page

Numbers = Mapping[str, Any]

ARM_COLUMNS = ("runs", "IQM", "mean", "length", "invalid", "repeated", "flawed")
AGAINST_COLUMNS = ("P(better)", "pairs", "paired difference", "p")
COST_COLUMNS = ("tokens of updates", "verdicts and labels", "time", "of it verdicts and labels")
CAPTION = "in percent, with 95 % intervals over runs"


def write_comparison(numbers: Numbers, out: Path) -> Path:
    """Write `compare.json`, `compare.svg` and `compare.html` into the folder `out`; the page."""
    figure = out / "compare.svg"
    draw_comparison(numbers, figure)
    write_page(json.dumps(numbers, indent=1), out / "compare.json")
    return write_page(render(numbers, figure), out / "compare.html")


def print_comparison(numbers: Numbers, console: Console | None = None) -> None:
    """One table for each evaluation set, then what was left out."""
    console = console or Console()
    for entry in numbers["sets"]:
        console.print(_arm_table(numbers, entry))
        if entry["against"]:
            console.print(_against_table(numbers, entry))
    console.print(_cost_table(numbers))
    for note in numbers["notes"]:
        console.print(escape(note), style="yellow", highlight=False, soft_wrap=True)


def _arm_table(numbers: Numbers, entry: Numbers) -> Table:
    identity = entry["identity"]
    table = Table(
        title=f"{escape(identity['environment'])}, {entry['title']}: {numbers['measure_name']}, "
        f"{identity['episodes']} episodes a run",
        caption=CAPTION,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("arm", overflow="fold", min_width=12)
    for column in ARM_COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in entry["arms"]:
        table.add_row(escape(row["label"]), *arm_cells(row))
    return table


def _against_table(numbers: Numbers, entry: Numbers) -> Table:
    table = Table(
        title=f"{entry['title']}: against {escape(numbers['baseline'])}", box=box.SIMPLE_HEAD
    )
    table.add_column("arm", overflow="fold")
    for column in AGAINST_COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in entry["against"]:
        table.add_row(escape(row["label"]), *against_cells(row))
    return table


def _cost_table(numbers: Numbers) -> Table:
    table = Table(title="what a run cost, iterations only", box=box.SIMPLE_HEAD)
    table.add_column("arm", overflow="fold")
    for column in COST_COLUMNS:
        table.add_column(column, justify="right")
    for arm in numbers["arms"]:
        table.add_row(escape(arm["label"]), *cost_cells(arm))
    return table


def cost_cells(arm: Numbers) -> list[str]:
    """What a run of an arm cost as text, in the order of `COST_COLUMNS`."""
    tokens, seconds = arm["overhead_tokens"], arm["overhead_seconds"]
    return [
        count(arm["tokens"]),
        count(tokens) if tokens else "–",
        duration(arm["seconds"]),
        duration(seconds) if tokens else "–",
    ]


def arm_cells(row: Numbers) -> list[str]:
    """The numbers of an arm as text, in the order of `ARM_COLUMNS`."""
    length = row["episode_length"]
    rates = [row[key] for key in ("invalid_rate", "repeated_rate", "flawed_rate")]
    return [
        str(row["runs"]),
        percent(row["iqm"], row["iqm_interval"]),
        percent(row["mean"]),
        "–" if length is None else f"{length:.1f}",
        *("–" if rate is None else f"{100 * rate:.0f}" for rate in rates),
    ]


def against_cells(row: Numbers) -> list[str]:
    """One arm against the baseline as text, in the order of `AGAINST_COLUMNS`."""
    probability = percent(row["probability"], row["probability_interval"])
    paired = row["paired"]
    if not paired:
        return [probability, "none", "–", "–"]
    difference = percent(paired["mean"], paired["interval"], sign="+")
    return [probability, str(paired["pairs"]), difference, f"{paired['p_value']:.2g}"]


def percent(value: float, interval: Sequence[float] | None = None, sign: str = "") -> str:
    """`43.1 [38.0, 48.2]`, in percent; without the brackets where there is no interval."""
    text = f"{100 * value:{sign}.1f}"
    if interval:
        text += f" [{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}]"
    return text


def draw_comparison(numbers: Numbers, path: Path) -> None:
    """For each evaluation set the interquartile means with intervals, and the profiles."""
    sets, arms = numbers["sets"], numbers["arms"]
    height = len(sets) * max(2.2, 0.9 + 0.35 * len(arms))
    with drawing(path, (10.0, height)) as figure:
        for left, right, entry in zip(
            *figure.subplots(len(sets), 2, squeeze=False).T, sets, strict=True
        ):
            _draw_intervals(left, entry, numbers["measure_name"])
            _draw_profiles(right, entry, numbers["measure_name"])


def _draw_intervals(axes: Axes, entry: Numbers, measure: str) -> None:
    """Dots are the runs, with the mean over tasks of each."""
    labels = [row["label"] for row in entry["arms"]]
    for place, row in enumerate(entry["arms"]):
        colour = COLOURS[place % len(COLOURS)]
        if row["iqm_interval"]:
            axes.hlines(place, *row["iqm_interval"], color=colour, lw=6, alpha=0.35)
        axes.plot(row["iqm"], place, "|", color=colour, ms=12, mew=2)
        runs = [sum(scores) / len(scores) for scores in row["scores"]]
        axes.plot(runs, [place + 0.22] * len(runs), ".", color=colour, ms=3)
    axes.set_yticks(range(len(labels)), [_plain(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set(title=_plain(f"{entry['title']}: interquartile mean"), xlabel=measure)


def _draw_profiles(axes: Axes, entry: Numbers, measure: str) -> None:
    thresholds = entry["thresholds"]
    for place, row in enumerate(entry["arms"]):
        colour = COLOURS[place % len(COLOURS)]
        profile = row["profile"]
        axes.step(
            thresholds, profile["values"], where="post", color=colour, label=_plain(row["label"])
        )
        if profile["interval"]:
            low, high = profile["interval"]
            axes.fill_between(thresholds, low, high, step="post", color=colour, alpha=0.15, lw=0)
    axes.set(
        title=_plain(f"{entry['title']}: performance profile"),
        xlabel=f"threshold τ of the {measure}",
        ylabel="share of scores above τ",
        ylim=(0, 1.02),
    )


def _plain(text: str) -> str:
    """Text in which matplotlib reads no formula."""
    return text.replace("$", r"\$")


def render(numbers: Numbers, figure: Path) -> str:
    """The page as text, with the figure inside."""
    image = base64.b64encode(figure.read_bytes()).decode("ascii")
    return fill_template(
        "compare.html.j2",
        numbers=numbers,
        caption=CAPTION,
        columns=(ARM_COLUMNS, AGAINST_COLUMNS, COST_COLUMNS),
        cost_cells=cost_cells,
        image=f"data:image/svg+xml;base64,{image}",
        arm_cells=arm_cells,
        against_cells=against_cells,
    )
