"""The benchmarks run, at the smallest size, and their arms do the same work. Nothing is timed."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.builders import REF, make_episode, make_step
from untwine.batch import policy_rows
from untwine.config import LossConfig, OptimizerConfig, PromptConfig
from untwine.credit import credit_method
from untwine.policy.loading import Policy
from untwine.prompting.prompter import Prompter, system_text
from untwine.records import Group
from untwine.training.update import Updater

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import iteration  # noqa: E402
import rollout  # noqa: E402
from arms import padded  # noqa: E402
from arms.alternate import Worker  # noqa: E402
from arms.generate import generate  # noqa: E402
from arms.turns import Game, Played  # noqa: E402
from arms.world import Count, EndlessAlfWorld, Setting  # noqa: E402

HAS_TRL = importlib.util.find_spec("trl") is not None
SETTING = Setting(
    groups=1, group_size=2, turns=3, new_tokens=4, hidden=64, layers=1, warm_up=3, repeats=1,
    seed=0, threads=1,
)  # fmt: skip


def run(script: str, *arguments: str) -> str:
    """What the script prints; it must succeed."""
    found = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def cells(printed: str) -> dict[str, list[str]]:
    """Rows of a table by their first cell."""
    rows = [re.split(r" *\| *", line.strip("| ")) for line in printed.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.slow
def test_coupling_runs() -> None:
    sizes = ("--samples", "2,3", "--repeats", "2", "--exact", "3", "--separate", "2")
    printed = run("coupling.py", *sizes, "--memory-mib", "4,64")
    table = cells(printed)
    for name in (
        "exact Gram, 4 MiB",
        "exact Gram, 64 MiB",
        "recompute, 4 MiB",
        "head only, forward",
    ):
        assert len(table[name]) == 6
    separate = table["separate passes, gradients stored"]
    assert [cell.startswith("~") for cell in separate] == [False] * 3 + [True] * 3  # scaled
    assert [row[1] for name, row in table.items() if name.startswith("training step")] == ["1.00"]
    found = re.search(r"^error ([\d.e-]+) \(float64, 3 samples\)", printed, re.MULTILINE)
    assert found
    assert float(found[1]) < 1e-5


def run_iteration(*arms: str) -> dict[str, list[str]]:
    return cells(
        run(
            "iteration.py", "--arms", ",".join(arms), "--groups", "1", "--group-size", "2",
            "--turns", "3", "--hidden", "64", "--layers", "1", "--warm-up", "3",
            "--least-valid", "0", "--repeats", "1",
        )
    )  # fmt: skip


@pytest.mark.java
def test_scienceworld_loads_runs() -> None:
    found = cells(run("scienceworld_loads.py", "--repeats", "1", "--tasks", "melt,grow-plant"))
    for task in ("melt", "grow-plant"):
        ordinary, ours, ratio = map(float, found[task])
        assert ratio == pytest.approx(ordinary / ours, rel=0.1)


def test_update_runs() -> None:
    """All layouts, whose gradients are those of separate samples; and a model that is loaded."""
    small = ["--layers", "2", "--width", "64", "--turns", "2", "--size", "2", "--repeats", "1"]
    rows = [line.strip("| ").split(" | ") for line in run("update.py", *small).splitlines()]
    rows = [row for row in rows if row[0] == "2"]
    assert [row[1] for row in rows] == ["trie", "episode", "varlen", "padded"]
    assert all(float(row[9]) < 1e-5 for row in rows)
    tokens = [int(row[2].replace(",", "")) for row in rows]
    assert tokens[0] < tokens[1] < tokens[2] < tokens[3]


@pytest.mark.slow
def test_rollout_runs() -> None:
    # the script itself stops when its arms do not say the same
    size = [
        "--hidden",
        "64",
        "--layers",
        "1",
        "--episodes",
        "3",
        "--prompt",
        "40",
        "--repeats",
        "1",
    ]
    found = cells(run("rollout.py", "--turns", "1,3", *size))
    assert {"1", "3"} <= set(found)
    assert len(found["3"]) == 6


def test_rollout_notices_different_words() -> None:
    turn = [(1, 2), (3, 4)]
    rollout.compare({"kept": [turn], "other": [list(turn)]}, 2)
    with pytest.raises(SystemExit, match="do not say the same in turn 1"):
        rollout.compare({"kept": [turn, turn], "other": [turn, [(1, 2), (3, 5)]]}, 2)
    with pytest.raises(SystemExit, match="does not have 3 tokens"):
        rollout.compare({"kept": [turn]}, 3)


@pytest.mark.slow
def test_iteration_runs() -> None:
    found = run_iteration("untwine", "padded")
    steps = 5
    assert found["untwine"][steps] == found["padded"][steps] == "6"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRL, reason="needs the extra bench")
def test_iteration_runs_with_trl() -> None:
    found = run_iteration("untwine", "trl rollout", "trl environment")
    assert [found[name][5] for name in ("untwine", "trl rollout", "trl environment")] == ["6"] * 3


@pytest.mark.skipif(HAS_TRL, reason="trl is installed")
def test_arms_that_cannot_run_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert iteration.chosen_arms(list(iteration.ARMS)) == ["untwine", "padded"]
    assert "pip install -c constraints.txt -e '.[bench]'" in capsys.readouterr().out


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(SystemExit, match="no such arm: nobody"):
        iteration.chosen_arms(["nobody"])


@pytest.mark.parametrize(
    ("steps", "valid", "says"), [(5, 5, "5 steps, not 6"), (6, 1, "does not act: of 6 replies")]
)
def test_an_arm_that_does_less_is_refused(steps: int, valid: int, says: str) -> None:
    iteration.check(SETTING, "arm", Count(1.0, 0.5, 2, 6, 6, 2, 12, 100), 0.2)
    with pytest.raises(SystemExit, match=says):
        iteration.check(SETTING, "arm", Count(1.0, 0.5, 2, steps, 6, valid, 12, 100), 0.2)


def test_last_words_of_a_broken_arm_are_shown() -> None:
    worker = Worker("arm", ["-c", "raise SystemExit('no bread today')"], 1)
    with pytest.raises(SystemExit, match=r"(?s)no bread today.*'arm' broke off"):
        worker.iterate()
    worker.close()


def test_endless_games_go_on_and_count() -> None:
    env = EndlessAlfWorld({})
    plan = env.expert("pick_and_place_simple", 0)
    assert plan
    env.reset("pick_and_place_simple", 0)
    env.step("dance")
    for command in plan:
        observation = env.step(command)
    assert not observation.done
    assert observation.outcome == len(plan) / (len(plan) + 1)
    env.reset("pick_and_place_simple", 0)
    assert env.step("dance").outcome == 0.0
    assert (env.sent, env.valid) == (len(plan) + 2, len(plan))


@pytest.mark.skipif(not HAS_TRL, reason="needs the extra bench")
def test_trl_reads_the_same_tokens(policy: Policy) -> None:
    from arms.trl_trainer import RESPONSE, TEMPLATE, Household
    from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response

    env, household = EndlessAlfWorld({}), Household()
    goal, observation = env.reset("pick_and_place_simple", 0)
    conversation = Prompter(policy.chat, PromptConfig()).begin(goal, observation.text)
    opening = conversation.prompt_ids
    reply = (*policy.chat.word_ids("go to bed 1"), policy.tokenizer.eos_token_id)
    answer = household.reset("pick_and_place_simple", 0)
    assert household.act("go to bed 1") == env.step("go to bed 1").text
    conversation.advance(reply, "go to bed 1", "You see a cat.")

    policy.tokenizer.chat_template = TEMPLATE
    policy.tokenizer.response_template = RESPONSE
    assert is_chat_template_prefix_preserving(policy.tokenizer)
    messages = [
        {"role": "system", "content": system_text(PromptConfig())},
        {"role": "user", "content": answer},
    ]
    parsed = parse_response(policy.tokenizer, list(reply), prefix=list(opening))
    assert parsed["tool_calls"] == [
        {"type": "function", "function": {"name": "act", "arguments": {"command": "go to bed 1"}}}
    ]

    def rendered(*more: dict[str, str]) -> tuple[int, ...]:
        return tuple(
            policy.tokenizer.apply_chat_template(
                [*messages, *more], add_generation_prompt=True, return_dict=False
            )
        )

    assert rendered() == opening
    spoken = {"role": "assistant", "content": "go to bed 1"}
    told = {"role": "tool", "content": "You see a cat."}
    assert rendered(spoken, told) == conversation.prompt_ids


HISTORIES = [(5, 6, 7, 8, 9, 10), (11, 12), (13, 14, 15, 16)]


def plain_logprobs(policy: Policy, prompt: tuple[int, ...], reply: tuple[int, ...]) -> torch.Tensor:
    """Of each token of the reply, from one forward pass without padding or cache."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt + reply])).logits[0]
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.gather(-1, torch.tensor(reply)[:, None])[:, 0]


