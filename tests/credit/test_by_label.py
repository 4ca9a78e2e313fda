"""The penalty on flawed steps and the veto of labels, by hand."""

from __future__ import annotations

from tests.builders import REF, make_episode, make_step
from untwine.config import CreditConfig
from untwine.credit import credit_method, trained_credit
from untwine.credit.by_label import labels_alone, penalise, veto
from untwine.records import Group, Label

FLAWED, GOOD = Label("rule", "flawed", "undo"), Label("rule", "good", "progress")


def test_only_steps_that_all_labels_call_flawed_are_punished() -> None:
    steps = [
        make_step(0, advantage=0.5, labels=(FLAWED,)),
        make_step(1, advantage=0.5, labels=(FLAWED, Label("group", "flawed", "return"))),
        make_step(2, advantage=0.5, labels=(FLAWED, GOOD)),
        make_step(3, advantage=0.5, labels=(GOOD,)),
        make_step(4, advantage=0.5),
        make_step(5, advantage=None, labels=(FLAWED,)),
    ]
    (episode,) = penalise(Group(REF, (make_episode(1.0, steps),)), 0.75).episodes
    assert [s.advantage for s in episode.steps] == [-0.25, -0.25, 0.5, 0.5, 0.5, None]


def test_it_does_not_enter_the_statistics_of_the_method() -> None:
    """Returns 1 and 0: mean 1/2, unbiased deviation 1/sqrt 2, so advantages are +- 1/sqrt 2; the
    other steps of the flawed episode, and the other episode, keep theirs."""
    flawed = [make_step(0, labels=(FLAWED,)), make_step(1)]
    group = Group(REF, (make_episode(1.0, flawed, id="a"), make_episode(0.0, [make_step(0)])))
    punished = penalise(credit_method("grpo", {})(group), 0.3)
    rows = [[round(s.advantage or 0, 4) for s in e.steps] for e in punished.episodes]
    assert rows == [[0.4071, 0.7071], [-0.7071]]


def test_no_advantage_contradicts_the_labels() -> None:
    good_of_group = Label("group", "good", "return")
    steps = [
        make_step(0, advantage=0.5, labels=(FLAWED,)),
        make_step(1, advantage=-0.5, labels=(FLAWED,)),
        make_step(2, advantage=0.5, labels=(GOOD,)),
        make_step(3, advantage=-0.5, labels=(GOOD,)),
        make_step(4, advantage=0.5, labels=(FLAWED, good_of_group)),
        make_step(5, advantage=-0.5),
        make_step(6, advantage=None, labels=(FLAWED,)),
    ]
    group = Group(REF, (make_episode(1.0, steps),))

    def advantages(*arguments: object) -> list[float | None]:
        (episode,) = veto(group, *arguments).episodes  # type: ignore[arg-type]
        assert [s.labels for s in episode.steps] == [s.labels for s in steps]
        return [s.advantage for s in episode.steps]

    assert advantages(["flawed"]) == [0.0, -0.5, 0.5, -0.5, 0.5, -0.5, None]
    assert advantages(["good"]) == [0.5, -0.5, 0.5, 0.0, 0.5, -0.5, None]
    assert advantages(["flawed", "good"]) == [0.0, -0.5, 0.5, 0.0, 0.5, -0.5, None]
    assert advantages(["flawed", "good"], ["rule"])[4] == 0.0
    assert advantages(["flawed", "good"], ["group"])[:4] == [0.5, -0.5, 0.5, -0.5]


def test_what_training_gives_goes_by_the_labels_that_teach() -> None:
    """Method, then penalty, then veto; labels of other sources stay on record and count nowhere."""
    other = Label("group", "flawed", "return")
    steps = [
        make_step(0, labels=(GOOD, other)),
        make_step(1, labels=(other,)),
        make_step(2, labels=(FLAWED,)),
    ]
    group = Group(REF, (make_episode(1.0, steps),))

    def advantages(config: CreditConfig, *taught: str) -> list[float | None]:
        (episode,) = trained_credit(config, taught)(group).episodes
        assert [s.labels for s in episode.steps] == [s.labels for s in steps]
        return [s.advantage for s in episode.steps]

    alone = CreditConfig(name="labels")
    assert advantages(alone) == [0.0, -1.0, -1.0]
    assert advantages(alone, "rule") == [1.0, 0.0, -1.0]
    punished = CreditConfig(name="labels", penalty=0.25)
    assert advantages(punished) == [0.0, -1.25, -1.25]
    assert advantages(punished, "rule") == [1.0, 0.0, -1.25]
    assert advantages(punished, "group") == [-1.25, -1.25, 0.0]
    group = Group(REF, (make_episode(1.0, steps), make_episode(0.0, [make_step(0)], id="b")))
    vetoed = CreditConfig(name="grpo", options={"normalise": "none"}, veto=["flawed"])
    assert advantages_of(trained_credit(vetoed, ["rule"])(group)) == [[0.5, 0.5, 0.0], [-0.5]]
    assert advantages_of(trained_credit(vetoed)(group)) == [[0.5, 0.0, 0.0], [-0.5]]


def advantages_of(group: Group) -> list[list[float | None]]:
    return [[step.advantage for step in episode.steps] for episode in group.episodes]


def test_labels_alone() -> None:
    good_of_group = Label("group", "good", "return")
    steps = [
        make_step(0, advantage=0.5, labels=(FLAWED,)),
        make_step(1, advantage=-0.5, labels=(GOOD, good_of_group)),
        make_step(2, advantage=0.5, labels=(FLAWED, good_of_group)),
        make_step(3, advantage=0.5),
        make_step(4, advantage=None, labels=(GOOD,)),
    ]
    group = Group(REF, (make_episode(1.0, steps),))
    (episode,) = labels_alone(group).episodes
    assert [s.advantage for s in episode.steps] == [-1.0, 1.0, 0.0, 0.0, None]
    (episode,) = labels_alone(group, ["rule"]).episodes
    assert [s.advantage for s in episode.steps] == [-1.0, 1.0, -1.0, 0.0, None]
    (episode,) = credit_method("labels", {"sources": ["rule"]})(group).episodes
    assert [s.advantage for s in episode.steps] == [-1.0, 1.0, -1.0, 0.0, 1.0]
    assert credit_method("labels", {})(group) == credit_method("labels", {"sources": []})(group)
