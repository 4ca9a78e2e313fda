"""The expert that knows what it has read."""

from __future__ import annotations

import random
import re

import pytest

from untwine.config import PromptConfig
from untwine.demonstrations import demonstration, play_experts
from untwine.envs.alfworld.searching import in_order, search
from untwine.envs.pool import EnvPool
from untwine.envs.protocol import Planner, Searcher
from untwine.envs.registry import make_env
from untwine.envs.wandering import wandering_plan
from untwine.errors import EnvError
from untwine.policy.choices import CommandChoices, allowed_along
from untwine.policy.loading import Policy
from untwine.prompting.prompter import Prompter
from untwine.records import TaskRef

VALID = ("go to bed 1", "go to desk 1", "go to desk 10", "look", "open drawer 2")
TASK = "look_at_obj_in_light"


def test_it_follows_the_plan_once_the_thing_was_mentioned() -> None:
    plan = ("go to desk 1", "take book 1 from desk 1", "use desklamp 1")
    rng = random.Random(0)
    assert search(plan, VALID, ["You see a book 1."], [], rng) == ("go to desk 1", False)
    # book 10 is another book, and a closed drawer is looked into first
    assert search(plan, VALID, ["You see a book 10."], [], rng) == ("open drawer 2", True)
    assert search(plan, VALID, ["a book 10"], ["open drawer 2"], rng).command.startswith("go to ")
    said = ["open drawer 2", "go to bed 1", "go to desk 10"]
    assert search(plan, VALID, [], said, rng) == ("go to desk 1", True)
    # nothing is new: the plan after all
    assert search(plan, VALID, [], VALID, rng) == ("go to desk 1", False)
    # nothing is to be taken or used any more
    carried = ("go to bed 1", "move book 1 to bed 1")
    assert search(carried, VALID, [], [], rng) == ("go to bed 1", False)


def test_in_order_the_next_place_comes_after_the_last_one() -> None:
    plan = ("go to desk 1", "take book 1 from desk 1")
    valid = ("go to bed 1", "go to desk 1", "go to desk 2", "go to desk 10", "go to tv stand 1")
    said: list[str] = []
    for place in ("bed 1", "desk 10", "desk 2", "desk 1", "tv stand 1"):
        due = in_order(plan, valid, [], said)
        assert due == (f"go to {place}", True)
        said += [due.command, "look"]
    # from anywhere: the next one, and after the last one the first, seen or not
    assert in_order(plan, valid, [], said) == ("go to bed 1", True)
    assert in_order(plan, valid, [], ["go to desk 2", "go to desk 10"]) == ("go to desk 2", True)
    # what was read of is not looked for
    assert in_order(plan, valid, ["a book 1"], []) == ("go to desk 1", False)


def test_in_order_places_are_opened_and_those_beside_are_looked_into() -> None:
    """At drawer 2, drawer 1 cannot be gone to; what is carried is no place."""
    plan = ("go to desk 1", "take book 1 from desk 1")
    here = ("examine drawer 2", "examine drawer 1", "examine lamp 1", "go to bed 1", "go to sofa 1")
    shut = ("open drawer 2", "open drawer 1", *here)
    assert in_order(plan, shut, [], ["go to drawer 2"]) == ("open drawer 2", True)
    said = ["go to drawer 2", "open drawer 2"]
    beside = ("close drawer 2", "open drawer 1", *here)
    assert in_order(plan, beside, [], said) == ("open drawer 1", True)
    seen = ("close drawer 2", "close drawer 1", *here)
    assert in_order(plan, seen, [], said) == ("examine drawer 1", True)
    for last in ("open drawer 1", "examine drawer 1"):
        assert in_order(plan, seen, [], [*said, last]) == ("go to sofa 1", True)
    assert in_order(plan, seen, [], ["go to sofa 1"]) == ("go to bed 1", True)


def test_in_order_places_are_not_looked_into_twice_as_long_as_it_remembers() -> None:
    plan = ("go to desk 1", "take book 1 from desk 1")
    valid = ("go to bed 1", "go to drawer 2", "go to drawer 1", "go to sofa 1")
    said = ["go to drawer 2", "open drawer 2", "go to drawer 1", "go to bed 1"]
    read = [
        "You are in the middle of a room.",
        "The drawer 2 is closed.",
        "You open the drawer 2. In it, you see nothing.",
        "The drawer 1 is closed.",
        "On the bed 1, you see nothing.",
    ]
    # it has opened drawer 2, but not drawer 1
    assert in_order(plan, valid, read, said) == ("go to drawer 1", True)
    # of the last three observations, the first answers what it no longer knows
    assert in_order(plan, valid, read[-3:], said) == ("go to drawer 2", True)
    # when it has looked everywhere it goes round again
    read += ["On the sofa 1, you see nothing.", "In the drawer 1, you see nothing."]
    said += ["go to sofa 1", "open drawer 1"]
    there = ("go to bed 1", "go to drawer 2", "close drawer 1", "examine drawer 1", "go to sofa 1")
    assert in_order(plan, there, read, said) == ("go to sofa 1", True)


def test_in_order_things_go_to_the_first_place_that_is_as_good() -> None:
    valid = ("go to drawer 2", "go to drawer 10", "go to bed 1", "examine book 1")
    plan = ("go to drawer 2", "open drawer 2", "move book 1 to drawer 2")
    assert in_order(plan, valid, [], []) == ("go to drawer 10", False)
    for earlier in ("take book 1 from bed 1", "heat book 1 with microwave 1"):
        fetching = ("go to bed 1", earlier, *plan)
        assert in_order(fetching, valid, ["a book 1"], []) == ("go to bed 1", False)
    here = ("open drawer 2", "move book 1 to drawer 2")
    assert in_order(here, ("open drawer 2", *valid), [], []) == ("open drawer 2", False)


