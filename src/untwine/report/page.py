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
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from untwine import __version__
from untwine.cost import count, duration
from untwine.errors import UntwineError
from untwine.report.episode_data import EpisodeData, collect_episodes
from untwine.report.first_look import percent, phase_name
from untwine.report.microscope_view import (
    Limits,
    compared_offenders,
    credit_rows,
    evenly,
    judging_rows,
    lift_table,
    marks_of,
    plot_data,
)
from untwine.report.numbers import (
    COLD_START_KEYS,
    RL_KEYS,
    kind_values,
    kinds_of,
    numbers_of,
    plain_evaluation,
    rl_columns,
)
from untwine.report.run_data import Row, RunData, load_run, number

MAX_BYTES = 10_000_000
LIMITS = Limits()
HALVINGS = 9
MOST_KINDS = 6
SCRIPTS = ("charts.js", "curves.js", "plots.js", "microscope.js", "episodes.js", "page.js")


def build_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report of one or several run directories to the HTML file `out`.

    Never more than MAX_BYTES: what it carries is halved until it fits.
    """
    if not run_dirs:
        raise UntwineError("a report needs at least one run directory")
    runs = [load_run(path) for path in run_dirs]
    limits = LIMITS
    for _ in range(HALVINGS):
        html = render(runs, limits)
        if len(html.encode()) <= MAX_BYTES:
            break
        limits = limits.halved()
    else:
        raise UntwineError(
            f"the report of {len(runs)} runs does not fit into {MAX_BYTES / 1e6:.0f} MB even with "
            "most of it left out; give fewer runs, or take the numbers from --json"
        )
    return write_page(html, Path(out))


def write_page(html: str, out: Path) -> Path:
    """Write a page whole, or leave the old one."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        partial.write_text(html, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise UntwineError(f"the report cannot be written to {out}: {error.strerror}") from error
    return out


def render(runs: Sequence[RunData], limits: Limits = LIMITS) -> str:
    """The page as text, with at most about what `limits` allow."""
    numbers = numbers_of(runs)
    labels = [run["label"] for run in numbers["runs"]]
    found = [run["microscope"] for run in numbers["runs"]]
    collected = collect_episodes(runs, limits.episode_bytes, [marks_of(m) for m in found])
    data = {
        "runs": [
            _run_curves(run, label, limits.curve)
            | {"episodes": _counts(episodes), "microscope": plot_data(microscope, limits)}
            for run, label, episodes, microscope in zip(runs, labels, collected, found, strict=True)
        ],
        "episodes": [episode for episodes in collected for episode in episodes.episodes],
    }
    for run, microscope, episodes in zip(numbers["runs"], found, collected, strict=True):
        run["problems"] = [*run["problems"], *microscope["problems"], *episodes.problems]
    for table in numbers["tasks"]:
        table["left"] = max(0, len(table["rows"]) - limits.rows)
        table["rows"] = table["rows"][: limits.rows]
    script = "\n".join(["(() => {", '"use strict";', *map(_source, SCRIPTS), "})();"])
    return fill_template(
        "page.html.j2",
        title=" · ".join(labels),
        numbers=numbers,
        runs=numbers["runs"],
        offenders=[compared_offenders(m["coupling"], limits) for m in found],
        lifts=[lift_table(m["coupling"]) for m in found],
        recipes=[_cut(run.recipe, limits.text) for run in runs],
        trimmed=limits != LIMITS,
        data=embed_json(data),
        script=Markup(script),
        script_hash=_hash(script),
    )


def fill_template(name: str, **values: Any) -> str:
    """A page from a template of this folder, with the common style."""
    style = _source("page.css")
    html = (
        _environment()
        .get_template(name)
        .render(version=__version__, style=Markup(style), style_hash=_hash(style), **values)
    )
    return html.encode("utf-8", "replace").decode()


def _cut(text: str, most: int) -> str:
    return (
        text if len(text) <= most else f"{text[:most]}\n… ({len(text) - most} characters left out)"
    )


# Characters that turn the direction of what stands after them.
_TURNING = {
    ord(c): f"[U+{ord(c):04X}]"
    for c in "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
}


def visible(value: Any) -> Any:
    """Text with its invisible marks of direction spelled out, so that none of it can turn around
    what stands beside it; anything else as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return value.translate(_TURNING)


def embed_json(data: object) -> Markup:
    """JSON that is safe inside a script element: it holds no `<`, `>`, `&`, U+2028 or U+2029."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _finite(value: Any) -> Any:
    """`value` with numbers rounded to five digits, None for NaN and infinities, visible text."""
    if isinstance(value, float):
        return None if number(value) is None else float(f"{value:.5g}")
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(str(key)): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _run_curves(run: RunData, label: str, longest: int) -> dict[str, Any]:
    """Columns of the metrics by stage; flawed kinds are columns named `kind:<kind>`."""
    columns = rl_columns(run.rl)
    rl = {"step": [number(row.get("step")) for row in run.rl], **columns}
    kinds = kinds_of(run.rl)[:MOST_KINDS]
    rl |= {f"kind:{kind}": kind_values(run.rl, kind) for kind in kinds}
    cold = {key: [number(row.get(key)) for row in run.cold_start] for key in _cold_keys(run)}
    evaluations = [plain_evaluation(row) for row in evenly(run.evaluate, longest)]
    for evaluation in evaluations:
        del evaluation["by_task"]
    return {
        "label": label,
        "kinds": kinds,
        "others": [key for key in columns if key not in RL_KEYS],
        "rl": _thin(rl, longest),
        "cold_start": _thin(cold, longest),
        "evaluate": evaluations,
        "points": len(run.rl),
    }


def _cold_keys(run: RunData) -> list[str]:
    return ["step", *COLD_START_KEYS] if run.cold_start else []


def _thin(columns: dict[str, list[float | None]], most: int) -> dict[str, list[float | None]]:
    """Columns that hold anything; neighbours are averaged when a curve is very long."""
    longest = max(map(len, columns.values()), default=0)
    width = -(-longest // most) or 1
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
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": percent,
        "count": count,
        "duration": duration,
        "digits": _digits,
        "phase": phase_name,
    }
    environment.globals |= {
        "evaluation": _evaluation,
        "reach": _reach,
        "judging_rows": judging_rows,
        "credit_rows": credit_rows,
    }
    return environment


def _evaluation(run: Row, phase: str, name: str) -> Row | None:
    """The result of a run for one phase and set, if there is one."""
    for result in run["results"]:
        if result["phase"] == phase and result["set"] == name:
            return dict(result)
    return None


def _digits(value: float | None, digits: int = 2) -> str:
    """`value` with that many digits; 0 has no sign."""
    if value is None:
        return "–"
    rounded = round(value, digits) + 0.0  # -0.0 + 0.0 is 0.0
    return f"{rounded:.{digits}f}".replace("-", "−")


def _reach(rows: Iterable[Row], *keys: str) -> float:
    """How far from zero the means under these keys go, intervals included: one scale for all."""
    found = [mean for row in rows for key in keys if (mean := row[key])]
    ends = [abs(end) for m in found for end in (m["value"], *(m["interval"] or ()))]
    return 1.05 * max(ends, default=0.0) or 1.0
