"""Questions that follow the reply in the acting prompt: what they read, and one pass for both
losses against float64 passes of a plain model."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.builders import make_episode, make_step
from tests.gcd.test_training import recipe
from tests.runs import cold_start_of, in_one_and_in_two, rows
from untwine.batch import Row, completion_row, distinct_tokens
from untwine.config import GCDConfig, LossConfig, OptimizerConfig, PromptConfig
from untwine.demonstrations import play_experts
from untwine.envs.pool import EnvPool
from untwine.envs.protocol import Planner
from untwine.envs.registry import make_env
from untwine.errors import EnvError
from untwine.gcd.objectives import Means, make_objective
from untwine.gcd.objectives.cross_entropy import CrossEntropy
from untwine.gcd.questions import judged_steps, verdict_questions
from untwine.policy.loading import Policy
from untwine.progress import Display
from untwine.prompting.prompter import Prompter
from untwine.records import Episode, Label, TaskRef
from untwine.training.critic import Alongside, Sample
from untwine.training.mixing import NORMS_EVERY
from untwine.training.update import Updater
from untwine.workshop import Workshop

GOOD, BAD = Label("rule", "good", "progress"), Label("rule", "flawed", "no_effect")
AFTER = PromptConfig(verdict="after")


def said(policy: Policy, word: str) -> tuple[int, ...]:
    return policy.chat.reply_ids(word)


def acted(policy: Policy, advantage: float | None = 1.0) -> Episode:
    """Four steps in prompts of their own, good and flawed in turn."""
    prompter = Prompter(policy.chat, AFTER)
    steps = []
    for t, word in enumerate(("go", "open", "find", "focus")):
        prompt = prompter.begin("fetch it", f"You see a red apple {t}.").prompt_ids
        steps.append(
            make_step(
                t,
                state=f"s{t}",
                command=word,
                prompt=prompt,
                action=said(policy, word),
                advantage=advantage,
                labels=((GOOD, BAD)[t % 2],),
            )
        )
    return make_episode(0.0, steps)


def test_the_question_is_the_next_turn_of_the_acting_chat(policy: Policy) -> None:
    episode = acted(policy)
    prompter = Prompter(policy.chat, AFTER)
    for command, shown in ((None, "go"), ("open door", "open door")):
        ids = prompter.verdict_ids(episode, 0, command)
        head = episode.steps[0].prompt_ids
        assert ids[: len(head)] == head
        text = policy.tokenizer.decode(ids)
        turns = [
            {"role": "assistant", "content": shown},
            {"role": "user", "content": "Good or bad?"},
        ]
        chat = policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": "-"}, *turns], tokenize=False, add_generation_prompt=True
        )
        assert text[len(policy.tokenizer.decode(head)) :] == chat[chat.index(shown) :]


def test_the_budget_pays_for_what_is_added(policy: Policy) -> None:
    prompter = Prompter(policy.chat, AFTER)
    for advantage in (1.0, None):
        episode = acted(policy, advantage)
        judged = judged_steps([episode])
        tails = [
            len(prompter.verdict_ids(episode, t)) - (advantage is not None) * len(s.prompt_ids)
            for t, s in enumerate(episode.steps)
        ]

        def drawn(budget: int, judged: Any = judged) -> int:
            rng = random.Random(0)
            return len(verdict_questions(judged, prompter, budget, lambda q: q.added + 1, rng))

        everything = sum(tails) + 4
        assert drawn(everything) == 4
        assert drawn(everything - 1) == 2


@pytest.mark.parametrize(
    ("gcd", "temperature"),
    [({}, 1.0), ({}, 0.7), ({"step": "own"}, 1.0), ({"weight_of": "gradient"}, 1.0)],
)
def test_the_budget_holds_however_questions_are_computed(
    policy: Policy, gcd: dict[str, Any], temperature: float
) -> None:
    """By themselves they pay for their prompts, in one pass with the policy's rows they do not."""
    episode, prompter = acted(policy), Prompter(policy.chat, AFTER)
    asked = {}
    for budget in range(60, 800, 20):
        settings = GCDConfig(objective="generative/ce", token_budget=budget, **gcd)
        objective = make_objective(
            "generative/ce", Means(policy, prompter, settings, temperature=temperature)
        )
        assert objective is not None
        exercise = objective.exercise([episode], random.Random(0), torch.Generator())
        if exercise is None:
            continue
        updater = Updater(
            policy,
            OptimizerConfig(lr=1e-12),
            LossConfig(),
            temperature=temperature,
            microbatch_tokens=10_000,
            gcd=settings,
        )
        found = updater.step(policy_rows(episode), exercise, 0.5).values
        assert 0 < found["gcd_tokens"] <= budget
        asked[budget] = len(exercise.rows)
    assert max(asked.values()) == 4
    together = temperature == 1
    assert (min(asked) < 150) == together