@pytest.mark.parametrize("memory", [0, 3])
def test_the_systematic_expert_needs_no_luck(memory: int) -> None:
    """Where it looks follows from the last place and the list in the first observation, by a policy
    written anew here; and seeds do not matter."""
    refs = [TaskRef("alfworld", TASK, variation) for variation in range(12)]
    with EnvPool("alfworld", {"list_commands": True}, workers=0, sessions=4, timeout_s=60) as pool:
        found = play_experts(pool, refs, 50, seed=1, expert="systematic", memory=memory)
        other = play_experts(pool, refs, 50, seed=2, expert="systematic", memory=memory)
    assert found == other
    looked = beside = 0
    named = re.compile(r"\ban? (\w+) (\d+)")
    for transcript in found:
        places = named.findall(transcript.moves[0].before.text)
        here = -1
        for move in transcript.moves:
            assert not move.command.chance
            *verb, kind, number = move.command.text.split()
            if verb not in (["go", "to"], ["open"], ["examine"]):
                continue
            now = places.index((kind, number))
            if move.command.looks and (verb != ["open"] or now != here):
                assert now == (here + 1) % len(places)
                looked += 1
                beside += verb != ["go", "to"]
            here = now
    assert len(found) >= 10
    assert looked > 40
    assert beside


def test_a_short_memory_forgets_what_it_has_read() -> None:
    """With one observation it uses nothing that it does not see; with all it goes back to it."""
    env = make_env("alfworld")
    assert isinstance(env, Planner)
    different = 0
    for variation in range(12):
        whole, short = (
            wandering_plan(env, TASK, variation, 0.0, 50, expert="systematic", memory=memory)
            for memory in (0, 1)
        )
        last = env.reset(TASK, variation).observation.text
        for command in short or ():
            words = command.text.split()
            if words[0] in ("take", "use"):
                assert f"{words[1]} {words[2]}" in last
            last = env.step(command.text).text
        different += whole != short
    assert different


def test_it_takes_and_uses_only_what_it_has_read_of() -> None:
    env = make_env("alfworld")
    assert isinstance(env, Searcher)
    solved = longer = 0
    for variation in range(12):
        plan = wandering_plan(env, TASK, variation, 0.0, 30, expert="search")
        if plan is None:
            continue
        solved += 1
        shortest = env.expert(TASK, variation)
        assert shortest
        assert len(plan) >= len(shortest)
        longer += len(plan) > len(shortest)
        read = [env.reset(TASK, variation).observation.text]
        for command in plan:
            assert command.expert
            words = command.text.split()
            if words[0] in ("take", "use"):
                assert any(f"{words[1]} {words[2]}" in text for text in read)
            last = env.step(command.text)
            read.append(last.text)
        assert last.success
    assert solved >= 8
    assert longer >= 4


def test_through_the_pool_with_listed_commands() -> None:
    refs = [TaskRef("alfworld", TASK, variation) for variation in range(6)]
    with EnvPool("alfworld", {"list_commands": True}, workers=0, sessions=4, timeout_s=60) as pool:
        found = play_experts(pool, refs, 30, seed=1, expert="search")
        again = play_experts(pool, refs, 30, seed=1, expert="search")
        other = play_experts(pool, refs, 30, seed=2, expert="search")
    assert found == again
    assert found != other
    assert all(move.command.expert for transcript in found for move in transcript.moves)


def test_other_environments_say_that_they_have_none() -> None:
    with (
        EnvPool("rooms", {}, workers=0, sessions=2, timeout_s=60) as pool,
        pytest.raises(EnvError, match="no expert that searches"),
    ):
        play_experts(pool, [TaskRef("rooms", "fetch", 0)], 9, expert="search")


@pytest.mark.parametrize(
    ("layout", "tried"), [("window", False), ("window", True), ("append", False)]
)
def test_luck_is_not_imitated(policy: Policy, layout: str, tried: bool) -> None:
    """Where a command looks somewhere at random, no other place is trained against, but those where
    it has been, when the prompt says so."""
    refs = [TaskRef("alfworld", TASK, variation) for variation in range(4)]
    with EnvPool("alfworld", {"list_commands": True}, workers=0, sessions=4, timeout_s=60) as pool:
        found = play_experts(pool, refs, 30, seed=1, expert="search")
    config = PromptConfig.model_validate({"layout": layout, "tried": tried, "history": 2})
    prompter = Prompter(policy.chat, config)
    choices = CommandChoices(policy.chat.reply_ids)
    ids_of = policy.chat.reply_ids
    lucky = planned = against = 0
    for transcript in found:
        given: list[str] = []
        steps = demonstration(transcript, prompter, choices=choices).steps
        for move, step in zip(transcript.moves, steps, strict=True):
            admissible, command = move.before.admissible, move.command
            assert admissible
            among = allowed_along(choices.trie(admissible), step.action_ids)
            assert among
            assert step.allowed
            if command.chance:
                word = command.text.split()[0]
                assert word in ("go", "open")
                known = given if tried or layout == "append" else []
                equals = [c for c in admissible if c.split()[0] == word and c not in known]
                for i, (all_ids, kept, token) in enumerate(
                    zip(among, step.allowed, step.action_ids, strict=True)
                ):
                    path = step.action_ids[:i]
                    spared = {ids_of(c)[i] for c in equals if ids_of(c)[:i] == path}
                    assert set(kept) == (set(all_ids) - spared) | {token}
                    against += i > 0 and len(kept) > 1
            else:
                assert step.allowed == among
            lucky += command.chance
            planned += not command.chance
            given.append(command.text)
    assert lucky > 4
    assert planned > 4
    assert (against > 4) == (tried or layout == "append")
