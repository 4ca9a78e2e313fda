"""The built-in house: honest answers, exact repeats, and an expert that is truly shortest.

The brute-force tests know nothing of `rooms.effects`: they send every command that the grammar
allows through `step` and look at what comes back.
"""

from __future__ import annotations

import itertools
import pickle
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from untwine.envs import rooms
from untwine.envs.protocol import Catalogue, Env
from untwine.envs.registry import get_family, make_env
from untwine.errors import EnvError
from untwine.records import Observation

VOCABULARY = (
    *(f"go {d}" for d in rooms.STEPS),
    *(f"open {d} door" for d in rooms.STEPS),
    *(f"{verb} {thing}" for verb in ("take", "drop") for thing in rooms.OBJECTS + rooms.KEYS),
    *(f"open {chest}" for chest in rooms.CHESTS),
    "look",
)

instances = st.tuples(st.sampled_from(rooms.TASKS), st.integers(0, rooms.VARIATIONS - 1))


def env_with(**options: Any) -> rooms.RoomsEnv:
    env = make_env("rooms", options)
    assert isinstance(env, rooms.RoomsEnv)
    return env


def random_walk(
    env: rooms.RoomsEnv, task: str, variation: int, seed: int, length: int = 40
) -> Iterator[tuple[str, Observation]]:
    """Mostly admissible commands, some of any kind."""
    rng = random.Random(seed)
    observation = env.reset(task, variation).observation
    yield "", observation
    for _ in range(length):
        choices = observation.admissible if rng.random() < 0.8 else VOCABULARY
        command = rng.choice(choices or VOCABULARY)
        observation = env.step(command)
        yield command, observation


def test_family_keeps_the_protocol() -> None:
    family = get_family("rooms")
    assert isinstance(family.catalogue, Catalogue)
    assert isinstance(family.make({}), Env)
    assert family.catalogue.info.name == "rooms"


@pytest.mark.parametrize("task", rooms.TASKS)
def test_splits_are_disjoint_cover_everything_and_are_large_enough(task: str) -> None:
    catalogue = get_family("rooms").catalogue
    parts = {split: catalogue.variations(task, split) for split in rooms.SPLIT_RANGES}
    assert sorted(itertools.chain(*parts.values())) == list(catalogue.variations(task))
    assert len(parts["train"]) >= 200
    assert min(len(parts["dev"]), len(parts["test"])) >= 50


@pytest.mark.parametrize("task", rooms.TASKS)
def test_no_two_variations_are_the_same_house(task: str) -> None:
    houses = [rooms.draw_house(task, v, 0, 2) for v in range(rooms.VARIATIONS)]
    assert len({repr(h) for h in houses}) == len(houses)


@pytest.mark.parametrize("task", rooms.TASKS)
def test_test_houses_share_no_room_with_the_others_and_have_a_loop(task: str) -> None:
    for variation in range(rooms.VARIATIONS):
        house = rooms.draw_house(task, variation, 0, 2)
        passages = sum(len(exits) for exits in house.exits) // 2
        if variation in rooms.SPLIT_RANGES["test"]:
            assert set(house.rooms) <= set(rooms.TEST_ROOM_NAMES)
            assert passages == len(house.rooms)
        else:
            assert set(house.rooms) <= set(rooms.ROOM_NAMES)
            assert passages == len(house.rooms) - 1
    assert not set(rooms.ROOM_NAMES) & set(rooms.TEST_ROOM_NAMES)


@pytest.mark.parametrize("task", rooms.TASKS)
def test_expert_solves_every_variation_and_scores_only_at_the_end(task: str) -> None:
    env = env_with()
    for variation in range(rooms.VARIATIONS):
        plan = env.expert(task, variation)
        observation = env.reset(task, variation).observation
        for command in plan:
            assert not observation.done
            assert command in (observation.admissible or ())
            observation = env.step(command)
        assert observation.success
        assert observation.done
        assert observation.score == 100.0
        assert observation.outcome == 1.0
        assert env.admissible() == ()


