"""The microscope as the page shows it: cut to size, with prompts compared, joined to episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from untwine.diagnose.lift_table import lift_rows
from untwine.prompt_diff import prompt_diff
from untwine.records import Episode, Group, Step
from untwine.report.run_data import Row

T = TypeVar("T")
SHORT = 300
"""Characters of a command under a point of a plot."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a page carries at most; `halved` is tried when a page grows too large.

    episode_bytes  embedded episodes
    curve          points of a curve
    points         points of a scatter plot or map
    heat           samples of a heat-map
    diff           characters of one prompt diff
    offenders      flawed samples with their pushers
    text           characters of one recipe
    rows           rows of a table by task or kind
    """

    episode_bytes: int = 6_000_000
    curve: int = 1000
    points: int = 600
    heat: int = 160
    diff: int = 8000
    offenders: int = 10
    text: int = 200_000
    rows: int = 400

    def halved(self) -> Limits:
        return Limits(*(max(1, getattr(self, name) // 2) for name in self.__slots__))


def evenly(values: Sequence[T], most: int) -> list[T]:
    """At most `most` of the values, spread evenly, in their order."""
    if len(values) <= most:
        return list(values)
    return [values[i * len(values) // most] for i in range(most)]


def plot_data(microscope: Row, limits: Limits) -> dict[str, Any]:
    """What the plots of one run need; the keys are those that microscope.js reads."""
    return {
        "truth": [
            {
                "iteration": truth["iteration"],
                "of": len(truth["rows"]),
                "rows": [_judged(row) for row in evenly(truth["rows"], limits.points)],
            }
            for truth in microscope["truth"][-3:]
        ],
        "coupling": _coupling(microscope["coupling"], limits),
        "separation": _separation(microscope["separation"], limits),
    }


def _judged(row: Row) -> dict[str, Any]:
    keys = ("advantage", "low", "high", "label", "kind", "q", "n")
    return {"name": _short(row["action"].replace("\0", "")), **{key: row[key] for key in keys}}


def _coupling(coupling: Row | None, limits: Limits) -> dict[str, Any] | None:
    if coupling is None:
        return None
    samples = coupling["sample_list"]
    numbers = evenly(range(len(samples)), limits.points)
    honesty = coupling["honesty"]
    points = [
        {
            **_named(samples[i]),
            **{key: samples[i][key] for key in ("own", "coupled", "delta", "weight", "logprob")},
            "predicted": honesty["predicted"][i] if honesty else None,
            "measured": honesty["measured"][i] if honesty else None,
        }
        for i in numbers
    ]
    return {"points": points, "cosines": coupling["cosines"], "heat": _heat(coupling, limits.heat)}


def _heat(coupling: Row, most: int) -> dict[str, Any] | None:
    """Rows of the lower triangle in percent, in blocks of alike samples."""
    if coupling["cosine_rows"] is None:
        return None
    chosen = evenly(coupling["order"], most)
    rows = coupling["cosine_rows"]
    cells = [
        [_percent(rows[max(i, j)][min(i, j)]) for j in chosen[: place + 1]]
        for place, i in enumerate(chosen)
    ]
    samples = [_named(coupling["sample_list"][i]) for i in chosen]
    return {"samples": samples, "rows": cells, "of": len(coupling["order"])}


def _percent(cosine: float | None) -> int | None:
    return None if cosine is None else round(100 * cosine)


def _separation(separation: Row | None, limits: Limits) -> dict[str, Any] | None:
    if separation is None:
        return None
    samples, maps = separation["sample_list"], separation["maps"]
    numbers = evenly(range(len(samples)), limits.points)
    return {
        "layers": separation["layers"],
        "samples": [_named(samples[i]) for i in numbers],
        "maps": maps and [[points[i] for i in numbers] for points in maps],
        "of": len(samples),
    }


def _named(sample: Row) -> dict[str, Any]:
    name = sample["command"] if sample["command"] is not None else sample.get("text") or "–"
    return {
        "name": _short(name),
        "verdict": sample["verdict"],
        "kind": _short(sample["kind"] or ""),
        "task": _short(sample["task"]),
    }


def _short(text: str) -> str:
    return text if len(text) <= SHORT else f"{text[:SHORT]}…"


def compared_offenders(coupling: Row | None, limits: Limits) -> list[dict[str, Any]]:
    """The offenders; each pusher with a `diff` of its prompt against the offender's."""
    offenders = coupling["offenders"] if coupling else []
    return [
        {
            **offender,
            "pushers": [
                {**p, "diff": prompt_diff(offender["prompt"], p["prompt"], limits.diff)}
                for p in offender["pushers"]
            ],
        }
        for offender in offenders[: limits.offenders]
    ]


