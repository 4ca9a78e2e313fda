"""Losses of the objectives against plain float64 forward passes and numbers worked out by hand."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.builders import make_episode, make_step
from untwine.config import GCDConfig, PromptConfig
from untwine.errors import ConfigError
from untwine.gcd.objectives import Exercise, Means, Objective, make_objective, objective_names
from untwine.gcd.objectives.reinforced import advantages, reply_rows, verdict_in, word_trie
from untwine.gcd.questions import PAIRS, VERDICTS, Question
from untwine.policy.loading import Policy
from untwine.policy.sampler import Sample
from untwine.prompting.prompter import Prompter
from untwine.records import Episode, Label

GOOD, BAD = Label("rule", "good", "progress"), Label("rule", "flawed", "no_effect")
Gradients = dict[str, torch.Tensor]


def episode() -> Episode:
    words = ["go", "eat", "sit", "run"]
    return make_episode(
        0.0,
        [
            make_step(
                t,
                state=f"s{t // 2}",
                command=f"{words[t % 4]} {t}",
                prompt=(5, 6, *range(10, 14 + t)),
                action=(40 + t, 41, *range(50, 50 + t % 3)),
                labels=((GOOD, BAD)[t % 2],),
            )
            for t in range(6)
        ],
    )


def made(policy: Policy, name: str, **config: Any) -> Objective:
    prompter = Prompter(policy.chat, PromptConfig())
    settings = GCDConfig(objective=name, **config)
    objective = make_objective(name, Means(policy, prompter, settings, temperature=1.3))
    assert objective is not None
    return objective


def exercise(policy: Policy, name: str, **config: Any) -> Exercise:
    generator = torch.Generator().manual_seed(0)
    found = made(policy, name, **config).exercise([episode()], random.Random(0), generator)
    assert found is not None
    return found


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> Gradients:
    for p in model.parameters():
        p.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def double(policy: Policy) -> Any:
    return copy.deepcopy(policy.model).double()


def logits_after(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Plain logits (L, V) of one sequence."""
    found: torch.Tensor = model(input_ids=torch.tensor([list(map(int, ids))])).logits[0]
    return found


def agree(policy: Policy, drawn: Exercise, reference: Callable[[Any], torch.Tensor]) -> None:
    """Value and all gradients."""
    model = double(policy)
    expected = reference(model)
    ours, _ = drawn.loss(drawn.rows)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)
    theirs = gradients(model, expected)
    found = gradients(policy.model, ours)
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(found[name].double(), value, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["generative/ce", "pairwise"])
def test_cross_entropy(policy: Policy, name: str) -> None:
    drawn = exercise(policy, name)

    def reference(model: Any) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in drawn.rows:
            logp = logits_after(model, row.ids).log_softmax(-1)
            own = [logp[t - 1, row.ids[t]] for t in row.targets.tolist()]
            total = total - torch.stack(own).mean()
        return total / len(drawn.rows)

    assert len(drawn.rows) == {"generative/ce": 6, "pairwise": 3}[name]
    agree(policy, drawn, reference)


@pytest.mark.parametrize("name", ["generative/ce", "generative/rl", "head"])
def test_similar_contrasts_leave_what_has_no_like_for_last(policy: Policy, name: str) -> None:
    steps = [
        ("a", "go in", GOOD),
        ("b", "go in", BAD),
        ("c", "eat it all", GOOD),
        ("d", "run", BAD),
    ]
    actions = {"go in": (40, 41), "eat it all": (42, 43), "run": (44, 45)}
    recorded = make_episode(
        0.0,
        [
            make_step(t, state=s, command=c, prompt=(5, 6, 7), action=actions[c], labels=(x,))
            for t, (s, c, x) in enumerate(steps)
        ],
    )
    generator = torch.Generator().manual_seed(0)
    asked = set()
    for seed in range(6):
        for budget in range(10, 2000, 10):  # the first that one pair fits into
            objective = made(policy, name, contrast="similar", token_budget=budget)
            found = objective.exercise([recorded], random.Random(seed), generator)
            if found is not None:
                break
        assert found is not None
        for row in found.rows:
            ids = row.ids.tolist()
            shown = policy.chat.tokenizer.decode(ids)
            asked |= {
                c for c in actions if tuple(ids[-2:]) == actions[c] or f"Action: {c}" in shown
            }
    assert asked == {"go in"}


def test_losses_of_parts_add_up(policy: Policy) -> None:
    for name in ("generative/ce", "pairwise", "head", "generative/rl"):
        drawn = exercise(policy, name)
        whole, measures = drawn.loss(drawn.rows)
        parts = [drawn.loss(drawn.rows[:2]), drawn.loss(drawn.rows[2:])]
        assert whole.item() == pytest.approx(sum(v.item() for v, _ in parts), abs=1e-5)
        for key, value in measures.items():
            assert value == pytest.approx(sum(found[key] for _, found in parts))


