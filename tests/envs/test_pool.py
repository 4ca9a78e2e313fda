"""The pool answers every request, and a worker that dies or hangs takes nothing else with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from untwine.envs import pool as pool_module
from untwine.envs import registry, worker
from untwine.envs.pool import (
    EnvPool,
    Lost,
    ReplayRequest,
    ResetRequest,
    RestoreRequest,
    Snapshot,
    SnapshotRequest,
    StepRequest,
)
from untwine.envs.protocol import Reset
from untwine.errors import EnvError
from untwine.records import Observation

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def _fake_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned workers get this process's module path, so they can import the fake family too."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    registry.register_family("fake", "untwine_fake_env:FAMILY")


def make_pool(
    workers: int, sessions: int = 2, timeout_s: float = 5.0, **options: object
) -> EnvPool:
    return EnvPool("fake", options, workers=workers, sessions=sessions, timeout_s=timeout_s)


def text_of(answer: object) -> str:
    assert isinstance(answer, Observation), answer
    return answer.text


def pid_of(answer: object) -> int:
    if isinstance(answer, Reset):
        answer = answer.observation
    return int(text_of(answer).split()[-1])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_gone(pid: int) -> bool:
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("workers", [0, 2])
def test_slots_are_independent_and_replies_keep_the_order(workers: int) -> None:
    with make_pool(workers) as pool:
        assert pool.slots == max(1, workers) * 2
        slots = list(range(pool.slots))[::-1]
        starts = pool.call({s: ResetRequest("count", 10 + s) for s in slots})
        assert list(starts) == slots
        pool.call({0: StepRequest("x")})
        answers = pool.call({s: StepRequest("x") for s in slots})
        assert list(answers) == slots
        words = {s: text_of(a).split()[:2] for s, a in answers.items()}
        assert words == {s: [f"count/{10 + s}", "2" if s == 0 else "1"] for s in slots}
        pids = {pid_of(a) for a in answers.values()}
        assert len(pids) == max(1, workers)
        assert (os.getpid() in pids) == (workers == 0)
        assert pool.restarts == 0


@pytest.mark.parametrize("command", ["die", "raise", "hang"])
def test_lost_worker_is_replaced_and_the_others_go_on(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "STARTUP_S", 30.0)
    with make_pool(2, timeout_s=1.0) as pool:
        starts = pool.call({s: ResetRequest("count", s) for s in range(4)})
        old = pid_of(starts[0])
        answers = pool.call({0: StepRequest(command), 2: StepRequest("x"), 3: StepRequest("x")})
        lost = answers[0]
        assert isinstance(lost, Lost)
        assert {"die": "exit code 7", "raise": "ConnectionError", "hang": "no answer for 1"}[
            command
        ] in lost.reason
        assert text_of(answers[2]).startswith("count/2 1")
        assert wait_gone(old)
        assert pool.restarts == 1
        # slot 1 was not in the message but went down too; slot 0 stays lost until it is reset
        again = pool.call({0: StepRequest("x"), 1: StepRequest("x"), 3: StepRequest("x")})
        assert isinstance(again[0], Lost)
        assert isinstance(again[1], Lost)
        assert text_of(again[3]).startswith("count/3 2")
        fresh = pool.call({1: ResetRequest("count", 8)})[1]
        assert isinstance(fresh, Reset)
        assert pid_of(fresh) != old
        assert text_of(pool.call({1: StepRequest("x")})[1]).startswith("count/8 1")
        assert pool.restarts == 1


def test_every_request_of_a_lost_message_is_lost() -> None:
    with make_pool(1, sessions=3) as pool:
        pool.call({s: ResetRequest("count", s) for s in range(3)})
        answers = pool.call({0: StepRequest("x"), 1: StepRequest("die"), 2: StepRequest("x")})
        assert all(isinstance(a, Lost) for a in answers.values())


def test_unexpected_error_in_this_process_loses_all_its_episodes() -> None:
    with make_pool(0, sessions=2) as pool:
        pool.call({0: ResetRequest("count", 0), 1: ResetRequest("count", 1)})
        lost = pool.call({0: StepRequest("raise")})[0]
        assert isinstance(lost, Lost)
        assert "ConnectionError: the other side has gone" in lost.reason
        assert isinstance(pool.call({1: StepRequest("x")})[1], Lost)
        assert isinstance(pool.call({1: ResetRequest("count", 1)})[1], Reset)
        assert text_of(pool.call({1: StepRequest("x")})[1]).startswith("count/1 1")
        assert pool.restarts == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_faults_of_the_user_are_raised_and_harm_nothing(workers: int) -> None:
    with make_pool(workers) as pool:
        pool.call({1: ResetRequest("count", 1)})
        with pytest.raises(EnvError, match=r"^unknown task 'cuont'$"):
            pool.call({0: ResetRequest("cuont", 0), 1: StepRequest("x")})
        assert text_of(pool.call({1: StepRequest("x")})[1]).startswith("count/1 2")
        assert pool.restarts == 0
    with make_pool(workers, bogus=1) as pool, pytest.raises(EnvError, match="'bogus'"):
        pool.call({0: ResetRequest("count", 0)})
    with pytest.raises(EnvError, match=r"fakee.*Did you mean 'fake'"):
        EnvPool("fakee", {}, workers=workers, sessions=1, timeout_s=1.0)


def test_answers_of_a_call_that_was_broken_off_are_dropped() -> None:
    """Two workers; the fault of the first raises while the experts of the second still answer."""
    with make_pool(2, sessions=1) as pool:
        for _ in range(3):
            with pytest.raises(EnvError, match="unknown task"):
                pool.experts([("unknown", 0), ("slow", 0)])
            assert pool.experts([("count", 2), ("count", 4)]) == [("count 2",), ("count 4",)]
            with pytest.raises(EnvError, match="unknown task"):
                pool.experts([("unknown", 0), ("slow", 0)])
            answers = pool.call({s: ResetRequest("count", 50 + s) for s in range(2)})
            assert [type(a) for a in answers.values()] == [Reset, Reset]
        assert pool.restarts == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_requests_are_answered_while_the_caller_does_other_things(workers: int) -> None:
    with make_pool(workers) as pool:
        slots = range(pool.slots)
        pool.send({s: ResetRequest("count", s) for s in slots if s % 2})
        pool.send({s: ResetRequest("count", s) for s in slots if not s % 2})
        evens = [s for s in slots if not s % 2]
        assert all(isinstance(a, Reset) for a in pool.receive(evens).values())
        pool.send({s: StepRequest("x") for s in evens})  # the odd ones still have answers waiting
        odd = pool.receive([s for s in slots if s % 2])
        assert [s for s, a in odd.items() if isinstance(a, Reset)] == [1, 3][: len(odd)]
        assert [text_of(a).split()[:2] for a in pool.receive(evens[::-1]).values()] == [
            [f"count/{s}", "1"] for s in evens[::-1]
        ]
        assert pool.receive([]) == {}
        with pytest.raises(ValueError, match="nothing was sent to slot 1"):
            pool.receive([1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_later_request_takes_the_place_of_an_earlier_one(workers: int) -> None:
    with make_pool(workers) as pool:
        pool.call({0: ResetRequest("count", 5)})
        pool.send({0: StepRequest("x")})
        pool.send({0: ResetRequest("count", 6)})
        start = pool.receive([0])[0]
        assert isinstance(start, Reset)
        assert start.observation.text.startswith("count/6 0")


def test_answers_that_wait_are_lost_with_their_worker() -> None:
    """Slot 0 has answered when slot 1 takes the worker down; nobody had taken the answer yet."""
    with make_pool(1) as pool:
        pool.call({s: ResetRequest("count", s) for s in range(2)})
        pool.send({0: ResetRequest("count", 7)})
        pool.send({1: StepRequest("die")})
        assert isinstance(pool.receive([1])[1], Lost)
        assert isinstance(pool.receive([0])[0], Lost)
        assert isinstance(pool.call({0: StepRequest("x")})[0], Lost)
        assert isinstance(pool.call({0: ResetRequest("count", 7)})[0], Reset)


@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_use_is_an_error_of_the_caller(workers: int) -> None:
    with make_pool(workers) as pool:
        with pytest.raises(ValueError, match="no slot 2"):
            pool.call({2: ResetRequest("count", 0)})
        with pytest.raises(ValueError, match="no episode"):
            pool.call({0: StepRequest("x")})


@pytest.mark.parametrize("workers", [0, 1])
def test_environment_that_never_starts_is_given_up(workers: int) -> None:
    with make_pool(workers, broken=True) as pool:
        for _ in range(pool_module.ATTEMPTS - 1):
            assert isinstance(pool.call({0: ResetRequest("count", 0)})[0], Lost)
        with pytest.raises(EnvError, match=r"3 times in a row .* no such machine"):
            pool.call({0: ResetRequest("count", 0)})


@pytest.mark.parametrize("workers", [0, 2])
def test_experts_come_in_order(workers: int) -> None:
    with make_pool(workers, sessions=1) as pool:
        refs = [("count", v) for v in range(7)]
        pool.call({0: ResetRequest("count", 99)})
        assert pool.experts(refs) == [None if v % 2 else (f"count {v}",) for _, v in refs]
        assert pool.experts([]) == []
        # the live episode is where it was
        assert text_of(pool.call({0: StepRequest("x")})[0]).startswith("count/99 1")


def test_experts_of_a_dead_worker_are_redone(tmp_path: Path) -> None:
    with make_pool(2, flag=str(tmp_path / "flag")) as pool:
        refs = [("count", 0), ("fragile", 2), ("count", 4)]
        assert pool.experts(refs) == [("count 0",), ("fragile 2",), ("count 4",)]
        assert pool.restarts == 1
        with pytest.raises(EnvError, match=r"fake/doomed/0 failed 3 times.*exit code 3"):
            pool.experts([("count", 0), ("doomed", 0)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_is_restored_in_any_slot(workers: int) -> None:
    """A snapshot crosses processes; later steps leave it as it is; replays lead to the same."""
    with EnvPool("rooms", {}, workers=workers, sessions=1, timeout_s=60.0) as pool:
        far = pool.slots - 1
        with pytest.raises(ValueError, match="no episode"):
            pool.call({0: SnapshotRequest()})
        pool.call({0: ResetRequest("fetch", 5)})
        before = pool.call({0: StepRequest("look")})[0]
        saved = pool.call({0: SnapshotRequest()})[0]
        assert isinstance(saved, Snapshot)
        commands = [f"go {way}" for way in ("north", "east", "south", "west")]
        answers = [pool.call({0: StepRequest(command)})[0] for command in commands]
        restored = pool.call({far: RestoreRequest(saved)})[far]
        assert isinstance(before, Observation)
        assert isinstance(restored, Observation)
        assert restored.state_key == before.state_key
        assert [pool.call({far: StepRequest(command)})[far] for command in commands] == answers
        replay = ReplayRequest("fetch", 5, ("look", *commands))
        assert pool.call({far: replay})[far] == answers[-1]


def test_a_lost_slot_is_taken_up_by_a_restored_state() -> None:
    with make_pool(0, sessions=2) as pool:
        pool.call({0: ResetRequest("count", 0), 1: ResetRequest("count", 1)})
        pool.call({0: StepRequest("raise")})
        assert isinstance(pool.call({1: StepRequest("x")})[1], Lost)
        replay = ReplayRequest("count", 4, ("x", "x"))
        assert text_of(pool.call({1: replay})[1]).startswith("count/4 2")
        assert text_of(pool.call({1: StepRequest("x")})[1]).startswith("count/4 3")
        with pytest.raises(EnvError, match="no snapshots"):
            pool.call({1: SnapshotRequest()})


def test_closing_twice_ends_the_workers() -> None:
    pool = make_pool(2, sessions=1)
    starts = pool.call({s: ResetRequest("count", s) for s in range(2)})
    pids = [pid_of(a) for a in starts.values()]
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.call({0: StepRequest("x")})
    with pytest.raises(ValueError, match="closed"):
        pool.experts([("count", 0)])
    assert all(wait_gone(pid) for pid in pids)


def test_workers_ignore_the_interrupt_key() -> None:
    with make_pool(1) as pool:
        pid = pid_of(pool.call({0: ResetRequest("count", 0)})[0])
        os.kill(pid, signal.SIGINT)
        assert pid_of(pool.call({0: StepRequest("x")})[0]) == pid


PARENT = """
import sys
from untwine.envs.pool import EnvPool, ResetRequest, StepRequest
from untwine.envs.registry import register_family
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    register_family("fake", "untwine_fake_env:FAMILY")
    pool = EnvPool("fake", {}, workers=1, sessions=1, timeout_s=1000.0)
    print(pool.call({0: ResetRequest("count", 0)})[0].observation.text, flush=True)
    pool.call({0: StepRequest("hang")})
"""


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script, HERE], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline().split()[-1])
        time.sleep(0.3)  # let the worker hang
        parent.kill()
    assert wait_gone(pid)
