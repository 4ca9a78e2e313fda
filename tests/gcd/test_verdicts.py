"""Verdict data: balance, deduplication, budget, and what the loss counts."""

from __future__ import annotations

import random

import pytest
import torch

from tests.builders import make_episode, make_step
from untwine.config import PromptConfig
from untwine.gcd.verdicts import VerdictWords, verdict_loss, verdict_samples
from untwine.policy.loading import Policy
from untwine.prompting.prompter import Prompter
from untwine.records import Episode, Label
from untwine.scoring import score

GOOD, BAD = Label("rule", "good", "progress"), Label("rule", "flawed", "no_effect")


@pytest.fixture
def prompter(policy: Policy) -> Prompter:
    return Prompter(policy.chat, PromptConfig())


def labelled(*pairs: tuple[str, str, Label]) -> Episode:
    return make_episode(
        0.0,
        [make_step(t, state=s, command=c, labels=(x,)) for t, (s, c, x) in enumerate(pairs)],
    )


def take(
    episodes: list[Episode], prompter: Prompter, budget: int = 10**6, seed: int = 0
) -> list[str]:
    samples = verdict_samples(episodes, prompter, budget, random.Random(seed))
    return [s.verdict for s in samples]


def test_classes_are_balanced(prompter: Prompter) -> None:
    episode = labelled(
        *[(f"s{i}", "go", GOOD) for i in range(7)], ("t", "go", BAD), ("u", "go", BAD)
    )
    assert sorted(take([episode], prompter)) == ["flawed", "flawed", "good", "good"]


def test_equal_steps_count_once_and_contradictions_are_left_out(prompter: Prompter) -> None:
    episode = labelled(
        ("a", "go", GOOD), ("a", "go", GOOD), ("b", "go", BAD),
        ("c", "go", GOOD), ("c", "go", BAD),
    )  # fmt: skip
    assert sorted(take([episode], prompter)) == ["flawed", "good"]


def test_one_class_gives_nothing(prompter: Prompter) -> None:
    assert take([labelled(("a", "go", BAD), ("b", "go", BAD))], prompter) == []


def test_budget_is_kept(prompter: Prompter) -> None:
    episode = labelled(*[(f"s{i}", "go", GOOD if i % 2 else BAD) for i in range(20)])
    every = verdict_samples([episode], prompter, 10**6, random.Random(0))
    budget = sum(len(s.prompt_ids) + 1 for s in every) // 2
    some = verdict_samples([episode], prompter, budget, random.Random(0))
    assert 0 < len(some) < len(every)
    assert sum(len(s.prompt_ids) + 1 for s in some) <= budget


def test_prompt_shows_task_state_and_action(prompter: Prompter) -> None:
    episode = make_episode(0.0, [make_step(0, state="a", command="open box", labels=(GOOD,))])
    text = prompter.chat.tokenizer.decode(prompter.verdict_ids(episode, 0))
    for part in (episode.goal, "observation of a", "Action: open box", "Good or bad?"):
        assert part in text
    assert "eat box" in prompter.chat.tokenizer.decode(prompter.verdict_ids(episode, 0, "eat box"))


def test_loss_is_the_mean_cross_entropy_of_the_right_word(
    policy: Policy, prompter: Prompter
) -> None:
    words = VerdictWords(prompter)
    episode = labelled(("a", "go", GOOD), ("b", "eat", BAD))
    samples = verdict_samples([episode], prompter, 10**6, random.Random(0))
    rows = words.rows(samples)
    with torch.no_grad():
        targets = score(policy, rows)
        loss = float(verdict_loss(targets))
        expected, right = 0.0, 0
        for sample in samples:
            ids = list(sample.prompt_ids + words.ids[sample.verdict])
            logits = policy.model(input_ids=torch.tensor([ids])).logits[0].double()
            n = len(words.ids[sample.verdict])
            logp = logits[-n - 1 : -1].log_softmax(-1)
            expected -= float(logp.gather(-1, torch.tensor(ids[-n:])[:, None]).mean())
            first = logits[len(sample.prompt_ids) - 1]
            other = words.ids["good" if sample.verdict == "flawed" else "flawed"][0]
            right += int(first[words.ids[sample.verdict][0]] > first[other])
    assert loss == pytest.approx(expected / len(samples), rel=1e-5)
    assert words.correct(rows, targets) == right
