"""Probes: a fixed set of (state, action) pairs whose probability is followed through training.

`choose_probes` draws them from recorded groups, `read_probes` says how likely they are now. They
are kept as RUN/diagnose/probes-iter-000000.json (the number of the iteration they are from), so a
resumed run goes on with the same ones.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from untwine.batch import completion_row, distinct_tokens
from untwine.diagnose.output import results_folder, write_text
from untwine.diagnose.population import action_logprobs
from untwine.diagnose.run_samples import labelled_samples
from untwine.envs.protocol import EnvInfo
from untwine.errors import CheckpointError
from untwine.gcd.labels import action_key, label_group
from untwine.policy.choices import allowed_along
from untwine.policy.loading import Policy
from untwine.records import Group, Label, Observation, Step, TaskRef
from untwine.rollout import Collector

FORMAT = "untwine-probes-1"
SURE = 0.95  # confidence from which a `group` label counts

ProbeKind = Literal["good", "flawed", "unsampled"]
PROBE_KINDS: tuple[ProbeKind, ...] = ("good", "flawed", "unsampled")


@dataclass(frozen=True, slots=True)
class Reply:
    """Something the policy can say, as token ids; `allowed` as in `Step`."""

    text: str
    ids: tuple[int, ...]
    allowed: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class ProbeState:
    """A state as the policy reads it, and the replies that are compared there."""

    task: str
    state_key: str
    observation: str
    prompt_ids: tuple[int, ...]
    replies: tuple[Reply, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """Reply number `reply` in state number `state`.

    source, reason   who says that it is good or flawed, and why; both are "" for `unsampled`
    """

    kind: ProbeKind
    source: str
    reason: str
    state: int
    reply: int


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """ranked: whether the replies are what the policy can choose from, so that ranks mean much"""

    states: tuple[ProbeState, ...]
    probes: tuple[Probe, ...]
    ranked: bool

    @property
    def tokens(self) -> int:
        """Distinct tokens the model runs over to read all probes once."""
        rows = [completion_row(s.prompt_ids, r.ids, 1.0) for s in self.states for r in s.replies]
        return distinct_tokens(rows)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the policy makes of one probe.

    logprob   log pi(a|s) in nats
    rank      1 for the likeliest reply of its state
    argmax    probability of the likeliest reply of its state
    rank and argmax are None where the replies are not ranked
    """

    logprob: float
    rank: int | None
    argmax: float | None


def choose_probes(
    groups: Sequence[Group], collector: Collector, count: int, seed: int | str
) -> ProbeSet:
    """At most `count` probes of each kind from the episodes of an iteration.

    good, flawed   drawn from the distinct (prompt, action) pairs of which that is known: from a
                   `branch` label on record; else from the rules and from `group` labels of
                   confidence `SURE` at least, where all of them agree on all occurrences
    unsampled      drawn from the admissible commands, in the states of the other probes, that no
                   episode took in that state; none where the commands are not listed, or thoughts
                   or tags come before them

    The replies of a state are its admissible commands, and what was replied there; with thoughts
    or tags the probes alone.
    """
    rng = random.Random(seed)
    known = labelled_samples([_trusted(group, collector.info) for group in groups])
    table = _States(groups, collector)
    probes: list[Probe] = []
    for kind in PROBE_KINDS[:2]:
        own = [sample for sample in known if sample.verdict == kind]
        for i in sorted(rng.sample(range(len(own)), min(count, len(own)))):
            state = table.number(own[i].episode.ref, own[i].step)
            reply = table.place(state, own[i].step)
            probes.append(Probe(kind, own[i].source or "", own[i].kind or "", state, reply))
    if not probes:
        table.add_any(count, rng)
    free = table.unsampled()
    for i in sorted(rng.sample(range(len(free)), min(count, len(free)))):
        probes.append(Probe("unsampled", "", "", *free[i]))
    return ProbeSet(table.states, tuple(probes), not collector.prompt.reasons)


def _trusted(group: Group, info: EnvInfo) -> Group:
    """The group with the labels that a probe may rest on."""
    labels = label_group(group, ["rule", "group"], info)
    return group.with_labels(
        [
            [_trusted_labels(old, new) for old, new in zip(a.steps, b.steps, strict=True)]
            for a, b in zip(group.episodes, labels.episodes, strict=True)
        ]
    )


def _trusted_labels(recorded: Step, computed: Step) -> tuple[Label, ...]:
    truth = tuple(label for label in recorded.labels if label.source == "branch")
    return truth or tuple(x for x in computed.labels if x.source == "rule" or x.confidence >= SURE)


