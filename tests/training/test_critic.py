"""What is imitated and called good of an expert whose plan does not know of the errors put in."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.builders import make_episode, make_step
from tests.gcd.test_training import recipe
from tests.runs import cold_start_of
from untwine.envs.rooms import INFO
from untwine.gcd.labels import EXPERT_GOOD, label_group
from untwine.progress import Display
from untwine.records import Episode, Group
from untwine.training.critic import judged
from untwine.workshop import Workshop


def acted() -> Episode:
    """An expert's step without effect, an error (step 1), and three of the expert, of which the
    second is without effect."""
    own: dict[str, Any] = {"labels": (EXPERT_GOOD,), "advantage": 1.0}
    steps = [
        make_step(0, state="a", after="a", command="wait", **own),
        make_step(1, state="a", after="b", command="go b"),
        make_step(2, state="b", after="c", command="go c", **own),
        make_step(3, state="c", after="c", command="go up", **own),
        make_step(4, state="c", after="d", command="go d", **own),
    ]
    return make_episode(1.0, steps)


@pytest.mark.parametrize("imitate_noise", [False, True])
def test_a_step_that_an_error_left_nothing_to_do_is_an_error(imitate_noise: bool) -> None:
    found = judged(acted(), INFO, imitate_noise=imitate_noise)
    said = [[(x.source, x.verdict, x.kind) for x in step.labels] for step in found.steps]
    good, flawed = [("expert", "good", "expert")], [("rule", "flawed", "no_effect")]
    assert said == [[], [], good, flawed, good]
    after = 1.0 if imitate_noise else None
    assert [step.advantage for step in found.steps] == [1.0, None, 1.0, after, 1.0]


def test_an_expert_that_plans_anew_keeps_its_labels() -> None:
    found = judged(acted(), dataclasses.replace(INFO, replans=True))
    assert [len(step.labels) for step in found.steps] == [1, 0, 1, 1, 1]
    assert [step.advantage for step in found.steps] == [1.0, None, 1.0, 1.0, 1.0]


def test_no_step_that_the_rules_call_flawed_is_imitated_or_called_good() -> None:
    """A real environment whose expert does not plan anew, with many errors."""
    cold = {"episodes": 40, "steps": 1, "noise": 0.6, "verdict_weight": 0.3}
    flawed = 0
    with Workshop(recipe(0, cold_start=cold), Display(quiet=True)) as workshop:
        assert not workshop.info.replans
        for episode in cold_start_of(workshop).episodes:
            group = Group(episode.ref, (episode,))
            ruled = label_group(group, ["rule"], workshop.info).episodes[0]
            for own, by_rule in zip(episode.steps, ruled.steps, strict=True):
                if any(label.verdict == "flawed" for label in by_rule.labels):
                    flawed += 1
                    assert own.advantage is None
                    assert all(label.verdict == "flawed" for label in own.labels)
    assert flawed > 20
