"""Expert episodes that are longer than the model, or than the budget of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gcd.test_training import recipe
from tests.runs import cold_start_of
from untwine.config import Recipe
from untwine.demonstrations import demonstration
from untwine.errors import ConfigError
from untwine.progress import Display
from untwine.training.loop import train
from untwine.workshop import Workshop


def wandering(budget: int, **cold: float) -> Recipe:
    """Chats that grow, by experts that err in every second step."""
    own = recipe(
        0,
        cold_start={"episodes": 8, "steps": 2, "noise": 0.6, "imitate_noise": True, **cold},
        prompt={"layout": "append"},
    )
    rl = own.rl.model_copy(update={"microbatch_tokens": budget})
    return own.model_copy(update={"rl": rl})


@pytest.mark.parametrize("positions", [False, True])
def test_they_end_where_no_more_fits(positions: bool, tmp_path: Path) -> None:
    with Workshop(wandering(16384), Display(quiet=True)) as workshop:
        prompter, choices = workshop.collector.prompter, workshop.collector.choices
        whole = [
            demonstration(x, prompter, imitate_noise=True, choices=choices)
            for x in workshop.transcripts
        ]
    ends = [
        [len(s.prompt_ids) + len(s.action_ids) for s in e.steps if s.advantage is not None]
        for e in whole
    ]
    longest = sorted(own[-1] for own in ends)[3]
    own = wandering(16384 if positions else longest)
    with Workshop(own, Display(quiet=True)) as workshop:
        if positions:
            workshop.policy.model.config.max_position_embeddings = longest
        data = cold_start_of(workshop)
    rows = [(sample.row.length, len(sample.steps)) for sample in data.samples]
    fitting = [[end for end in episode if end <= longest] for episode in ends]
    assert rows == [(own[-1], len(own)) for own in fitting]
    assert data.cut == sum(own[-1] > longest for own in ends) > 0


def test_told_copies_end_where_no_more_fits() -> None:
    """What is told makes their prompts longer."""
    longest = 200
    with Workshop(wandering(longest, instructed=1.0), Display(quiet=True)) as workshop:
        data = cold_start_of(workshop)
    told = [e for e in data.episodes if e.told]
    assert told
    assert all(
        len(s.prompt_ids) + len(s.action_ids) <= longest for e in data.episodes for s in e.steps
    )
    plain = {e.ref: e.length for e in data.episodes if not e.told}
    assert any(e.length < plain[e.ref] for e in told)


def test_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(wandering(220, verdict_weight=0.2), tmp_path / "run", Display())
    assert "expert episodes are longer than the model" in " ".join(capsys.readouterr().err.split())


def test_none_fits() -> None:
    with (
        Workshop(wandering(30), Display(quiet=True)) as workshop,
        pytest.raises(ConfigError, match="no step of an expert fits into 30 tokens"),
    ):
        cold_start_of(workshop)
