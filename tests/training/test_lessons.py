"""Lessons: a cold start that imitates some kinds of commands before all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.gcd.test_training import recipe
from tests.runs import cold_start_of
from untwine.batch import Row
from untwine.config import ColdStartConfig, Recipe
from untwine.demonstrations import demonstration
from untwine.errors import ConfigError
from untwine.progress import Display
from untwine.training.loop import train
from untwine.training.measures import Measures
from untwine.training.update import Updater
from untwine.workshop import Workshop


def taught(*lessons: dict[str, Any], **prompt: Any) -> Recipe:
    cold = {"steps": 50, "batch_tokens": 1024, "lessons": list(lessons)}
    return recipe(0, cold_start=cold, prompt={"layout": "window", "history": 1} | prompt)


class Recorder:
    """Stands where the updater does and keeps what it is to imitate."""

    def __init__(self) -> None:
        self.steps = 0
        self.seen: list[Sequence[Row]] = []

    def imitate(self, rows: Sequence[Row], exercise: Any, weight: float) -> Measures:
        self.seen.append(rows)
        self.steps += 1
        return Measures()


def imitated(workshop: Workshop, steps: int) -> list[Counter[str]]:
    """First words of the commands that each step imitates."""
    data = cold_start_of(workshop)
    updater: Any = Recorder()
    for _ in range(steps):
        data.step(updater)
    return [Counter(word for row in rows for word in words(workshop, row)) for rows in updater.seen]


def words(workshop: Workshop, row: Row) -> list[str]:
    """Of the commands in a row: a target whose token before it is no target begins one."""
    acted = [int(t) for t, a in zip(row.targets, row.advantages, strict=True) if a]
    begins = [t for t in acted if t - 1 not in acted]
    decode = workshop.policy.tokenizer.decode
    return [decode(row.ids[t : t + 12]).split()[0] for t in begins]


def test_lessons_first_and_then_everything() -> None:
    own = taught({"steps": 20, "commands": ["open"]}, {"steps": 20, "commands": ["open", "go"]})
    own = own.model_copy(
        update={"sampling": own.sampling.model_copy(update={"constrained": False})}
    )
    with Workshop(own, Display(quiet=True)) as workshop:
        all_words = {move.command.text.split()[0] for t in workshop.transcripts for move in t.moves}
        steps = imitated(workshop, 50)
    first, second, rest = (sum(part, Counter()) for part in (steps[:20], steps[20:40], steps[40:]))
    assert set(first) == {"open"}
    assert set(second) == {"open", "go"}
    assert second["open"] / second["go"] == pytest.approx(1.0, abs=0.4)
    assert {"open", "go"} < set(rest) <= all_words


def test_growing_chats_give_only_what_is_taught() -> None:
    own = taught({"steps": 5, "commands": ["open"]}, layout="append")
    own = own.model_copy(
        update={"sampling": own.sampling.model_copy(update={"constrained": False})}
    )
    with Workshop(own, Display(quiet=True)) as workshop:
        assert set(sum(imitated(workshop, 5), Counter())) == {"open"}


def test_a_command_that_no_expert_gives() -> None:
    with (
        Workshop(taught({"steps": 5, "commands": ["dance"]}), Display(quiet=True)) as workshop,
        pytest.raises(ConfigError, match=r"names 'dance'.*they begin with: .*go"),
    ):
        imitated(workshop, 1)


def test_more_lessons_than_steps() -> None:
    with pytest.raises(ValidationError, match="lessons take 30 steps, and steps says 20"):
        ColdStartConfig.model_validate(
            {"steps": 20, "lessons": [{"steps": 30, "commands": ["go"]}]}
        )


def test_words_of_every_prompt_are_single_tokens() -> None:
    """The tokenizer has read prompts as agents and judges read them."""
    own = taught()
    tiny = own.policy.tiny.model_copy(update={"vocab_size": 1024})
    own = own.model_copy(update={"policy": own.policy.model_copy(update={"tiny": tiny})})
    with Workshop(own, Display(quiet=True)) as workshop:
        tokenizer = workshop.policy.tokenizer
    for word in ("assistant", "system", "user", "Task", " environment", "Good", "bad"):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word


def test_the_cold_start_may_have_threads_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number holds in its steps and is taken back before the iterations."""
    seen: list[tuple[str, int]] = []
    imitate, step = Updater.imitate, Updater.step

    def noted(name: str, real: Any) -> Any:
        def call(*args: Any) -> Measures:
            seen.append((name, torch.get_num_threads()))
            return real(*args)  # type: ignore[no-any-return]

        return call

    monkeypatch.setattr(Updater, "imitate", noted("imitate", imitate))
    monkeypatch.setattr(Updater, "step", noted("step", step))
    cold = {"steps": 2, "threads": 2}
    own = recipe(1, cold_start=cold, policy={"threads": 1}, rl={"drop_constant_groups": False})
    train(own, tmp_path / "run", Display(quiet=True))
    assert set(seen) == {("imitate", 2), ("step", 1)}


