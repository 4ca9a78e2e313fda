"""The native ALFWorld engine against the real one: same games, same commands, alternating.

    python benchmarks/alfworld_engine.py [--games 6] [--steps 12] [--repeats 3]

Needs the extra `alfworld`. Prints a table in Markdown. Each time is the median over games and
repetitions; in each repetition one engine comes after the other, first the one, then the other.
Commands of a game are its shortest plan, then random admissible ones. The real engine makes its
list of commands in every step; ours only when asked, so `step` is given without and with it.

Episodes (reset, then the shortest plan, the lists of commands included) are counted over N live
environments of one process, stepped in turn. The memory of the real engine is the growth of the
resident set per live environment. All of it takes some minutes; `--stock-environments 1` leaves out
most of that.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arms.machine import heading

from untwine.envs.alfworld.engine import Engine
from untwine.envs.alfworld.game import Game
from untwine.envs.alfworld.game_file import load_game
from untwine.envs.alfworld.oracle import shortest_plan
from untwine.envs.alfworld.stock import StockEngine

FIXTURES = Path(__file__).parents[1] / "tests" / "envs" / "alfworld" / "data" / "games.json"
ENVIRONMENTS = (1, 16, 256)
Times = dict[str, dict[str, list[float]]]


def write_games(folder: Path, count: int) -> list[Path]:
    """The games of the tests, one of each task type."""
    tree = json.loads(FIXTURES.read_text(encoding="utf-8"))
    paths = []
    for name, entry in list(tree["games"].items())[-count:]:
        path = folder / name / "game.tw-pddl"
        path.parent.mkdir()
        game = {
            "pddl_domain": tree["pddl_domain"],
            "grammar": tree["grammar"].replace("UNKNOWN GOAL", entry["task"]),
            "pddl_problem": entry["pddl_problem"],
            "solvable": True,
        }
        path.write_text(json.dumps(game), encoding="utf-8")
        paths.append(path)
    return paths


def commands_of(game: Game, steps: int) -> list[str]:
    engine, rng = Engine(game), random.Random(0)
    found: list[str] = []
    plan = shortest_plan(game)
    while len(found) < steps:
        done = len(found)
        command = plan[done] if done < len(plan) else rng.choice(engine.admissible())
        engine.step(command)
        found.append(command)
    return found


def timed(call: Callable[[], Any], at_least: float = 0.01) -> float:
    """Seconds of one call; short ones are repeated until they take long enough to be measured."""
    start, count = time.perf_counter(), 0
    while True:
        call()
        count += 1
        passed = time.perf_counter() - start
        if passed >= at_least:
            return passed / count


def played(engine: Any, commands: list[str]) -> list[str]:
    return [engine.step(command).text for command in commands]


def measure_native(path: Path, commands: list[str], times: dict[str, list[float]]) -> list[str]:
    times["load"].append(timed(lambda: load_game(path)))
    engine = Engine(load_game(path))
    times["reset"].append(timed(engine.reset))
    times["step"].append(per_step(engine, commands, listed=False))
    times["step, with the list of commands"].append(per_step(engine, commands, listed=True))
    middle = len(commands) // 2
    engine.reset()
    played(engine, commands[:middle])
    kept = engine.snapshot()
    times["list of commands alone"].append(
        timed(lambda: (engine.restore(kept), engine.admissible()))
    )
    times["snapshot"].append(timed(engine.snapshot))
    times["restore"].append(timed(lambda: engine.restore(kept)))
    engine.reset()
    return played(engine, commands)


def per_step(engine: Engine, commands: list[str], listed: bool) -> float:
    def play() -> None:
        engine.reset()
        for command in commands:
            engine.step(command)
            if listed:
                engine.admissible()

    return (timed(play) - timed(engine.reset)) / len(commands)


def measure_stock(
    engine: StockEngine, path: Path, commands: list[str], times: dict[str, list[float]]
) -> list[str]:
    times["load"].append(once(lambda: engine.load(path)))
    times["reset"].append(once(engine.reset))
    texts, middle = [], len(commands) // 2
    kept: Any = None
    for number, command in enumerate(commands):
        if number == middle:
            times["snapshot"].append(once(engine.snapshot))
            kept = engine.snapshot()
        start = time.perf_counter()
        texts.append(engine.step(command).text)
        seconds = time.perf_counter() - start
        times["step"].append(seconds)
        times["step, with the list of commands"].append(seconds)
    times["restore"].append(once(lambda: engine.restore(kept)))
    return texts


def once(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def episodes_per_second(engines: list[Any], plans: list[tuple[str, ...]]) -> float:
    """Every engine plays its plan once, all of them step by step in turn."""
    start = time.perf_counter()
    for engine in engines:
        engine.reset()
        engine.admissible()
    for number in range(max(map(len, plans))):
        for engine, plan in zip(engines, plans, strict=True):
            if number < len(plan):
                turn = engine.step(plan[number])
                engine.admissible()
                assert turn.won == (number + 1 == len(plan)), "the plan did not win"
    return len(engines) / (time.perf_counter() - start)


def native_bytes(game: Game, commands: list[str]) -> float:
    """Per live environment in the middle of a game, with its list of commands."""
    gc.collect()
    tracemalloc.start()
    kept = []
    for _ in range(50):
        engine = Engine(game)
        played(engine, commands)
        engine.admissible()
        kept.append(engine)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return used / len(kept)


def resident_bytes() -> int | None:
    status = Path("/proc/self/statm")
    if not status.is_file():
        return None
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stock_bytes(path: Path) -> float | None:
    """Of a second engine, so that what all of them share is not counted."""
    before = resident_bytes()
    engine = StockEngine(path)
    engine.reset()
    after = resident_bytes()
    engine.close()
    return None if before is None or after is None else float(after - before)


def in_time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def table(native: dict[str, list[float]], stock: dict[str, list[float]]) -> list[str]:
    lines = ["| | native | real engine | ratio |", "|---|---:|---:|---:|"]
    for name, ours in native.items():
        mine, theirs = statistics.median(ours), stock.get(name)
        if theirs is None:
            lines.append(f"| {name} | {in_time(mine)} | in every step | |")
        else:
            other = statistics.median(theirs)
            # the real engine has no snapshots: ours notes the commands, and plays them again
            ratio = "" if name == "snapshot" else f"{other / mine:,.0f}"
            lines.append(f"| {name} | {in_time(mine)} | {in_time(other)} | {ratio} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--games", type=int, default=6, help="1 to 6")
    parser.add_argument("--steps", type=int, default=12, help="commands per game")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--stock-environments", default="1,16,256", help="of the real engine, at once"
    )
    options = parser.parse_args()
    times: Times = {"native": defaultdict(list), "stock": defaultdict(list)}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_games(Path(folder), options.games)
        games = [load_game(path) for path in paths]
        commands = [commands_of(game, options.steps) for game in games]
        plans = [shortest_plan(game) for game in games]
        stock = StockEngine(paths[0])
        for _ in range(options.repeats):
            for path, sent in zip(paths, commands, strict=True):
                ours = measure_native(path, sent, times["native"])
                theirs = measure_stock(stock, path, sent, times["stock"])
                if ours != theirs:
                    sys.exit(f"the engines differ on {path.parent.name}")
        rates = {}
        for count in ENVIRONMENTS:
            engines = [Engine(games[i % len(games)]) for i in range(count)]
            used = [plans[i % len(games)] for i in range(count)]
            found = [episodes_per_second(engines, used) for _ in range(5)]
            rates[count] = statistics.median(found)
        stock_rates = {}
        for count in map(int, options.stock_environments.split(",")):
            chosen = [i % len(games) for i in range(count)]
            live = [StockEngine(paths[i]) for i in chosen]
            stock_rates[count] = episodes_per_second(live, [plans[i] for i in chosen])
            for engine in live:
                engine.close()
        memory = native_bytes(games[-1], commands[-1])
        stock_memory = stock_bytes(paths[-1])
    facts = f"{len(paths)} games, {options.steps} commands each, {options.repeats} repetitions"
    print(heading("alfworld_engine.py", facts))
    print("\n".join(table(times["native"], times["stock"])))
    shown = "" if stock_memory is None else f"{stock_memory / 1e6:.3g} MB"
    factor = "" if stock_memory is None else f"{stock_memory / memory:,.0f}"
    print(f"| memory per live environment | {memory / 1e3:.3g} kB | {shown} | {factor} |")
    for count, rate in rates.items():
        stock_rate = stock_rates.get(count)
        other = "not measured" if stock_rate is None else f"{stock_rate:.3g}"
        ratio = "" if stock_rate is None else f"{rate / stock_rate:,.0f}"
        print(f"| episodes/s, {count} environments in turn | {rate:,.0f} | {other} | {ratio} |")


if __name__ == "__main__":
    main()