def brute_force_length(env: rooms.RoomsEnv) -> int:
    """Fewest steps to success from here, trying every command of the vocabulary."""
    start = env.snapshot()
    seen = {env.restore(start).state_key}
    queue = deque([(start, 0)])
    while queue:
        snapshot, depth = queue.popleft()
        for command in VOCABULARY:
            env.restore(snapshot)
            observation = env.step(command)
            if observation.success:
                return depth + 1
            if observation.state_key not in seen:
                seen.add(observation.state_key)
                queue.append((env.snapshot(), depth + 1))
    raise AssertionError("no solution")


@pytest.mark.parametrize("task", rooms.TASKS)
@pytest.mark.parametrize("variation", [0, 1, 1000, 1100])
def test_expert_is_shortest(task: str, variation: int) -> None:
    env = env_with(rooms=4, distractors=int(task == "fetch"))
    plan = env.expert(task, variation)
    env.reset(task, variation)
    assert brute_force_length(env) == len(plan)


@settings(max_examples=25, deadline=None)
@given(instances, st.integers(0, 2**16))
def test_same_commands_give_the_same_observations(instance: tuple[str, int], seed: int) -> None:
    first = list(random_walk(env_with(), *instance, seed))
    assert first == list(random_walk(env_with(), *instance, seed))


@settings(max_examples=25, deadline=None)
@given(instances, st.integers(0, 2**16))
def test_global_random_state_is_left_alone(instance: tuple[str, int], seed: int) -> None:
    random.seed(seed)
    before = random.getstate()
    env = env_with()
    env.reset(*instance)
    env.expert(*instance)
    env.step("look")
    assert random.getstate() == before


@settings(max_examples=25, deadline=None)
@given(instances, st.integers(0, 2**16))
def test_restore_continues_as_if_nothing_happened(instance: tuple[str, int], seed: int) -> None:
    env, other = env_with(), env_with(rooms=5)
    rng = random.Random(seed)
    for _ in random_walk(env, *instance, seed, length=10):
        pass
    snapshot = env.snapshot()
    here = env.step("look")
    commands = [rng.choice(VOCABULARY) for _ in range(10)] + ["go north", "go east", "go south"]
    expected = [env.step(command) for command in commands]
    for twin in (env, other):
        assert twin.restore(pickle.loads(pickle.dumps(snapshot))).state_key == here.state_key
        assert [twin.step(command) for command in commands] == expected


@settings(max_examples=15, deadline=None)
@given(instances, st.integers(0, 2**16))
def test_admissible_is_exactly_what_changes_something(instance: tuple[str, int], seed: int) -> None:
    env = env_with()
    for _, observation in random_walk(env, *instance, seed, length=15):
        snapshot = env.snapshot()
        changing = set()
        for command in VOCABULARY:
            env.restore(snapshot)
            after = env.step(command)
            assert after.invalid is None
            if after.state_key != observation.state_key:
                changing.add(command)
        env.restore(snapshot)
        assert env.admissible() == observation.admissible
        assert set(env.admissible()) == (set() if observation.done else changing | {"look"})


@settings(max_examples=25, deadline=None)
@given(instances, st.integers(0, 2**16))
def test_keys_are_equal_exactly_when_states_are(instance: tuple[str, int], seed: int) -> None:
    env = env_with()
    state_of_key: dict[str, object] = {}
    key_of_state: dict[object, str] = {}
    for _, observation in random_walk(env, *instance, seed, length=60):
        _, state = env.snapshot()
        assert state_of_key.setdefault(observation.state_key, state) == state
        assert key_of_state.setdefault(state, observation.state_key) == observation.state_key


def test_only_the_present_room_is_seen() -> None:
    env = env_with()
    for task, variation in itertools.product(rooms.TASKS, range(0, rooms.VARIATIONS, 29)):
        for _, observation in random_walk(env, task, variation, seed=variation, length=15):
            house, state = env.snapshot()
            for name in house.rooms:
                assert (name in observation.text) == (name == house.rooms[state.room])
            for thing, place in zip(house.things, state.places, strict=True):
                if place not in (state.room, rooms.CARRIED):
                    assert thing not in observation.text.split("You are in the")[1]


@pytest.mark.parametrize(
    "command", ["", "dance", "go up", "take", "take unicorn", "open door", "x" * 9999]
)
def test_unknown_commands_are_invalid_and_change_nothing(command: str) -> None:
    env = env_with()
    before = env.reset("fetch", 0).observation
    after = env.step(command)
    assert after.invalid == "unknown_command"
    assert after.state_key == before.state_key
    assert "understand" in after.text


