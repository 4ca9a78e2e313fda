"""Experts that err and recover."""

from __future__ import annotations

from collections import Counter

import pytest

from untwine.demonstrations import play_experts
from untwine.envs.pool import EnvPool
from untwine.envs.protocol import Planner
from untwine.envs.registry import make_env
from untwine.envs.wandering import Command, wandering_plan
from untwine.errors import EnvError
from untwine.records import TaskRef

TASK = "pick_clean_then_place_in_recep"
LIMIT = 20


def test_it_errs_and_still_wins() -> None:
    env = make_env("alfworld")
    assert isinstance(env, Planner)
    errors = total = invalid = 0
    for variation in range(4):
        for seed in range(5):
            plan = wandering_plan(env, TASK, variation, 0.4, LIMIT, seed)
            assert plan is not None
            assert len(plan) <= LIMIT
            env.reset(TASK, variation)
            for command, expert, off_plan, looks, chance, _ in plan:
                valid = command in env.admissible()
                assert valid or not expert
                invalid += not valid
                due = env.plan()
                assert due
                last = env.step(command)
                assert expert == (command == due[0])
                assert not looks
                assert not chance
                if not expert:
                    left = env.plan()
                    assert left is not None
                    assert off_plan == (len(left) >= len(due))
            assert last.success
            errors += sum(not command.expert for command in plan)
            total += len(plan)
    assert 0.1 < errors / total < 0.5
    assert 0 < invalid < errors


def test_its_errors_can_be_kept_to_valid_commands() -> None:
    env = make_env("alfworld")
    assert isinstance(env, Planner)
    errors = 0
    for seed in range(12):
        plan = wandering_plan(env, TASK, 0, 0.6, LIMIT, seed, valid_only=True)
        assert plan
        env.reset(TASK, 0)
        for command in plan:
            assert command.text in env.admissible()
            env.step(command.text)
            errors += not command.expert
    assert errors > 12


def test_half_of_its_errors_say_again_what_was_said_and_the_rest_are_of_all_kinds() -> None:
    """Frequencies over hundreds of errors; going somewhere is most of what is valid."""
    env = make_env("alfworld")
    assert isinstance(env, Planner)
    again: list[bool] = []
    words: Counter[str] = Counter()
    valid: Counter[str] = Counter()
    for seed in range(200):
        variation = seed % 20
        plan = wandering_plan(env, TASK, variation, 0.3, 50, seed, valid_only=True) or ()
        env.reset(TASK, variation)
        given: set[str] = set()
        for command in plan:
            if not command.expert:
                due = (env.plan() or ("",))[0]
                possible = [c for c in env.admissible() if c != due]
                if given & set(possible):
                    again.append(command.text in given)
                else:
                    words[command.text.split()[0]] += 1
                    valid.update(c.split()[0] for c in possible)
            given.add(command.text)
            env.step(command.text)
    assert len(again) > 300
    # others may be commands that were given, too
    assert 0.45 < sum(again) / len(again) < 0.7
    assert words.total() > 30
    assert words["go"] / words.total() < 0.7 * valid["go"] / valid.total()


def test_without_noise_it_is_the_shortest_plan() -> None:
    env = make_env("alfworld")
    assert isinstance(env, Planner)
    plan = env.expert(TASK, 0)
    assert plan
    assert wandering_plan(env, TASK, 0, 0.0, LIMIT) == tuple(map(Command, plan))
    # no room for a detour: no error
    assert wandering_plan(env, TASK, 0, 1.0, len(plan)) == tuple(map(Command, plan))
    assert wandering_plan(env, TASK, 0, 0.0, len(plan) - 1) is None


def test_the_same_arguments_give_the_same_commands() -> None:
    env = make_env("alfworld")
    assert isinstance(env, Planner)
    first, again, other = (wandering_plan(env, TASK, 1, 0.5, LIMIT, seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("workers", [0, 1])
def test_transcripts_mark_the_errors(workers: int) -> None:
    refs = [TaskRef("alfworld", TASK, v) for v in range(4)]
    with EnvPool("alfworld", {}, workers=workers, sessions=4, timeout_s=30) as pool:
        found = play_experts(pool, refs, LIMIT, noise=0.5, seed=3)
        calm = play_experts(pool, refs, LIMIT, noise=0.0, seed=3)
    assert [t.ref for t in found] == refs
    assert all(t.moves[-1].after.success and len(t.moves) <= LIMIT for t in found)
    assert any(not move.command.expert for t in found for move in t.moves)
    assert all(move.command.expert for t in calm for move in t.moves)


def test_environments_that_cannot_plan_anew_say_so() -> None:
    with (
        EnvPool("rooms", {}, workers=0, sessions=1, timeout_s=30) as pool,
        pytest.raises(EnvError, match="cannot plan anew"),
    ):
        pool.wandering_experts([("fetch", 0)], noise=0.5, max_steps=9)