def test_advantages_by_hand() -> None:
    assert advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert advantages([1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]
    assert advantages([1.0]) == [0.0]


@pytest.mark.parametrize("rationale", [0, 5])
def test_reinforced_gradient(policy: Policy, rationale: int) -> None:
    """On fresh samples the ratio is 1: the gradient is that of - mean A log pi, per reply the mean
    of its tokens, at the temperature, among the two words or the whole vocabulary."""
    words = VERDICTS.words(Prompter(policy.chat, PromptConfig()))
    objective = made(policy, "generative/rl", rationale_tokens=rationale)
    questions = [Question((5, 6, 7, 8), "good", "x"), Question((5, 6, 9), "flawed", "x")]
    right, wrong = words.ids["good"], words.ids["flawed"]
    allowed: Any = None

    def sample(ids: tuple[int, ...]) -> Sample:
        """With the log-probabilities of the policy itself."""
        sets, node = [], word_trie(words)
        for token in ids:
            sets.append(tuple(node))
            node = node[token]
        return Sample(ids, (0.0,) * len(ids), allowed if rationale else tuple(sets))

    replies = [[sample(right), sample(wrong), sample(right)], [sample(right), sample(wrong)]]
    rewards = [[1.0, 0.0, 1.0], [0.0, 1.0]]
    rows = reply_rows(questions, replies, rewards)
    model = double(policy)
    total = torch.zeros((), dtype=torch.float64)
    olds = []
    for row in rows:
        logits = logits_after(model, row.ids) / 1.3
        own = []
        for k, t in enumerate(row.targets.tolist()):
            among = slice(None)
            if row.choices is not None:
                among = [int(i) for i in row.choices[k] if i >= 0]  # type: ignore[assignment]
            own.append(logits[t - 1, row.ids[t]] - logits[t - 1, among].logsumexp(-1))
        olds.append(torch.stack(own).detach())
        total = total - float(row.advantages[0]) * torch.stack(own).mean() / 5
    theirs = gradients(model, total)
    fresh = [
        type(row)(
            row.ids, row.targets, row.weights, old.float().numpy(), row.advantages, row.choices
        )
        for row, old in zip(rows, olds, strict=True)
    ]
    value, _ = objective._loss(fresh)  # type: ignore[attr-defined]
    found = gradients(policy.model, value)
    hand = -sum(float(r.advantages[0]) for r in rows) / 5  # ratios are 1
    assert value.item() == pytest.approx(hand, abs=1e-5)
    assert [round(float(r.advantages[0]), 4) for r in rows] == pytest.approx(
        [0.5774, -1.1547, 0.5774, -0.7071, 0.7071], abs=1e-3
    )
    for name, expected in theirs.items():
        torch.testing.assert_close(found[name].double(), expected, atol=2e-5, rtol=1e-3)


def test_replies_are_drawn_from_the_two_words_at_their_probabilities(policy: Policy) -> None:
    drawn = exercise(policy, "generative/rl", replies=40, token_budget=10**6)
    words = VERDICTS.words(Prompter(policy.chat, PromptConfig()))
    model = double(policy)
    firsts = [ids[0] for ids in words.ids.values()]
    assert len(drawn.rows) > 50
    for row in drawn.rows[::20]:
        length = int(row.targets[0])
        pair = (logits_after(model, row.ids[:length])[-1, firsts] / 1.3).log_softmax(-1)
        token = int(row.ids[length])
        assert token in firsts
        expected = pair[firsts.index(token)].item()
        assert float(row.old_logprobs[0]) == pytest.approx(expected, abs=1e-4)
    assert drawn.counts["verdicts"] == 6
    share = drawn.counts["verdict_accuracy"]
    # the balanced questions make a guess right half of the time
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 240) + 0.1


@pytest.mark.parametrize("rationale", [0, 6])
@pytest.mark.parametrize("name", ["generative/rl", "pairwise/rl"])
def test_the_right_verdict_is_rewarded(policy: Policy, name: str, rationale: int) -> None:
    objective: Any = made(policy, name, rationale_tokens=rationale)
    quiz = VERDICTS if name == "generative/rl" else PAIRS
    ids = quiz.words(Prompter(policy.chat, PromptConfig())).ids
    assert len(ids) == 2
    for answer in ids:
        for said, reply in ids.items():
            sample = Sample(reply, (0.0,) * len(reply), None)
            assert objective.reward(Question((5, 6), answer, "x"), sample) == (said == answer)