def lift_table(coupling: Row | None) -> dict[str, Any] | None:
    """`rows` of who lifts flawed steps, and `reach`, the largest size in them; None without any."""
    rows = lift_rows(coupling["lifts"] or {}) if coupling else []
    if not rows:
        return None
    reach = max(abs(v) for row in rows for v in row.values.values() if v is not None)
    return {"rows": rows, "reach": reach}


def judging_rows(judging: Row) -> list[dict[str, Any]]:
    """A row for each loss: `name`, and under good, flawed and difference the mean change; beside
    permuted labels with the least and the largest one."""

    rows = [
        _changes("policy loss", [judging["policy"]]),
        _changes("verdict loss", [judging["verdict"]]),
    ]
    if permuted := judging["permuted"]:
        rows.append(_changes(f"verdict loss, labels permuted ({len(permuted)} times)", permuted))
    return rows


def credit_rows(coupling: Row) -> list[dict[str, Any]]:
    """A row for each credit: `name`, and what a step with it does to good and to flawed steps."""
    return [_changes(name, [change]) for name, change in (coupling["credits"] or {}).items()]


def _changes(name: str, changes: Sequence[Row]) -> dict[str, Any]:
    """Means by column; of several changes with the least and the largest."""
    columns = {key: [change[key] for change in changes] for key in changes[0]}
    return {"name": name} | {
        key: {
            "value": sum(found) / len(found),
            "interval": [min(found), max(found)] if len(found) > 1 else None,
        }
        for key, found in columns.items()
    }


@dataclass
class Marks:
    """What the microscope says of single steps of one iteration.

    `truth` by (episode, step) and, for those judged together, by (task, state, action);
    `pushes` by (episode, step) of the sample, `same` by prompt and action once `learn` was called.
    """

    truth: dict[tuple[str, int], Row] = field(default_factory=dict)
    shared: dict[tuple[str, str, str], Row] = field(default_factory=dict)
    pushes: dict[tuple[str, int], Row] = field(default_factory=dict)
    same: dict[object, Row] = field(default_factory=dict)

    def learn(self, groups: Sequence[Group]) -> bool:
        """Find the prompts of the samples; False when these are not the episodes that were
        measured."""
        right = True
        for episode in (episode for group in groups for episode in group.episodes):
            for step in episode.steps:
                push = self.pushes.get((episode.id, step.index))
                if push is not None and push["text"] == step.text:
                    self.same[step.prompt_ids, step.action_ids, step.allowed] = push
                right &= push is None or push["text"] == step.text
        return right

    def of_step(self, episode: Episode, step: Step) -> dict[str, Any]:
        """`truth` and `push` of a step, where they are known."""
        from untwine.gcd.labels import action_key

        row = self.truth.get((episode.id, step.index)) or self.shared.get(
            (str(episode.ref), step.state_key, action_key(step))
        )
        push = self.same.get((step.prompt_ids, step.action_ids, step.allowed))
        found: dict[str, Any] = {}
        if row is not None:
            keys = ("advantage", "low", "high", "label", "clear", "value", "action_value", "n")
            found["truth"] = {key: row[key] for key in keys}
        if push is not None and step.advantage is not None:
            found["push"] = {key: push[key] for key in ("delta", "own", "coupled")}
        return found

    def concerns(self, group: Group) -> bool:
        """Whether a judged step or a sample is in this group."""
        return any(
            (episode.id, step.index) in self.truth or (episode.id, step.index) in self.pushes
            for episode in group.episodes
            for step in episode.steps
        )


def marks_of(microscope: Row) -> Mapping[int, Marks]:
    """The marks by iteration."""
    found: dict[int, Marks] = {}
    for truth in microscope["truth"]:
        marks = found.setdefault(truth["iteration"], Marks())
        for row in truth["rows"]:
            marks.truth[row["episode"], row["step"]] = row
            if row["shared"] > 1:
                marks.shared[row["ref"], row["state_key"], row["action"]] = row
    coupling = microscope["coupling"]
    if coupling is not None:
        marks = found.setdefault(coupling["iteration"], Marks())
        marks.pushes = {(s["episode"], s["step"]): s for s in coupling["sample_list"]}
    return found
