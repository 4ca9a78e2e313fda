"""Which steps are good, which are flawed, and who says so.

A label source looks at the episodes of one group and gives a label to the steps it is sure of. It
abstains from all others: an absent label means "not known", never "neutral".
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

from untwine.envs.protocol import EnvInfo
from untwine.errors import ConfigError, nearest
from untwine.own_code import is_own, own_callable, table
from untwine.records import Episode, Group, Label, Step, Verdict

EXPERT_GOOD = Label("expert", "good", "expert")
OFF_PLAN = Label("expert", "flawed", "off_plan")

LabelSource = Callable[[Group, EnvInfo], list[list[Label | None]]]


def rule_labels(group: Group, info: EnvInfo) -> list[list[Label | None]]:
    """Labels that follow from what the environment answered (source `rule`).

    flawed  invalid    the command was not understood or not allowed
            repeat     the same command in the same state as before
            no_effect  the state did not change, and the command was not one that only looks
            undo       straight back to the state before the previous step, without gain
            setback    the score fell
            fatal      the episode ended without success
    good    progress   the score rose
    """
    return [_episode_rules(episode, info) for episode in group.episodes]


def group_labels(group: Group, info: EnvInfo, least: int = 2) -> list[list[Label | None]]:
    """Labels from the returns of the group (source `group`): episodes through the same (state,
    action) against all episodes through the state.

    With N episodes through the state, of which n took the action, the difference of the two means
    is divided by its standard deviation under random assignment of the N returns,
    sqrt(var / n * (N - n) / (N - 1)). Confidence is erf(|z| / sqrt 2), the two-sided probability of
    a smaller difference by chance. Needs `least` episodes on either side; a state that an episode
    passes several times counts once.
    """
    through: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for g, episode in enumerate(group.episodes):
        for step in episode.steps:
            through[step.state_key][action_key(step)].add(g)
    returns_G = group.returns_G
    labels: list[list[Label | None]] = []
    for episode in group.episodes:
        labels.append(
            [_compare(through[s.state_key], action_key(s), returns_G, least) for s in episode.steps]
        )
    return labels


_SOURCES: dict[str, LabelSource] = {"rule": rule_labels, "group": group_labels}


def register_labels(name: str, source: LabelSource) -> None:
    """Add a source of your own. One that needs more than a group is a `Source` (gcd/sources)."""
    _SOURCES[name] = source


def is_plain(name: str) -> bool:
    """Whether a source of this name needs a group and nothing else; all of one's own do."""
    return name in _SOURCES or is_own(name)


def plain_source(name: str) -> LabelSource:
    """The source of this name, or one's own that "module:function" names: what that returns is
    checked, and its labels get this name. ConfigError when there is none."""
    if name in _SOURCES:
        return _SOURCES[name]
    if not is_own(name):
        raise ConfigError(f"unknown label source {name!r}.{nearest(name, _SOURCES)}")
    source = own_callable(f"label source {name!r}", name, "labels", ConfigError)
    return lambda group, info: _checked(name, group, source(group, info))


def label_sources() -> tuple[str, ...]:
    return tuple(sorted(_SOURCES))


def label_group(
    group: Group, sources: Sequence[str], info: EnvInfo, min_confidence: float = 0.0
) -> Group:
    """A copy of the group with the labels of all `sources` that are confident enough."""
    tables = [plain_source(source)(group, info) for source in sources]
    return group.with_labels(
        [
            [
                tuple(
                    label
                    for table in tables
                    if (label := table[g][t]) is not None and label.confidence >= min_confidence
                )
                for t in range(episode.length)
            ]
            for g, episode in enumerate(group.episodes)
        ]
    )


def only_from(group: Group, sources: Sequence[str]) -> Group:
    """A copy of the group with the labels of these sources only; the group where none is named."""
    if not sources:
        return group
    return group.with_labels(
        [
            [tuple(x for x in s.labels if x.source in sources) for s in e.steps]
            for e in group.episodes
        ]
    )


