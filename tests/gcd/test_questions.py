"""Verdict data: balance, deduplication, budget, and what the loss counts."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import make_episode, make_step
from untwine.config import PromptConfig
from untwine.gcd.questions import (
    PAIRS,
    VERDICTS,
    Question,
    answer_loss,
    balanced,
    judged_steps,
    pair_questions,
    verdict_questions,
)
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


def cost(question: Question) -> int:
    return len(question.prompt_ids) + 1


def ask(
    episodes: list[Episode], prompter: Prompter, budget: int = 10**6, seed: int = 0
) -> list[Question]:
    judged = judged_steps(episodes)
    return verdict_questions(judged, prompter, budget, cost, random.Random(seed))


def take(episodes: list[Episode], prompter: Prompter) -> list[str]:
    return [q.answer for q in ask(episodes, prompter)]


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


def test_similar_commands_are_asked_about_together(prompter: Prompter) -> None:
    episode = labelled(
        ("a", "focus on egg ant", GOOD), ("b", "go to kitchen", GOOD), ("c", "open door", GOOD),
        ("d", "focus on baby mouse", BAD), ("e", "go to kitchen", BAD), ("f", "wait", BAD),
        ("g", "focus on ant", BAD), ("h", "Open door", BAD),
    )  # fmt: skip
    found = [
        (good.episode.steps[good.t].state_key, flawed.episode.steps[flawed.t].state_key)
        for good, flawed in balanced(judged_steps([episode]), random.Random(0), "similar")
    ]
    assert {frozenset(found[:2])} == {frozenset({("b", "e"), ("c", "h")})}
    assert found[2:] == [("a", "g")]


@given(
    good=st.lists(st.sampled_from(["go in", "go out", "eat it", "eat it all", ""]), max_size=6),
    flawed=st.lists(st.sampled_from(["go in", "go", "eat", "take it all"]), max_size=6),
    seed=st.integers(0, 99),
)
def test_each_pair_is_the_most_similar_one_that_is_left(
    good: list[str], flawed: list[str], seed: int
) -> None:
    steps = [(f"g{i}", command, GOOD) for i, command in enumerate(good)]
    steps += [(f"f{i}", command, BAD) for i, command in enumerate(flawed)]
    judged = judged_steps([labelled(*steps)] if steps else [])
    left = [list(range(len(good))), list(range(len(flawed)))]

    def alike(one: str, other: str) -> float:
        words = set(one.split()), set(other.split())
        common = [word for word in words[0] if word in words[1]]
        return len(common) / (len(words[0]) + len(words[1]) - len(common))

    for one, other in balanced(judged, random.Random(seed), "similar"):
        assert (one.verdict, other.verdict) == ("good", "flawed")
        i, j = one.t, other.t - len(good)
        best = max(alike(good[a], flawed[b]) for a in left[0] for b in left[1])
        assert alike(good[i], flawed[j]) == best
        left[0].remove(i)
        left[1].remove(j)
    assert not all(left)


def test_budget_is_kept(prompter: Prompter) -> None:
    episode = labelled(*[(f"s{i}", "go", GOOD if i % 2 else BAD) for i in range(20)])
    every = ask([episode], prompter)
    budget = sum(len(s.prompt_ids) + 1 for s in every) // 2
    some = ask([episode], prompter, budget)
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
    words = VERDICTS.words(prompter)
    episode = labelled(("a", "go", GOOD), ("b", "eat", BAD))
    samples = ask([episode], prompter)
    rows = words.rows(samples)
    with torch.no_grad():
        targets = score(policy, rows)
        loss = float(answer_loss(targets))
        expected, right = 0.0, 0
        for sample in samples:
            ids = list(sample.prompt_ids + words.ids[sample.answer])
            logits = policy.model(input_ids=torch.tensor([ids])).logits[0].double()
            n = len(words.ids[sample.answer])
            logp = logits[-n - 1 : -1].log_softmax(-1)
            expected -= float(logp.gather(-1, torch.tensor(ids[-n:])[:, None]).mean())
            first = logits[len(sample.prompt_ids) - 1]
            other = words.ids["good" if sample.answer == "flawed" else "flawed"][0]
            right += int(first[words.ids[sample.answer][0]] > first[other])
    assert loss == pytest.approx(expected / len(samples), rel=1e-5)
    assert words.correct(rows, targets) == right


def pairs(episodes: list[Episode], prompter: Prompter, budget: int = 10**6) -> list[Question]:
    judged = judged_steps(episodes)
    return pair_questions(judged, prompter, budget, cost, random.Random(3))


def test_pairs_are_of_one_state_and_the_better_one_is_first_every_other_time(
    prompter: Prompter,
) -> None:
    episode = labelled(
        ("a", "go", GOOD), ("a", "eat", BAD), ("a", "sit", BAD), ("b", "run", GOOD),
        ("c", "fly", GOOD), ("c", "swim", BAD), ("d", "hop", BAD), ("c", "sing", GOOD),
    )  # fmt: skip
    found = pairs([episode], prompter)
    asked = set()
    for question in found:
        text = prompter.chat.tokenizer.decode(question.prompt_ids)
        first = text.partition("\nA: ")[2].partition("\n")[0]
        second = text.partition("\nB: ")[2].partition("\n")[0]
        better, worse = (first, second) if question.answer == "first" else (second, first)
        asked.add((better, worse))
    assert asked == {("go", "eat"), ("go", "sit"), ("fly", "swim"), ("sing", "swim")}
    answers = [question.answer for question in found]
    assert sorted(answers) == ["first", "first", "second", "second"]
    assert answers[0] != answers[1] != answers[2] != answers[3]
    assert pairs([labelled(("a", "go", GOOD), ("b", "eat", BAD))], prompter) == []
    assert len(pairs([episode], prompter, len(found[0].prompt_ids) + 1)) == 1


def test_pairs_show_the_past_of_the_flawed_action(prompter: Prompter) -> None:
    """Going back is no flaw for who came from elsewhere."""
    undo = Label("rule", "flawed", "undo")
    back = make_step(1, state="b", command="go west", labels=(undo,))
    eating = make_step(1, state="b", command="eat", labels=(GOOD,))
    came = make_episode(0.0, [make_step(0, state="a", command="go east"), back])
    other = make_episode(0.0, [make_step(0, state="c", command="swim"), eating])
    for episodes in ([came, other], [other, came]):
        (question,) = pairs(episodes, prompter)
        text = prompter.chat.tokenizer.decode(question.prompt_ids)
        assert "go east" in text
        assert "swim" not in text


def test_what_cannot_be_asked_is_left_out(prompter: Prompter) -> None:
    episode = labelled(*[(f"s{i}", "go", GOOD if i % 2 else BAD) for i in range(8)])
    every = ask([episode], prompter)
    barred = every[2].prompt_ids
    found = verdict_questions(
        judged_steps([episode]), prompter, 10**6,
        lambda q: math.inf if q.prompt_ids == barred else cost(q), random.Random(0),
    )  # fmt: skip
    assert found == [*every[:2], *every[4:]]  # the pair goes, and those after it stay


def test_pair_words_are_apart(prompter: Prompter) -> None:
    ids = PAIRS.words(prompter).ids
    assert ids["first"][0] != ids["second"][0]


def test_a_step_in_doubt_spoils_its_equals() -> None:
    doubt = make_step(1, state="a", command="Go", labels=(GOOD, BAD))
    sure = make_step(0, state="a", command="go", labels=(GOOD,))
    assert judged_steps([make_episode(0.0, [sure, doubt])]) == []
    assert len(judged_steps([make_episode(0.0, [sure])])) == 1
