"""Shuffled labels: what must stay, and what must become independent."""

from __future__ import annotations

import random
from collections import Counter

from tests.builders import REF, make_episode, make_step
from untwine.gcd.labels import agreed_verdict
from untwine.gcd.questions import judged_steps
from untwine.gcd.shuffling import shuffle_labels
from untwine.records import Group, Label

FLAWED, GOOD = Label("rule", "flawed", "undo", 0.6), Label("rule", "good", "progress")


def groups(good: int, flawed: int) -> list[Group]:
    """Distinct labelled actions, each twice in every episode; one without label, one in doubt."""
    labels = [(GOOD,)] * good + [(FLAWED,)] * flawed + [(), (GOOD, FLAWED)]
    steps = [
        make_step(t, state=f"s{t}", after=f"s{t + 1}", labels=own)
        for t, own in enumerate([*labels, *labels])
    ]
    steps = [
        make_step(t, state=f"s{t % len(labels)}", labels=step.labels)
        for t, step in enumerate(steps)
    ]
    return [Group(REF, (make_episode(1.0, steps, id="a"), make_episode(0.0, steps, id="b")))]


def shuffled(seed: int, good: int = 12, flawed: int = 5) -> list[Group]:
    return shuffle_labels(groups(good, flawed), random.Random(seed))


def test_classes_kinds_and_questions_keep_their_numbers() -> None:
    judged = judged_steps(shuffled(0)[0].episodes)
    assert Counter(j.verdict for j in judged) == {"good": 12, "flawed": 5}
    assert Counter(j.kind for j in judged) == {"progress": 12, "undo": 5}


def test_equal_actions_get_equal_labels_and_doubtful_ones_keep_theirs() -> None:
    (group,) = shuffled(3)
    seen: dict[str, set[tuple[Label, ...]]] = {}
    for episode in group.episodes:
        for step in episode.steps:
            seen.setdefault(step.state_key, set()).add(step.labels)
    assert all(len(found) == 1 for found in seen.values())
    assert seen["s17"] == {()}
    assert seen["s18"] == {(GOOD, FLAWED)}


def test_the_generator_decides_and_nothing_else() -> None:
    assert shuffled(4) == shuffled(4)
    assert shuffled(4) != shuffled(5)


def test_new_labels_know_nothing_of_the_old() -> None:
    """Of 4 good and 4 flawed actions the chance that a good one stays good is 1/2: over 400
    shuffles of its first action the share has a standard deviation of .025."""
    stays = sum(
        agreed_verdict(shuffled(seed, 4, 4)[0].episodes[0].steps[0]) == "good"
        for seed in range(400)
    )
    assert 0.4 < stays / 400 < 0.6
