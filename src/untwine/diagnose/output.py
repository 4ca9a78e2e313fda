"""What the diagnose commands print and write."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import save_file


def save_results(
    folder: Path, name: str, numbers: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Path:
    """Write NAME.json and NAME.safetensors under `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{name}.safetensors.partial"
    save_file({n: t.contiguous() for n, t in tensors.items()}, scratch)
    scratch.replace(folder / f"{name}.safetensors")
    target = folder / f"{name}.json"
    scratch = folder / f"{name}.json.partial"
    scratch.write_text(to_json(numbers), encoding="utf-8")
    scratch.replace(target)
    return target


def to_json(numbers: Mapping[str, Any]) -> str:
    """JSON without NaN: what is not a number becomes null."""
    return json.dumps(_finite(numbers), indent=1, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_coupling(numbers: Mapping[str, Any], console: Console) -> None:
    """Tables of `measure_coupling`, what to distrust first."""
    drift, honesty = numbers["drift"], numbers["honesty"]
    lines = [
        f"iteration {numbers['iteration']}, {numbers['samples']} of {numbers['distinct']} distinct "
        f"trained steps ({numbers['steps']} in all), {numbers['metric']} metric, policy "
        f"{numbers['policy']}",
        f"log pi differs from the recorded one by {drift['mean']:.2g} on average "
        f"(largest {drift['largest']:.2g})"
        + ("" if drift["mean"] < 0.1 else ": this is not the policy that sampled these steps"),
        "honesty check: nothing would change"
        if honesty is None
        else f"honesty check, predicted against measured change: correlation "
        f"{_number(honesty['correlation'], 4)}, slope {_number(honesty['slope'], 3)}",
        "Gram of the head alone against the exact one: correlation "
        + _number(numbers["head_correlation"], 3),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, rates in numbers["reinforced"].items():
        console.print(_rate_table(f"reinforced though flawed ({name}), this batch", rates))
    push = numbers["mean_push"]
    if push is not None:
        share = _number(push["signal_share"], 3)
        title = f"pushed up by the mean of {push['batches']} batches (signal share {share})"
        console.print(_rate_table(title, push["rates"]))
    console.print(_cosine_table(numbers["cosines"]))
    console.print(_offender_table(numbers["offenders"]))


def _rate_table(title: str, rates: Mapping[str, Any]) -> Table:
    table = Table(title=title)
    table.add_column("steps")
    for column in ("flawed", "lifted", "rate", "permuted", "p"):
        table.add_column(column, justify="right")
    for name, rate in rates.items():
        if not rate["flawed"]:
            continue
        null = "-"
        if rate["null"] is not None:
            null = f"{100 * rate['null']:.0f} %"
        if rate["interval"] is not None:
            low, high = rate["interval"]
            null += f" [{100 * low:.0f}, {100 * high:.0f}]"
        share = "-" if rate["share"] is None else f"{100 * rate['share']:.0f} %"
        counts = [str(rate["flawed"]), str(rate["reinforced"])]
        table.add_row(escape(name), *counts, share, null, _number(rate["p_value"], 3))
    return table


def _cosine_table(histograms: list[dict[str, Any]]) -> Table:
    table = Table(title="mean cosine coupling (pairs)")
    relations = list(dict.fromkeys(h["relation"] for h in histograms))
    table.add_column("pair")
    for relation in relations:
        table.add_column(relation, justify="right")
    for kind in dict.fromkeys(h["kind"] for h in histograms):
        cells = {h["relation"]: h for h in histograms if h["kind"] == kind}
        shown = [f"{_number(cells[r]['mean'], 2)} ({cells[r]['pairs']})" for r in relations]
        table.add_row(kind, *shown)
    return table


def _offender_table(offenders: list[dict[str, Any]]) -> Table:
    table = Table(title="flawed actions that training lifts, and who lifts them")
    for column in ("action", "task", "pi", "self", "coupled", "pushed by"):
        table.add_column(column, justify="right" if column in ("pi", "self", "coupled") else "left")
    for one in offenders:
        pushers = "\n".join(
            f"{_short(p['text'])} ({p['push']:+.4f}, cos {p['cosine']:.2f})" for p in one["pushers"]
        )
        kind = f" ({one['kind']})" if one["kind"] else ""
        table.add_row(
            escape(_short(one["text"]) + kind),
            escape(one["task"]),
            f"{one['probability']:.3f}",
            f"{one['own']:+.4f}",
            f"{one['coupled']:+.4f}",
            escape(pushers),
        )
    return table


def print_separation(numbers: Mapping[str, Any], console: Console) -> None:
    """One row per layer; what shuffled labels give stands in brackets."""
    console.print(
        f"iteration {numbers['iteration']}, {numbers['samples']} distinct labelled steps "
        f"({numbers['flawed']} flawed) of {numbers['tasks']} task instances, {numbers['pool']} of "
        f"the action's tokens, policy {numbers['policy']}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title="separation of good and flawed actions (shuffled labels in brackets)")
    for column in ("layer", "probe", "balanced", "constant", "silhouette", "margin"):
        table.add_column(column, justify="right")
    for row in numbers["layers"]:
        table.add_row(
            str(row["layer"]),
            _number(row["accuracy"], 2),
            _number(row["balanced"], 2),
            _number(row["majority"], 2),
            f"{row['silhouette']:.3f} ({row['silhouette_shuffled']:.3f})",
            f"{row['margin']:.2f} ({row['margin_shuffled']:.2f})",
        )
    console.print(table)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _short(text: str, most: int = 40) -> str:
    line = " ".join(text.split()) or "(empty)"
    return line if len(line) <= most else line[: most - 1] + "…"
