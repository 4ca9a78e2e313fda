"""TextWorld with the real engine: games that are made here, won by their walkthroughs.

The reference for what a game says is the engine used directly, without this project.
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from untwine.envs.cache import default_cache
from untwine.envs.pool import EnvPool, ResetRequest, StepRequest
from untwine.envs.protocol import Catalogue, Env, Reset
from untwine.envs.registry import get_family, make_env
from untwine.envs.textworld import games
from untwine.envs.textworld.catalogue import BLOCKED, HELD_OUT_TASKS, TASKS, VARIATIONS
from untwine.envs.textworld.env import Snapshot, TextWorldEnv
from untwine.errors import EnvError
from untwine.records import Observation

textworld = pytest.importorskip("textworld", reason="needs the textworld extra")
pytestmark = [
    pytest.mark.textworld,
    pytest.mark.filterwarnings("ignore:Game .* is not fully supported"),  # jericho, of all games
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("games")


@pytest.fixture(scope="module")
def env(cache: Path) -> Iterator[TextWorldEnv]:
    made = get_family("textworld").make({"cache_dir": str(cache)})
    assert isinstance(made, TextWorldEnv)
    yield made
    made.close()


@pytest.fixture
def own(cache: Path, tmp_path: Path) -> Path:
    """A folder with one good game, `good.z8`."""
    path = games.cached_game("quest-3", 1, cache)
    shutil.copy(path, tmp_path / "good.z8")
    shutil.copy(path.with_suffix(".json"), tmp_path / "good.json")
    return tmp_path


def play_own(folder: Path) -> Reset:
    env = get_family("textworld").make({"games": str(folder)})
    try:
        return env.reset("files", 0)
    finally:
        env.close()


def test_family_keeps_the_protocol() -> None:
    family = get_family("textworld")
    assert isinstance(family.catalogue, Catalogue)
    assert isinstance(family.make({}), Env)
    assert set(HELD_OUT_TASKS) < set(family.catalogue.tasks())
    assert "files" not in family.catalogue.tasks()


@pytest.mark.parametrize("task", TASKS)
def test_the_walkthrough_wins_and_scores_only_rise(env: TextWorldEnv, task: str) -> None:
    for variation in (0, 1100):
        plan = env.expert(task, variation)
        assert plan is not None
        goal, observation = env.reset(task, variation)
        assert goal
        outcomes = [observation.outcome]
        for command in plan:
            assert not observation.done
            assert command in env.admissible()
            observation = env.step(command)
            assert observation.invalid is None
            outcomes.append(observation.outcome)
        assert (observation.done, observation.success, observation.outcome) == (True, True, 1.0)
        assert outcomes == sorted(outcomes)
        assert max(outcomes[:-1]) < 1.0
        assert env.admissible() == ()
        assert env.step("look").state_key == observation.state_key


def test_the_simple_game_scores_on_the_way(env: TextWorldEnv) -> None:
    plan = env.expert("simple", 0) or ()
    env.reset("simple", 0)
    seen = {env.step(command).outcome for command in plan}
    assert len(seen) > 2


def test_what_is_said_is_what_the_engine_says(env: TextWorldEnv, cache: Path) -> None:
    """Word for word the feedback, description and inventory of the engine used directly."""
    env.reset("simple", 2)
    path = games.cached_game("simple", 2, cache)
    wanted = textworld.EnvInfos(description=True, inventory=True, admissible_commands=True)
    direct = textworld.start(str(path), wanted)
    direct.reset()
    for command in ("open chest drawer", "inventory", "open antique trunk", "examine old key"):
        ours = " ".join(env.step(command).text.split())
        state, score, _ = direct.step(command)
        said = state["feedback"].partition("\n>")[0]
        for part in (said, state["description"], state["inventory"]):
            assert " ".join(part.split()) in ours, command
        assert ours.count("You are carrying") == 1
        assert env.admissible() == tuple(state["admissible_commands"])
        assert score == 0
    direct.close()


def test_losing_the_thing_needed_ends_the_game(env: TextWorldEnv) -> None:
    """Eating the food to be cooked fails the only quest: over, without success."""
    plan = env.expert("simple", 0) or ()
    env.reset("simple", 0)
    for command in plan[:-1]:
        observation = env.step(command)
        assert not observation.done
    food = plan[-1].removeprefix("put ").removesuffix(" on stove")
    last = env.step(f"eat {food}")
    assert (last.done, last.success) == (True, False)
    assert last.outcome < 1.0


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("", "unknown_command"),
        ("dance wildly", "unknown_command"),
        ("take", "ambiguous"),
        ("öffne die Kiste", "unknown_command"),
        ("look " * 40, "unknown_command"),
        ("look. look", "several_commands"),
        ("look then look", "several_commands"),
        ("yourself, quit", "several_commands"),
        *((blocked.upper(), "blocked") for blocked in BLOCKED),
    ],
)
def test_bad_commands_are_invalid_and_change_nothing(
    env: TextWorldEnv, command: str, reason: str
) -> None:
    start = env.reset("treasure-3", 0).observation
    after = env.step(command)
    assert after.invalid == reason
    assert (after.score, after.done) == (0.0, False)
    if reason == "ambiguous":  # the game waits for the answer to its question
        assert after.state_key != start.state_key
    assert reason == "ambiguous" or after.state_key == start.state_key
    assert env.step("look").state_key == start.state_key


def test_key_is_made_of_facts(env: TextWorldEnv) -> None:
    """Back where one was, all is as before, however the text puts it; elsewhere it is not."""
    plan = env.expert("treasure-3", 0) or ()
    away = plan[0]
    opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}
    back = f"go {opposite[away.removeprefix('go ')]}"
    start = env.reset("treasure-3", 0).observation
    there = env.step(away)
    assert there.state_key != start.state_key
    home = env.step(back)
    assert home.state_key == start.state_key
    listed = env.step("inventory")
    assert listed.text != start.text
    assert listed.state_key == start.state_key
    assert env.step("take me").state_key == start.state_key


def walk(env: Any, task: str, variation: int, seed: int, length: int = 12) -> list[Observation]:
    rng = random.Random(seed)
    seen = [env.reset(task, variation).observation]
    for _ in range(length):
        commands = (*env.admissible(), "dance", "take") if not seen[-1].done else ("look",)
        seen.append(env.step(rng.choice(commands)))
    return seen


def test_same_commands_same_observations(env: TextWorldEnv, cache: Path) -> None:
    twin = get_family("textworld").make({"cache_dir": str(cache)})
    for task in ("simple", "quest-5"):
        first = walk(env, task, 0, seed=4)
        assert walk(env, task, 0, seed=4) == first  # the same engine again
        assert walk(twin, task, 0, seed=4) == first
    twin.close()


def test_two_live_games_do_not_disturb_each_other(env: TextWorldEnv, cache: Path) -> None:
    alone = [walk(env, task, 0, seed=1) for task in ("simple", "treasure-3")]
    twins = [get_family("textworld").make({"cache_dir": str(cache)}) for _ in range(2)]
    plans = [[random.Random(1), []] for _ in range(2)]
    for i, task in enumerate(("simple", "treasure-3")):
        plans[i][1].append(twins[i].reset(task, 0).observation)
    for _ in range(12):
        for i in range(2):
            rng, seen = plans[i]
            done = seen[-1].done
            commands = ("look",) if done else (*twins[i].admissible(), "dance", "take")
            seen.append(twins[i].step(rng.choice(commands)))
    assert [seen for _, seen in plans] == alone
    for twin in twins:
        twin.close()


def test_restore_continues_as_if_nothing_happened(env: TextWorldEnv, cache: Path) -> None:
    walk(env, "simple", 0, seed=7, length=6)
    snapshot = pickle.loads(pickle.dumps(env.snapshot()))
    commands = ["look", "open antique trunk", "open chest drawer", "inventory"]
    expected = [env.step(command) for command in commands]
    twin = get_family("textworld").make({"cache_dir": str(cache)})
    for each in (env, twin):
        each.restore(snapshot)
        assert [each.step(command) for command in commands] == expected
    twin.close()
    with pytest.raises(EnvError, match="was changed since"):
        env.restore(Snapshot("simple", 0, (), "0" * 32))


def test_a_game_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = games.cached_game("treasure-3", 5, tmp_path)
    assert path == tmp_path / f"textworld-{textworld.__version__}" / "treasure-3" / "5.z8"
    assert sorted(p.name for p in path.parent.iterdir()) == ["5.json", "5.z8"]
    story = path.read_bytes()
    again = tmp_path / "again.z8"
    games.make_game("treasure-3", 5, again)
    assert again.read_bytes() == story  # the generator repeats itself exactly

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(games, "make_game", fail)
    assert games.cached_game("treasure-3", 5, tmp_path) == path
    with pytest.raises(EnvError, match=r"cannot make a TextWorld game in .*No space left"):
        games.cached_game("treasure-3", 6, tmp_path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["5.json", "5.z8"]


def test_games_of_a_folder_of_your_own(own: Path) -> None:
    env = get_family("textworld").make({"games": str(own)})
    plan = env.expert("files", 0)
    assert plan is not None
    env.reset("files", 0)
    assert [env.step(command) for command in plan][-1].success
    with pytest.raises(EnvError, match="has 1 game files, so there is no 1th"):
        env.reset("files", 1)
    env.close()
    with pytest.raises(EnvError, match="needs the option games"):
        make_env("textworld").reset("files", 0)
    with pytest.raises(EnvError, match="there is no folder"):
        make_env("textworld", {"games": str(own / "nowhere")}).reset("files", 0)


def test_a_walkthrough_that_does_not_win_is_no_expert(own: Path) -> None:
    path = own / "good.json"
    tree = json.loads(path.read_text())
    for walkthrough in (["look"], ["dance"], []):
        tree["metadata"]["walkthrough"] = walkthrough
        path.write_text(json.dumps(tree))
        env = get_family("textworld").make({"games": str(own)})
        assert env.expert("files", 0) is None
        env.close()


def test_a_game_whose_names_its_own_walkthrough_cannot_tell_apart(env: TextWorldEnv) -> None:
    """`take American passkey from box`: the American box or the box? The game asks, nobody wins."""
    assert env.expert("quest-5", 1150) is None
    env.reset("quest-5", 1150)
    for command in ("take passkey from bar", "unlock box with passkey", "open box"):
        assert env.step(command).invalid is None
    asked = env.step("take American passkey from box")
    assert asked.invalid == "ambiguous"
    assert asked.text.startswith("Which do you mean, the American box or the box?")
    assert env.step("the box").invalid == "ambiguous"  # no words name the plain box alone


@pytest.mark.parametrize("keep", [0, 10, 64, 1000, 200_000])
def test_truncated_game_files_are_refused(own: Path, keep: int) -> None:
    path = own / "good.z8"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(EnvError, match=r"good\.z8 .*(truncated|no \.z8 game file)"):
        play_own(own)


def test_damaged_and_foreign_game_files_are_refused(own: Path) -> None:
    path = own / "good.z8"
    story = bytearray(path.read_bytes())
    story[5000] ^= 1
    path.write_bytes(story)
    with pytest.raises(EnvError, match=r"good\.z8 is damaged"):
        play_own(own)
    path.write_bytes(b"\x7fELF" + bytes(5000))
    with pytest.raises(EnvError, match=r"good\.z8 is no \.z8 game file"):
        play_own(own)
    path.rename(own / "good.ulx")
    with pytest.raises(EnvError, match="Glulx"):
        play_own(own)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no .*json beside it"),
        ("{", "not well formed"),
        ("[1, 2]", "is no TextWorld game"),
        ("7", "not well formed"),
        ('{"KB": 1}', "lacks grammar, infos, quests, world"),
        ('{"KB": {}, "world": [], "quests": [], "infos": [], "grammar": {}}', "no TextWorld game"),
        ("[" * 100_000, "not well formed"),
        ("\ud800".encode("utf-16", "surrogatepass"), "not well formed"),
    ],
)
def test_bad_json_beside_a_game_is_refused(
    own: Path, content: str | bytes | None, message: str
) -> None:
    path = own / "good.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EnvError, match=message):
        play_own(own)


def test_huge_json_is_refused_before_it_is_read(own: Path) -> None:
    with (own / "good.json").open("r+b") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(EnvError, match="larger than 16 MiB"):
        play_own(own)


def test_without_the_package_the_tasks_are_known_and_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "textworld", None)
    family = get_family("textworld")
    assert len(family.catalogue.variations("simple", "test")) == 100
    with pytest.raises(EnvError, match=r"pip install .*'\.\[textworld\]'"):
        family.make({"cache_dir": str(tmp_path)}).reset("simple", 0)


def test_wrong_instances_options_and_use(
    env: TextWorldEnv, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(EnvError, match="Did you mean 'simple'"):
        env.reset("simpel", 0)
    for variation in (-1, VARIATIONS):
        with pytest.raises(EnvError, match="variations 0 to 1199"):
            env.reset("simple", variation)
    with pytest.raises(EnvError, match="observe"):
        make_env("textworld", {"observe": "everything"})
    fresh = get_family("textworld").make({})
    with pytest.raises(EnvError, match="reset"):
        fresh.step("look")
    fresh.close()
    fresh.close()
    monkeypatch.setenv("UNTWINE_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    (tmp_path / f"textworld-{textworld.__version__}").write_text("in the way")
    with pytest.raises(EnvError, match="cannot make a TextWorld game"):
        get_family("textworld").make({}).reset("simple", 0)


def test_spawned_workers_say_what_this_process_says(env: TextWorldEnv, cache: Path) -> None:
    """Both workers begin by making the same game, at the same time."""
    options = {"cache_dir": str(cache)}
    with EnvPool("textworld", options, workers=2, sessions=1, timeout_s=60.0) as pool:
        starts = pool.call({slot: ResetRequest("treasure-7", 77) for slot in range(2)})
        plan = env.expert("treasure-7", 77)
        expected = env.reset("treasure-7", 77)
        assert list(starts.values()) == [expected, expected]
        for command in plan or ():
            observation = env.step(command)
            answers = pool.call({slot: StepRequest(command) for slot in range(2)})
            assert list(answers.values()) == [observation, observation]
        assert observation.success
        assert pool.experts([("treasure-7", 77)]) == [plan]