def policy_rows(episode: Episode) -> list[Row]:
    made = []
    for t, step in enumerate(episode.steps):
        row = completion_row(step.prompt_ids, step.action_ids, 1 / episode.length)
        sign = np.full(len(step.action_ids), (-1.0) ** t, dtype=np.float32)
        made.append(Row(row.ids, row.targets, row.weights, row.old_logprobs - 5, sign))
    return made


def mean_logprob(model: torch.nn.Module, ids: np.ndarray, first: int) -> torch.Tensor:
    logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
    logprobs = logits.log_softmax(-1)
    places = torch.arange(first, len(ids))
    mean: torch.Tensor = logprobs[places - 1, torch.from_numpy(ids)[places]].mean()
    return mean


@pytest.mark.parametrize("budget", [10_000, 150])
@pytest.mark.parametrize("way", ["sum", "sum, with norms", "held", "held, checkpointing"])
def test_one_pass_gives_both_gradients(policy: Policy, way: str, budget: int) -> None:
    """One backward pass of the sum, or one for each loss; against separate samples in float64."""
    episode, weight = acted(policy), 0.7
    prompter = Prompter(policy.chat, AFTER)
    objective = make_objective(
        "generative/ce", Means(policy, prompter, GCDConfig(objective="generative/ce"))
    )
    assert objective is not None
    exercise = objective.exercise([episode], random.Random(0), torch.Generator())
    assert exercise is not None
    assert len(exercise.rows) == 4
    plain = copy.deepcopy(policy.model).double()
    before = plain.state_dict()
    if way == "held, checkpointing":
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    updater = Updater(
        policy,
        OptimizerConfig(lr=1e-12, grad_clip=1e9),
        LossConfig(),
        temperature=1.0,
        microbatch_tokens=budget,
        gcd=GCDConfig(weight_of="gradient" if way.startswith("held") else "loss"),
    )
    updater.steps = 3 if way == "sum" else NORMS_EVERY
    measures = updater.step(policy_rows(episode), exercise, weight).values
    if way.startswith("held"):
        ratio = measures["gcd_lambda"] * measures["grad_norm_gcd"] / measures["grad_norm_policy"]
        assert ratio == pytest.approx(weight)
        weight = measures["gcd_lambda"]
    else:
        assert ("grad_norm_gcd" in measures) == (way != "sum")

    plain.load_state_dict(before)
    loss = torch.zeros((), dtype=torch.float64)
    for t, step in enumerate(episode.steps):
        ids = np.array(step.prompt_ids + step.action_ids)
        # old log-probabilities are -5 and clipping 0.2: a ratio above 1.2 teaches nothing upwards
        logits = plain(input_ids=torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
        for place in range(len(step.prompt_ids), len(ids)):
            ratio = (logits[place - 1, ids[place]] + 5).exp()
            sign = (-1.0) ** t
            surrogate = torch.minimum(ratio * sign, ratio.clamp(0.8, 1.2) * sign)
            loss = loss - surrogate / len(step.action_ids) / episode.length
        question = prompter.verdict_ids(episode, t)
        answer = policy.chat.word_ids("good" if t % 2 == 0 else "bad")
        asked = np.array(question + answer)
        loss = loss - weight * mean_logprob(plain, asked, len(question)) / 4
    loss.backward()  # type: ignore[no-untyped-call]
    for (name, ours), theirs in zip(
        policy.model.named_parameters(), plain.parameters(), strict=True
    ):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm() + 1e-9, name

    if budget == 10_000:
        together = distinct_tokens([*policy_rows(episode), *exercise.rows])
        assert measures["gcd_tokens"] == together - distinct_tokens(policy_rows(episode))
    # the pass is divided by tokens, in micro-batches too; a backward pass of its own comes on top
    seconds = [measures[f"seconds_{loss}"] for loss in ("policy", "gcd")]
    tokens = [measures["update_tokens"], measures["gcd_tokens"]]
    share = tokens[1] / sum(tokens)
    if way == "sum":
        assert seconds[1] / sum(seconds) == pytest.approx(share)
    else:
        assert seconds[1] / sum(seconds) > share


TASK = "look_at_obj_in_light"


@pytest.mark.parametrize("expert", ["oracle", "search", "systematic"])
def test_alternatives_are_judged_as_a_new_game_shows(expert: Any) -> None:
    """Each one played in a new environment, and planned from there."""
    refs = [TaskRef("alfworld", TASK, v) for v in range(3)]
    with EnvPool("alfworld", {}, workers=0, sessions=3, timeout_s=60) as pool:
        found = play_experts(pool, refs, 40, expert=expert, alternatives=4)
        plain = play_experts(pool, refs, 40, expert=expert)
        assert [[m.command.text for m in t.moves] for t in found] == [
            [m.command.text for m in t.moves] for t in plain
        ]
    env = make_env("alfworld")
    assert isinstance(env, Planner)
    verdicts = {True: 0, False: 0}
    for transcript in found:
        given: list[str] = []
        for move in transcript.moves:
            first = move.command.text.split()[0]
            others = dict(move.command.others)
            assert move.command.text not in others
            for command, good in others.items():
                env.reset(transcript.ref.task, transcript.ref.variation)
                for earlier in given:
                    env.step(earlier)
                assert command in env.admissible()
                before = env.plan()
                assert before
                after = () if env.step(command).success else env.plan()
                nearer = after is not None and len(after) < len(before)
                if expert == "oracle":
                    assert good == nearer
                elif good:
                    # another place that was not looked into, or a plan as short
                    assert move.command.looks
                    assert command.split()[0] == first
                    assert command not in given
                else:
                    assert not nearer
                verdicts[good] += 1
            given.append(move.command.text)
    assert verdicts[False] > 20
    assert verdicts[True] > 0


def test_where_nothing_can_be_judged_it_says_so() -> None:
    refs = [TaskRef("rooms", "fetch", 0)]
    with (
        EnvPool("rooms", {}, workers=0, sessions=1, timeout_s=30) as pool,
        pytest.raises(EnvError, match=r"set cold_start\.alternatives to 0"),
    ):
        play_experts(pool, refs, 9, alternatives=1)


def test_imitated_steps_bring_one_good_and_one_flawed_command() -> None:
    own = on_alfworld(1)
    with Workshop(own, Display(quiet=True)) as workshop:
        data = cold_start_of(workshop)
        assert isinstance(data.critic, Alongside)
        decode = workshop.policy.tokenizer.decode
        seen = 0
        for number in range(0, len(data.samples), 5):
            sample = data.samples[number]
            exercise = data.critic.exercise([sample], random.Random(number))
            if exercise is None:
                continue
            prompt = sample.row.ids[: int(sample.row.targets[sample.row.advantages > 0][0])]
            answers = set()
            for row in exercise.rows:
                assert (row.ids[: len(prompt)] == prompt).all()
                answers.add(decode(row.ids[row.targets]))
            assert answers == {"good", "bad"}
            seen += 1
        assert seen > 5


def test_alternatives_come_in_the_words_of_the_reply_beside_which_they_stand() -> None:
    """Else what is good could be told from the form of a reply. In each pair the two prompts are
    alike, but for the command."""
    own = on_alfworld(1, layout="append")
    changes = {
        "prompt": {"tags": True},
        "sampling": {"constrained": False, "max_new_tokens": 200},
        "cold_start": {"verdict_share": 10.0, "noise": 0.0},
    }
    parts = {k: getattr(own, k).model_copy(update=v) for k, v in changes.items()}
    own = own.model_copy(update=parts)
    with Workshop(own, Display(quiet=True)) as workshop:
        data = cold_start_of(workshop)
        assert data.critic is not None
        exercise = data.critic.exercise(data.samples[:2], random.Random(0))
        assert exercise is not None
        decode = workshop.policy.tokenizer.decode
        forms: dict[str, set[str]] = {}
        for row in exercise.rows:
            answer = decode(row.ids[row.targets])
            before, _, given = decode(row.ids).rpartition("<action>")
            after = given.partition("</action>")[2].removesuffix(answer)
            forms.setdefault(before + after, set()).add(answer)
    assert len(exercise.rows) > 10
    assert all(answers == {"good", "bad"} for answers in forms.values())


def test_where_one_class_is_known_per_state_as_many_good_as_flawed_are_asked(
    policy: Policy,
) -> None:
    """Steps 0 and 2 are good, 1 and 3 flawed; copies with both verdicts for a state make a pair."""
    prompter = Prompter(policy.chat, AFTER)
    objective = make_objective(
        "generative/ce", Means(policy, prompter, GCDConfig(objective="generative/ce"))
    )
    assert isinstance(objective, CrossEntropy)
    episode = acted(policy)
    other = dataclasses.replace(episode.steps[0], labels=(BAD,))
    twin = dataclasses.replace(episode, steps=(other,))
    row = policy_rows(episode)[0]

    def asked(critic: Alongside, *steps: int) -> list[tuple[int, str]]:
        exercise = critic.exercise([Sample(row, 0, steps)], random.Random(0))
        found = []
        for made in exercise.rows if exercise else ():
            text = policy.tokenizer.decode(made.ids)
            (t,) = (t for t in range(4) if f"a red apple {t}." in text)
            found.append((t, policy.tokenizer.decode(made.ids[made.targets])))
        return sorted(found)

    alone = Alongside(objective, [[episode]], 10.0)
    assert alone.size == 2
    assert asked(alone, 0, 1, 2, 3) == [(0, "good"), (1, "bad"), (2, "good"), (3, "bad")]
    assert len(asked(alone, 0, 1, 2)) == 2
    assert (1, "bad") in asked(alone, 0, 1, 2)
    assert asked(alone, 0, 2) == []
    assert asked(alone, 3) == []
    paired = Alongside(objective, [[episode, twin]], 10.0)
    assert paired.size == 1 + 1
    assert asked(paired, 0) == [(0, "bad"), (0, "good")]
    assert asked(paired, 0, 2) == [(0, "bad"), (0, "good")]
    assert asked(paired, 0, 2, 3) == [(0, "bad"), (0, "good"), (2, "good"), (3, "bad")]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 10.0])