def test_refusals_say_why() -> None:
    """Each sentence is provoked in a house made for it."""
    house = rooms.House(
        goal="open the red chest",
        rooms=("hall", "study"),
        exits=({"north": rooms.Exit(1, 0)}, {"south": rooms.Exit(0, 0)}),
        things=("red key", "cup", "hat"),
        chests=(("red chest", 0),),
        wanted={0: rooms.CARRIED},
        chest=0,
        start=rooms.State(0, (0, 0, 0), (False,), (False,)),
    )
    env = env_with()
    start = (house, house.start)

    def say(*commands: str) -> str:
        env.restore(start)
        for command in commands[:-1]:
            env.step(command)
        before = env.snapshot()
        observation = env.step(commands[-1])
        assert observation.invalid is None
        assert env.snapshot() == before
        return observation.text.split(". You are in")[0]

    assert say("go north") == "The north door is closed"
    assert say("go east") == "You can't go that way"
    assert say("open east door") == "There is no door to the east"
    assert say("open north door", "open north door") == "The north door is already open"
    assert say("open red chest") == "The red chest is locked and you do not carry the red key"
    assert say("open blue chest") == "There is no blue chest here"
    assert say("take apple") == "There is no apple here"
    assert say("drop cup") == "You are not carrying the cup"
    assert say("take cup", "take cup") == "You are already carrying the cup"
    assert say("take cup", "take hat", "take red key") == "Your hands are full"
    assert say("take red key", "open red chest", "look") == "The task is already done"


def test_scores_follow_the_state() -> None:
    env, strict = env_with(), env_with(partial_scores=False)
    for task, holding in (("fetch", 30.0), ("unlock", 30.0), ("tidy", 15.0)):
        plan = env.expert(task, 4)
        take = next(i for i, command in enumerate(plan) if command.startswith("take"))
        env.reset(task, 4)
        strict.reset(task, 4)
        for command in plan[: take + 1]:
            assert env.step("look").score == 0.0
            score, strict_score = env.step(command).score, strict.step(command).score
        assert (score, strict_score) == (holding, 0.0)
        assert env.step(plan[take].replace("take", "drop")).score == 0.0
        for command in plan[take + 1 :]:
            final = strict.step(command)
        assert final.score == 100.0


def test_commands_are_read_without_regard_to_case_and_spaces() -> None:
    env = env_with()
    command = env.reset("fetch", 0).observation.admissible[0]  # type: ignore[index]
    snapshot = env.snapshot()
    expected = env.step(command)
    env.restore(snapshot)
    assert env.step(f"  {command.upper().replace(' ', '   ')} ") == expected


@pytest.mark.parametrize("count", [4, 9])
def test_option_rooms_sets_the_size(count: int) -> None:
    env = env_with(rooms=count)
    for variation in (0, rooms.VARIATIONS - 1):
        env.reset("fetch", variation)
        assert len(env.snapshot()[0].rooms) == count


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rooms": 3}, "rooms"),
        ({"rooms": "many"}, "rooms"),
        ({"distractors": 99}, "distractors"),
        ({"partial_scores": 1}, "partial_scores"),
        ({"room": 5}, "Did you mean 'rooms'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(EnvError, match=word):
        make_env("rooms", options)


def test_unknown_task_and_variation_out_of_range() -> None:
    env = env_with()
    with pytest.raises(EnvError, match="Did you mean 'fetch'"):
        env.reset("fetsch", 0)
    for variation in (-1, rooms.VARIATIONS):
        with pytest.raises(EnvError, match="variation"):
            env.reset("fetch", variation)
        with pytest.raises(EnvError, match="variation"):
            env.expert("fetch", variation)
    with pytest.raises(EnvError, match="no task"):
        get_family("rooms").catalogue.variations("cook")


def test_use_before_reset_and_closing_twice() -> None:
    env = env_with()
    with pytest.raises(EnvError, match="reset"):
        env.step("look")
    env.reset("fetch", 0)
    env.close()
    env.close()
    with pytest.raises(EnvError, match="reset"):
        env.admissible()