def test_padded_arm_samples_what_it_says(policy: Policy) -> None:
    found = padded.sample(
        policy.model, HISTORIES, 5, policy.chat.end_ids, torch.Generator().manual_seed(1)
    )
    for prompt, (ids, logprobs) in zip(HISTORIES, found, strict=True):
        assert len(ids) == 5 or ids[-1] in policy.chat.end_ids
        expected = plain_logprobs(policy, prompt, ids)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=0)


def test_generate_is_greedy_and_stops_at_the_end(policy: Policy) -> None:
    (first, *_), *_ = generate(policy.model, HISTORIES[:1], 3, pad=0, greedy=True)
    assert int(policy.model(input_ids=torch.tensor(HISTORIES[:1])).logits[0, -1].argmax()) == first
    ends = frozenset({first})
    assert generate(policy.model, HISTORIES[:1], 3, pad=0, ends=ends, greedy=True) == [(first,)]


def test_padded_arm_and_ours_have_the_same_gradients(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(4)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 300, (n,), generator=generator).tolist())

    games = []
    for outcome in (0.25, 1.0, 0.5):
        game, prompt = Game(outcome=outcome), (7, 8, *draw(9))
        for length in (3, 1, 4):
            action = draw(length)
            old = plain_logprobs(policy, prompt, action) + 0.1 * torch.randn(length)
            game.steps.append(Played(prompt, action, tuple(old.tolist())))
            prompt += action + draw(4)
        games.append(game)
    setting = dataclasses.replace(SETTING, group_size=3, microbatch_tokens=64)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0)
    padded.update(policy.model, optimizer, padded.with_advantages(games, 3), setting)
    theirs = [p.grad.clone() for p in policy.model.parameters()]

    updater = Updater(
        policy,
        OptimizerConfig(lr=1e-9),
        LossConfig(),
        temperature=1.0,
        microbatch_tokens=10_000,
    )
    updater.step(policy_rows([credit_method("grpo", {})(_group(games))], "token"))
    for their, parameter in zip(theirs, policy.model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, their, atol=1e-6, rtol=1e-4)
    assert max(float(grad.abs().max()) for grad in theirs) > 1e-3


def _group(games: list[Game]) -> Group:
    episodes = []
    for number, game in enumerate(games):
        steps = [
            dataclasses.replace(
                make_step(t), prompt_ids=s.prompt_ids, action_ids=s.action_ids, logprobs=s.logprobs
            )
            for t, s in enumerate(game.steps)
        ]
        episodes.append(make_episode(game.outcome, steps, id=f"e{number}"))
    return Group(REF, tuple(episodes))
