"""The native engine against the real one, character by character.

Each game is walked on both engines; observation, admissible commands (with their order), score,
done and won must be equal after every command. A difference is shrunk to the shortest walk that
still shows it. `make differential` runs 300 games and 20 000 steps; without settings a small
sample is run. Needs the extra `alfworld`.

Environment variables:

    UNTWINE_DIFF_GAMES   games in all (default 6)
    UNTWINE_DIFF_STEPS   commands per game (default 25)
    UNTWINE_DIFF_FOLDER  a folder with game.tw-pddl files to play before games are made up
    UNTWINE_DIFF_SEED    other games and walks
    UNTWINE_STOCK_PLAIN  leave the real engine as slow as it is
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import alfworld_cases as cases
import pytest

from untwine.envs.alfworld.engine import Engine
from untwine.envs.alfworld.game_file import load_game

pytestmark = [pytest.mark.alfworld]

GAMES = int(os.environ.get("UNTWINE_DIFF_GAMES", "6"))
STEPS = int(os.environ.get("UNTWINE_DIFF_STEPS", "25"))
SEED = int(os.environ.get("UNTWINE_DIFF_SEED", "0"))
FOLDER = os.environ.get("UNTWINE_DIFF_FOLDER", "")
PLAIN = bool(os.environ.get("UNTWINE_STOCK_PLAIN"))
PROCESSES = int(os.environ.get("UNTWINE_DIFF_PROCESSES", "2"))


class Job(NamedTuple):
    path: str
    kind: str
    seed: int
    steps: int


class Found(NamedTuple):
    steps: int
    wins: int
    valid: int
    verbs: Counter[str]
    difference: str


def _stock(path: str) -> Any:
    from untwine.envs.alfworld.stock import StockEngine

    cache = _stock.__dict__
    if "engine" not in cache:
        if not PLAIN:
            import alfworld_stock_memo

            alfworld_stock_memo.install()
        cache["engine"] = StockEngine(path)
    else:
        cache["engine"].load(path)
    return cache["engine"]


def _differ(what: str, ours: Any, real: Any) -> str:
    if isinstance(ours, tuple) and isinstance(real, tuple) and ours != real:
        only = sorted(set(ours) - set(real)), sorted(set(real) - set(ours))
        return f"{what}: only native {only[0]}, only real {only[1]}"
    return "" if ours == real else f"{what}:\n  native {ours!r}\n  real   {real!r}"


def _compare(ours: Engine, real: Any, command: str | None) -> str:
    """Send a command (None: reset) to both; what differs, or an empty string."""
    a = ours.reset() if command is None else ours.step(command)
    b = real.reset() if command is None else real.step(command)
    return (
        _differ("text", a.text, b.text)
        or _differ("score", (a.score, a.won), (b.score, b.won))
        or _differ("admissible", ours.admissible(), real.admissible())
    )


def _replay(ours: Engine, real: Any, commands: list[str]) -> str:
    difference = _compare(ours, real, None)
    for command in commands:
        if difference:
            return difference
        difference = _compare(ours, real, command)
    return difference


def _shrunk(ours: Engine, real: Any, commands: list[str]) -> list[str]:
    """Leave out commands as long as the walk still ends in some difference."""
    size = max(1, len(commands) // 2)
    while True:
        for start in range(0, len(commands), size):
            shorter = commands[:start] + commands[start + size :]
            if shorter != commands and _replay(ours, real, shorter):
                commands = shorter
                break
        else:
            if size == 1:
                return commands
            size //= 2


def play(job: Job) -> Found:
    """One walk on both engines."""
    ours, real = Engine(load_game(job.path)), _stock(job.path)
    verbs: Counter[str] = Counter()
    difference = _compare(ours, real, None)
    done: list[str] = []
    wins = valid = 0
    for command in cases.walk(ours, job.kind, job.seed, job.steps):
        if difference:
            break
        before = ours.state
        difference = _compare(ours, real, command)
        done.append(command)
        wins += ours.won
        if ours.state is not before:
            valid += 1
            verbs[command.split()[0]] += 1
    if difference:
        walk = _shrunk(ours, real, done)
        difference = (
            f"{job.path} ({job.kind}, seed {job.seed}): after {walk!r}\n{_replay(ours, real, walk)}"
        )
    return Found(len(done), wins, valid, verbs, difference)


def _jobs(folder: Path) -> list[Job]:
    given = sorted(Path(FOLDER).rglob("game.tw-pddl")) if FOLDER else []
    types = cases.task_types()
    jobs = []
    for number in range(GAMES):
        task_type, seed = types[number % len(types)], SEED * 1_000_000 + number
        if number < len(given):
            path = given[number]
        elif number < len(given) + len(types):
            path = cases.write_fixture(folder / f"{number}", task_type)
        else:
            path = cases.write_game(folder / f"{number}", cases.scrambled(task_type, seed))
        kind = cases.KINDS[(number + number // len(types)) % len(cases.KINDS)]
        jobs.append(Job(str(path), kind, seed, STEPS))
    return jobs


def test_native_engine_says_what_the_real_engine_says(tmp_path: Path) -> None:
    pytest.importorskip("alfworld.agents", reason="needs the extra alfworld")
    pytest.importorskip("fast_downward", reason="needs the extra alfworld")
    jobs, started = _jobs(tmp_path), time.monotonic()
    total = Found(0, 0, 0, Counter(), "")
    context = multiprocessing.get_context("spawn")
    # A worker is replaced now and then, as the real engine keeps memory of every game.
    with context.Pool(PROCESSES, maxtasksperchild=25) as pool:
        for number, found in enumerate(pool.imap(play, jobs), 1):
            assert not found.difference, found.difference
            total = Found(
                total.steps + found.steps,
                total.wins + found.wins,
                total.valid + found.valid,
                total.verbs + found.verbs,
                "",
            )
            if number % 10 == 0:
                spent = time.monotonic() - started
                print(f"{number}/{len(jobs)} games, {total.steps} steps, {spent:.0f} s", flush=True)
    print(f"{len(jobs)} games, {total.steps} steps equal; {total}")
    assert total.steps == GAMES * STEPS