def test_looking_and_going_on_purpose_are_taught_equally_often() -> None:
    """An expert that searches goes somewhere to look much oftener than to fetch or bring."""
    own = recipe(
        0,
        env={"name": "alfworld", "tasks": ["look_at_obj_in_light"], "max_steps": 40},
        prompt={"layout": "window", "history": 1},
        cold_start={
            "expert": "search",
            "episodes": 12,
            "noise": 0.0,
            "steps": 60,
            "batch_tokens": 256,
            "lessons": [{"steps": 60, "commands": ["go"]}],
        },
    )
    with Workshop(own, Display(quiet=True)) as workshop:
        purposes: dict[tuple[int, ...], bool] = {}
        for transcript in workshop.transcripts:
            steps = demonstration(transcript, workshop.collector.prompter).steps
            for move, step in zip(transcript.moves, steps, strict=True):
                purposes[step.prompt_ids] = move.command.looks
        data = cold_start_of(workshop)
        updater: Any = Recorder()
        for _ in range(60):
            data.step(updater)
        seen = Counter(
            purposes[tuple(row.ids[: int(row.targets[row.advantages != 0][0])].tolist())]
            for rows in updater.seen
            for row in rows
        )
    going = Counter(
        move.command.looks
        for transcript in workshop.transcripts
        for move in transcript.moves
        if move.command.text.startswith("go ")
    )
    assert going[True] > 2 * going[False]
    assert seen[True] > 20
    assert 0.5 < seen[True] / seen[False] < 2


@pytest.mark.parametrize("layout", ["append", "window"])
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_rare_kinds_weigh_more_with_more_balance(layout: str, balance: float) -> None:
    """The weights that each kind has in all go with the number of its steps to the power of 1 minus
    `balance`; on average a step weighs 1."""
    cold = {"steps": 1, "balance": balance, "text_weight": 0.1}
    own = recipe(0, cold_start=cold, prompt={"layout": layout}, sampling={"constrained": False})
    with Workshop(own, Display(quiet=True)) as workshop:
        data = cold_start_of(workshop)
        number: Counter[tuple[str, bool]] = Counter()
        total: Counter[tuple[str, bool]] = Counter()
        for sample in data.samples:
            transcript = workshop.transcripts[sample.episode]
            episode = demonstration(transcript, workshop.collector.prompter)
            weight = dict(zip(sample.row.targets.tolist(), sample.row.weights, strict=True))
            for t in sample.steps:
                command = transcript.moves[t].command
                kind = (command.text.split()[0], command.looks)
                step = episode.steps[t]
                own_tokens = range(len(step.prompt_ids), len(step.prompt_ids + step.action_ids))
                assert len({weight[i] for i in own_tokens}) == 1
                number[kind] += 1
                total[kind] += float(weight[own_tokens[0]])
    assert len(number) > 2
    assert total.total() == pytest.approx(number.total(), rel=1e-4)
    shares = [total[kind] / n ** (1 - balance) for kind, n in number.items()]
    assert shares == pytest.approx([shares[0]] * len(shares), rel=1e-4)
