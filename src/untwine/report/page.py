"""Make the page: one HTML file that needs nothing else, and trusts nothing it shows.

Goals, observations, commands, task and run names come from environments and models, so all of it
is treated as hostile. The template escapes everything, the data is embedded as JSON that cannot
close its element, the script only ever sets text, and a content security policy with the hashes of
our own style and script forbids everything else, requests included.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from untwine import __version__
from untwine.errors import UntwineError
from untwine.report.episode_data import EpisodeData, collect_episodes
from untwine.report.first_look import percent, phase_name
from untwine.report.numbers import (
    COLD_START_KEYS,
    RL_KEYS,
    kind_values,
    kinds_of,
    numbers_of,
    plain_evaluation,
)
from untwine.report.run_data import Row, RunData, load_run, number

MAX_BYTES = 10_000_000
EPISODE_BYTES = 6_000_000
LONGEST_CURVE = 1000
MOST_KINDS = 6
SCRIPTS = ("charts.js", "curves.js", "episodes.js", "page.js")


def build_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report of one or several run directories to the HTML file `out`."""
    if not run_dirs:
        raise UntwineError("a report needs at least one run directory")
    runs = [load_run(path) for path in run_dirs]
    html, budget = "", EPISODE_BYTES
    while budget >= EPISODE_BYTES // 64:
        html = render(runs, budget)
        if len(html.encode()) <= MAX_BYTES:
            break
        budget //= 2
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        partial.write_text(html, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise UntwineError(f"the report cannot be written to {out}: {error.strerror}") from error
    return out


def render(runs: Sequence[RunData], episode_bytes: int = EPISODE_BYTES) -> str:
    """The page as text, with at most about `episode_bytes` of embedded episodes."""
    numbers = numbers_of(runs)
    labels = [run["label"] for run in numbers["runs"]]
    collected = collect_episodes(runs, episode_bytes)
    data = {
        "runs": [
            _run_curves(run, label) | {"episodes": _counts(episodes)}
            for run, label, episodes in zip(runs, labels, collected, strict=True)
        ],
        "episodes": [episode for episodes in collected for episode in episodes.episodes],
    }
    for run, episodes in zip(numbers["runs"], collected, strict=True):
        run["problems"] = [*run["problems"], *episodes.problems]
    style = _source("page.css")
    script = "\n".join(["(() => {", '"use strict";', *map(_source, SCRIPTS), "})();"])
    html = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=" · ".join(labels),
            version=__version__,
            numbers=numbers,
            runs=numbers["runs"],
            recipes=[run.recipe for run in runs],
            data=embed_json(data),
            style=Markup(style),
            script=Markup(script),
            style_hash=_hash(style),
            script_hash=_hash(script),
        )
    )
    return html.encode("utf-8", "replace").decode()


def embed_json(data: object) -> Markup:
    """JSON that is safe inside a script element: it holds no `<`, `>`, `&`, U+2028 or U+2029."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _finite(value: Any) -> Any:
    """`value` with numbers rounded to five digits, and None for NaN and infinities."""
    if isinstance(value, float):
        return None if number(value) is None else float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _run_curves(run: RunData, label: str) -> dict[str, Any]:
    """Columns of the metrics by stage; flawed kinds are columns named `kind:<kind>`."""
    rl: dict[str, list[float | None]] = {
        key: [number(row.get(key)) for row in run.rl] for key in ("step", *RL_KEYS)
    }
    kinds = kinds_of(run.rl)[:MOST_KINDS]
    rl |= {f"kind:{kind}": kind_values(run.rl, kind) for kind in kinds}
    cold = {key: [number(row.get(key)) for row in run.cold_start] for key in _cold_keys(run)}
    evaluations = [plain_evaluation(row) for row in run.evaluate]
    for evaluation in evaluations:
        del evaluation["by_task"]
    return {
        "label": label,
        "kinds": kinds,
        "rl": _thin(rl),
        "cold_start": _thin(cold),
        "evaluate": evaluations,
        "points": len(run.rl),
    }


def _cold_keys(run: RunData) -> list[str]:
    return ["step", *COLD_START_KEYS] if run.cold_start else []


def _thin(columns: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    """Columns that hold anything; neighbours are averaged when a curve is very long."""
    longest = max(map(len, columns.values()), default=0)
    width = -(-longest // LONGEST_CURVE) or 1
    thinned = {
        key: [_mean(values[i : i + width]) for i in range(0, len(values), width)]
        for key, values in columns.items()
    }
    return {
        key: values for key, values in thinned.items() if any(value is not None for value in values)
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _counts(episodes: EpisodeData) -> dict[str, Any]:
    return {
        "embedded": len(episodes.episodes),
        "recorded": episodes.recorded,
        "iterations": episodes.iterations,
        "files": episodes.files,
    }


def _source(name: str) -> str:
    return resources.files("untwine.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": percent,
        "count": _count,
        "duration": _duration,
        "phase": phase_name,
    }
    environment.globals["evaluation"] = _evaluation
    return environment


def _evaluation(run: Row, phase: str, name: str) -> Row | None:
    """The result of a run for one phase and set, if there is one."""
    for result in run["results"]:
        if result["phase"] == phase and result["set"] == name:
            return dict(result)
    return None


def _count(value: float) -> str:
    """12 345, 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}\u202f{unit}"
    return f"{value:,.0f}".replace(",", "\u202f")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