class _States:
    """States by number, each with its replies; a prompt is one state."""

    def __init__(self, groups: Sequence[Group], collector: Collector) -> None:
        self._collector = collector
        self._steps = [(e.ref, step) for g in groups for e in g.episodes for step in e.steps]
        self._taken: dict[tuple[TaskRef, str], dict[str, Step]] = defaultdict(dict)
        for ref, step in self._steps:
            self._taken[ref, step.state_key].setdefault(action_key(step), step)
        self._numbers: dict[tuple[int, ...], int] = {}
        self._seen: list[tuple[TaskRef, Step]] = []
        self._replies: list[list[Reply]] = []
        self._untaken: list[list[int]] = []

    @property
    def states(self) -> tuple[ProbeState, ...]:
        return tuple(
            ProbeState(str(ref), step.state_key, step.observation, step.prompt_ids, tuple(replies))
            for (ref, step), replies in zip(self._seen, self._replies, strict=True)
        )

    def number(self, ref: TaskRef, step: Step) -> int:
        """The number of the state in which the step was taken."""
        if step.prompt_ids not in self._numbers:
            self._numbers[step.prompt_ids] = len(self._seen)
            self._seen.append((ref, step))
            replies, taken = self._known(ref, step), self._taken[ref, step.state_key]
            self._replies.append(list(replies.values()))
            self._untaken.append([i for i, key in enumerate(replies) if key not in taken])
        return self._numbers[step.prompt_ids]

    def place(self, state: int, step: Step) -> int:
        """The number of the step's reply among those of its state."""
        replies = self._replies[state]
        ids = [reply.ids for reply in replies]
        if step.action_ids not in ids:
            replies.append(Reply(step.text, step.action_ids, step.allowed))
            return len(ids)
        return ids.index(step.action_ids)

    def unsampled(self) -> list[tuple[int, int]]:
        """(state, reply) of the replies that no episode gave in that state."""
        return [(s, r) for s, replies in enumerate(self._untaken) for r in replies]

    def add_any(self, count: int, rng: random.Random) -> None:
        for i in sorted(rng.sample(range(len(self._steps)), min(count, len(self._steps)))):
            self.number(*self._steps[i])

    def _known(self, ref: TaskRef, step: Step) -> dict[str, Reply]:
        """What can be said, and what was said, in the state of a step, by `action_key`."""
        if self._collector.prompt.reasons:
            return {}
        prompter, blocked = self._collector.prompter, self._collector.info.blocked
        node = self._collector.choices_among(step.admissible, ref, step.index)
        replies: dict[str, Reply] = {}
        for command in step.admissible or ():
            if command not in blocked:
                ids = prompter.reply_ids(command)
                allowed = None if node is None else allowed_along(node, ids)
                replies[command.lower()] = Reply(command, ids, allowed)
        if node is None:  # otherwise they are among the admissible ones
            for key, other in self._taken[ref, step.state_key].items():
                replies[key] = Reply(other.text, other.action_ids)
        return replies


def read_probes(policy: Policy, chosen: ProbeSet, temperature: float, budget: int) -> list[Reading]:
    """How likely the policy finds each probe now: exact log-probabilities, over the ids each token
    was chosen from. Forward passes over `chosen.tokens` tokens, `budget` of them at a time."""
    replies = [(state, reply) for state in chosen.states for reply in state.replies]
    found = action_logprobs(policy, [_said(s, r) for s, r in replies], temperature, budget)
    rest = iter(found)
    by_state = [[next(rest) for _ in state.replies] for state in chosen.states]
    return [reading(by_state[p.state], p.reply, chosen.ranked) for p in chosen.probes]


def reading(logprobs: Sequence[float], reply: int, ranked: bool = True) -> Reading:
    """One reply among the log-probabilities of all replies of its state; equal ones share the
    better rank."""
    own = logprobs[reply]
    if not ranked:
        return Reading(own, None, None)
    return Reading(own, 1 + sum(x > own for x in logprobs), math.exp(max(logprobs)))


def _said(state: ProbeState, reply: Reply) -> Step:
    here = Observation(state.observation, state.state_key, 0.0, 0.0, False, False)
    return Step.played(
        0,
        here,
        reply.text,
        here,
        prompt_ids=state.prompt_ids,
        action_ids=reply.ids,
        allowed=reply.allowed,
    )


def summarise_probes(
    chosen: ProbeSet, readings: Sequence[Reading]
) -> dict[ProbeKind, dict[str, float | None]]:
    """Means over the probes of each kind that there is: count, probability, logprob, rank,
    argmax."""
    result: dict[ProbeKind, dict[str, float | None]] = {}
    for kind in PROBE_KINDS:
        own = [r for p, r in zip(chosen.probes, readings, strict=True) if p.kind == kind]
        if own:
            result[kind] = {
                "count": len(own),
                "probability": _mean([math.exp(r.logprob) for r in own]),
                "logprob": _mean([r.logprob for r in own]),
                "rank": _mean([r.rank for r in own if r.rank is not None]),
                "argmax": _mean([r.argmax for r in own if r.argmax is not None]),
            }
    return result


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def probes_path(run: Path, iteration: int) -> Path:
    return results_folder(run) / f"probes-iter-{iteration:06d}.json"


def find_probes(run: Path) -> Path | None:
    """The probe file of a run, if there is one."""
    return min(results_folder(run).glob("probes-iter-*.json"), default=None)


def write_probes(path: Path, chosen: ProbeSet) -> None:
    numbers = {"format": FORMAT, "tokens": chosen.tokens, **dataclasses.asdict(chosen)}
    write_text(path, json.dumps(numbers, ensure_ascii=False))


def load_probes(path: Path) -> ProbeSet:
    """The probes written to `path`. CheckpointError when the file is damaged."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise CheckpointError(f"{path} is not a probe file of this version ({FORMAT})")
        states = tuple(_state(state) for state in tree["states"])
        probes = tuple(Probe(**probe) for probe in tree["probes"])
        if any(not 0 <= p.reply < len(states[p.state].replies) for p in probes):
            raise IndexError("a probe names a reply that is not there")
        return ProbeSet(states, probes, bool(tree["ranked"]))
    except (OSError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"probe file {path} is damaged ({error}); delete it and new probes are chosen at the "
            "next diagnosis"
        ) from error


def _state(tree: Mapping[str, Any]) -> ProbeState:
    replies = tuple(
        Reply(
            reply["text"],
            tuple(reply["ids"]),
            None if reply["allowed"] is None else tuple(map(tuple, reply["allowed"])),
        )
        for reply in tree["replies"]
    )
    named = {name: tree[name] for name in ("task", "state_key", "observation")}
    return ProbeState(**named, prompt_ids=tuple(tree["prompt_ids"]), replies=replies)