def test_replies_in_free_text_are_learnt_from(policy: Policy) -> None:
    """Random weights never say a verdict, so what is rewarded here is an even first token."""
    settings = {"rationale_tokens": 5, "replies": 8, "token_budget": 10**6}
    objective: Any = made(policy, "generative/rl", **settings)
    objective.reward = lambda _, reply: float(reply.ids[0] % 2 == 0)
    drawn = objective.exercise([episode()], random.Random(0), torch.Generator().manual_seed(0))
    assert drawn.counts["verdicts"] == 6
    assert 48 < drawn.counts["gcd_sampled_tokens"] <= 48 * 5
    assert len(drawn.rows) > 20
    for row in drawn.rows:
        assert row.choices is None
        assert row.length - int(row.targets[0]) == len(row.targets) <= 5
        assert (row.advantages[0] > 0) == (row.ids[row.targets[0]] % 2 == 0)


def test_the_budget_of_replies_counts_every_reply(policy: Policy) -> None:
    longest = VERDICTS.words(Prompter(policy.chat, PromptConfig())).longest
    asked = []
    for budget in (150, 400, 1000):
        objective = made(policy, "generative/rl", token_budget=budget, replies=4)
        drawn = objective.exercise([episode()], random.Random(0), torch.Generator().manual_seed(1))
        asked.append(drawn.counts["verdicts"] if drawn else 0)
        if drawn is None:
            continue
        prompts = {tuple(r.ids[: int(r.targets[0])]) for r in drawn.rows}
        assert sum(map(len, prompts)) <= budget - 4 * longest * len(prompts)
    assert asked[0] < asked[-1]


def test_verdict_in_free_text(policy: Policy) -> None:
    prompter = Prompter(policy.chat, PromptConfig())
    words = VERDICTS.words(prompter)
    assert verdict_in("It seems good at first, but no: Bad.", words) == "flawed"
    assert verdict_in("goodness", words) is None
    assert verdict_in("", words) is None
    pair = PAIRS.words(prompter)
    assert verdict_in("I take B", pair) == "second"
    assert verdict_in("B, because it picks up a key", pair) == "second"
    assert verdict_in("The right answer is B: it brings a lamp nearer", pair) == "second"
    assert verdict_in("B opens nothing, a key is missing there: A", pair) == "first"
    assert verdict_in("neither a nor b", pair) is None


def test_head(policy: Policy) -> None:
    objective = made(policy, "head")
    linear: Any = objective.module
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-1, 1, linear.weight.numel())[None])
        linear.bias.fill_(0.3)
    drawn = objective.exercise([episode()], random.Random(0), torch.Generator())
    assert drawn is not None
    weight, bias = linear.weight.detach().double()[0], linear.bias.detach().double()

    def reference(model: Any) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in drawn.rows:
            ids = torch.tensor([row.ids.tolist()])
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
            z = hidden[row.targets.tolist()].mean(0) @ weight + bias[0]
            p = torch.sigmoid(z)
            total = total - (p.log() if row.advantages[0] > 0 else (1 - p).log())
        return total / len(drawn.rows)

    assert len(drawn.rows) == 6
    assert sum(row.advantages[0] > 0 for row in drawn.rows) == 3
    agree(policy, drawn, reference)
    step = 1e-2  # the bias, by finite differences
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            linear.bias += sign * step
        values.append(drawn.loss(drawn.rows)[0].item())
        with torch.no_grad():
            linear.bias -= sign * step
    linear.bias.grad = None
    drawn.loss(drawn.rows)[0].backward()  # type: ignore[no-untyped-call]
    slope = (values[0] - values[1]) / (2 * step)
    assert float(linear.bias.grad) == pytest.approx(slope, abs=1e-3)


def test_head_rows_are_the_acting_prompt(policy: Policy) -> None:
    drawn = exercise(policy, "head")
    steps = {(*s.prompt_ids, *s.action_ids) for s in episode().steps}
    assert {tuple(row.ids.tolist()) for row in drawn.rows} == steps
    for row in drawn.rows:
        assert np.array_equal(row.targets, np.arange(row.targets[0], row.length))


@pytest.mark.parametrize("name", ["generative/ce", "generative/rl", "pairwise"])
def test_questions_keep_to_the_positions_of_the_model(
    policy: Policy, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = exercise(policy, name).rows
    longest = max(len(row.ids) for row in rows)
    for positions, some in ((longest, True), (20, False)):
        monkeypatch.setattr(type(policy), "max_positions", positions)
        found = made(policy, name).exercise(
            [episode()], random.Random(0), torch.Generator().manual_seed(0)
        )
        assert (found is not None and len(found.rows) == len(rows)) == some


def test_labels_of_one_class_give_no_exercise(policy: Policy) -> None:
    step = make_step(0, labels=(BAD,))
    for name in objective_names():
        found = made(policy, name).exercise(
            [make_episode(0.0, [step])], random.Random(0), torch.Generator()
        )
        assert found is None, name


def test_unknown_objective_is_said(policy: Policy) -> None:
    with pytest.raises(ConfigError, match=r"known are none, .*Did you mean 'pairwise'"):
        made(policy, "pairwize")