def test_questions_keep_to_their_share_of_the_tokens(share: float) -> None:
    """In chats that grow, a row holds all steps of an episode."""
    own = on_alfworld(1, layout="append")
    cold = own.cold_start.model_copy(update={"verdict_share": share})
    own = own.model_copy(update={"cold_start": cold})
    with Workshop(own, Display(quiet=True)) as workshop:
        data = cold_start_of(workshop)
        assert data.critic is not None
        drawn = data.samples[:4]
        exercise = data.critic.exercise(drawn, random.Random(0))
        assert exercise is not None
        read = [sample.row for sample in drawn]
        steps = sum(len(sample.steps) for sample in drawn)
        added = distinct_tokens([*read, *exercise.rows]) - distinct_tokens(read)
        allowed = share * sum(sample.length for sample in drawn)
    asked = len(exercise.rows)
    if share == 10:  # all that can be asked
        assert 1.5 * steps < asked <= 2 * steps
    elif share < 0.01:  # never nothing
        assert asked == 2
    else:
        assert 0.5 * allowed < added <= allowed


def on_alfworld(iterations: int, **prompt: Any) -> Any:
    return recipe(
        iterations,
        env={"name": "alfworld", "tasks": [TASK], "max_steps": 30},
        prompt={"layout": "window", "history": 1, "verdict": "after"} | prompt,
        cold_start={"expert": "search", "alternatives": 2, "verdict_weight": 0.3},
        gcd={"objective": "generative/ce", "labels": ["expert"], "expert": "search"},
        rl={"drop_constant_groups": False, "microbatch_tokens": 8192},
    )


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path: Path) -> None:
    whole, _ = in_one_and_in_two(tmp_path, on_alfworld, 2)
    cold = rows(whole, "cold_start")
    assert all(0 <= row["verdict_accuracy"] <= 1 for row in cold)
    asked = [row for row in rows(whole) if row["verdicts"]]
    assert asked
    for row in asked:
        assert 0 < row["gcd_tokens"] / row["verdicts"] < 40  # a whole prompt has more than 100
