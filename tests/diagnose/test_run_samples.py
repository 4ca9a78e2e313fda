"""Step samples of recorded groups: which steps, which weights, which verdicts."""

from __future__ import annotations

import pytest
import torch

from tests.builders import REF, make_episode, make_step
from untwine.batch import policy_rows
from untwine.diagnose.analysis import decompose
from untwine.diagnose.run_samples import (
    check_tokens,
    distinct_samples,
    draw_samples,
    labelled_samples,
    whole_batch,
)
from untwine.errors import UntwineError
from untwine.records import Group, Label

FLAWED, GOOD = Label("rule", "flawed", "repeat"), Label("group", "good", "return")


def groups() -> list[Group]:
    first = make_episode(
        1.0,
        [
            make_step(0, prompt=(1, 2), action=(3, 4), advantage=0.5, labels=(GOOD,)),
            make_step(1, prompt=(1, 9), action=(3,), advantage=0.25),
            make_step(2, prompt=(1, 7), action=(3,), labels=(FLAWED,)),
        ],
        id="a",
    )
    second = make_episode(
        0.0,
        [
            make_step(0, prompt=(1, 2), action=(3, 4), advantage=-2.0, labels=(GOOD,)),
            make_step(1, prompt=(1, 9), action=(3,), advantage=-1.0, labels=(FLAWED,)),
        ],
        id="b",
    )
    return [Group(REF, (first, second))]


@pytest.mark.parametrize("mean", ["token", "step", "episode"])
def test_weights_are_those_of_the_loss(mean: str) -> None:
    """Against the rows training makes of the same groups: sum of weight x advantage by prompt."""
    expected: dict[tuple[int, ...], float] = {}
    for row in policy_rows(groups(), mean):  # type: ignore[arg-type]
        key = tuple(row.ids[: row.targets[0]])
        value = float(row.weights[0] * row.advantages[0])
        expected[key] = expected.get(key, 0.0) + value
    found = distinct_samples(groups(), mean)  # type: ignore[arg-type]
    assert {s.sample.prompt_ids: pytest.approx(s.weight) for s in found} == expected
    assert [s.count for s in found] == [2, 2]


def test_verdicts_and_what_is_known() -> None:
    samples = distinct_samples(groups(), "step")
    assert [(s.verdict, s.kind) for s in samples] == [("good", "return"), ("flawed", "repeat")]
    assert samples[0].recorded_logprob == pytest.approx(-0.5 - 0.6)
    assert samples[0].task == "rooms/fetch/0"
    assert [s.sample.prompt_ids for s in labelled_samples(groups())] == [(1, 2), (1, 9), (1, 7)]


def test_draws_are_even_and_repeatable() -> None:
    samples = distinct_samples(groups(), "step") * 3
    counts = [0] * 6
    for seed in range(3000):
        drawn = draw_samples(list(range(6)), 2, seed)  # type: ignore[arg-type]
        assert drawn == sorted(drawn)  # type: ignore[type-var]
        for i in drawn:
            counts[i] += 1  # type: ignore[call-overload]
    assert all(abs(c - 1000) < 130 for c in counts)  # five standard deviations
    assert draw_samples(samples, 4, 7) == draw_samples(samples, 4, 7)
    assert draw_samples(samples, 6, 0) == samples


def test_a_sample_estimates_the_whole_batch_without_bias() -> None:
    """Over all draws of two of four, the mean Delta of a sample is its Delta among all four."""
    g = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k, w = g @ g.T, torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    whole = decompose(k, w)
    sums = torch.zeros(4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            if i != j:
                pair = torch.tensor([i, j])
                part = whole_batch(k[pair][:, pair], 4)
                sums[i] += decompose(part, w[pair]).delta[0] / 3
                assert decompose(part, w[pair]).own[0] == whole.own[i]
    torch.testing.assert_close(sums, whole.delta)


def test_episodes_of_another_model() -> None:
    samples = distinct_samples(groups(), "step")
    check_tokens(samples, 10)
    with pytest.raises(UntwineError, match="token id 9, but the model has 9 embedding rows"):
        check_tokens(samples, 9)