def agreed_verdict(*steps: Step) -> Verdict | None:
    """What all labels of the steps say together; None when there is none, or they disagree."""
    verdicts = {label.verdict for step in steps for label in step.labels}
    return verdicts.pop() if len(verdicts) == 1 else None


def _checked(name: str, group: Group, found: Any) -> list[list[Label | None]]:
    """What a source of one's own has returned, when it has an entry for every step."""
    what = f"label source {name!r}"
    rows = table(found)
    if [len(row) for row in rows] != [episode.length for episode in group.episodes]:
        raise ConfigError(
            f"{what}: it must return a row for each of {len(group.episodes)} episodes, with a "
            "Label or None for each of its steps"
        )
    return [[_named(what, name, label) for label in row] for row in rows]


def _named(what: str, name: str, label: Any) -> Label | None:
    if label is None:
        return None
    if not isinstance(label, Label):
        raise ConfigError(f"{what}: {label!r} is neither a Label nor None")
    try:
        confidence = float(label.confidence)
    except (TypeError, ValueError):
        confidence = math.nan
    kind: Any = label.kind
    if (
        label.verdict not in get_args(Verdict)
        or not 0 < confidence <= 1
        or not (isinstance(kind, str) and kind)
    ):
        raise ConfigError(
            f"{what}: {label!r} is no verdict; it must be good or flawed, of a kind in a word, "
            "with a confidence above 0 and at most 1"
        )
    return replace(label, source=name, confidence=confidence)


def _episode_rules(episode: Episode, info: EnvInfo) -> list[Label | None]:
    seen: set[tuple[str, str]] = set()
    labels: list[Label | None] = []
    for t, step in enumerate(episode.steps):
        before = episode.steps[t - 1] if t else None
        labels.append(_step_rule(step, before, seen, info, episode))
        seen.add((step.state_key, action_key(step)))
    return labels


def _step_rule(
    step: Step,
    before: Step | None,
    seen: set[tuple[str, str]],
    info: EnvInfo,
    episode: Episode,
) -> Label | None:
    def flawed(kind: str, confidence: float = 1.0) -> Label:
        return Label("rule", "flawed", kind, confidence)

    if step.invalid is not None:
        return flawed("invalid")
    if step.reward > 0:
        return Label("rule", "good", "progress")
    if step.done and not episode.success:
        return flawed("fatal")
    if step.reward < 0:
        return flawed("setback")
    if step.next_state_key == step.state_key:
        if (step.state_key, action_key(step)) in seen:
            return flawed("repeat")
        return None if _only_looks(step, info) else flawed("no_effect")
    if before is not None and step.next_state_key == before.state_key:
        return flawed("undo", 0.6)
    return None


def _only_looks(step: Step, info: EnvInfo) -> bool:
    words = (step.command or "").lower().split()
    return bool(words) and words[0] in info.inspecting


def action_key(step: Step) -> str:
    """Equal for steps that did the same: the command, or the text where there is none."""
    return step.command.lower() if step.command is not None else f"\0{step.text}"


def _compare(
    actions: dict[str, set[int]], action: str, returns_G: Sequence[float], least: int
) -> Label | None:
    everyone = sorted(set().union(*actions.values()))
    takers = actions[action]
    n, total = len(takers), len(everyone)
    if n < least or total - n < least:
        return None
    if len({returns_G[g] for g in everyone}) == 1:
        return None
    mean_all = math.fsum(returns_G[g] for g in everyone) / total
    mean_takers = math.fsum(returns_G[g] for g in takers) / n
    variance = math.fsum((returns_G[g] - mean_all) ** 2 for g in everyone) / total
    z = (mean_takers - mean_all) / math.sqrt(variance / n * (total - n) / (total - 1))
    confidence = math.erf(abs(z) / math.sqrt(2))
    if confidence == 0:
        return None
    return Label("group", "good" if z > 0 else "flawed", "return", confidence)
