"""Beginning an episode of ScienceWorld: the server's `load` against ours, alternating.

    python benchmarks/scienceworld_loads.py [--repeats 15] [--tasks melt,grow-plant]

Needs the extra `scienceworld`. Prints a table in Markdown: medians over repetitions, after as many
that warm the JVM up; in each repetition one comes after the other, on a new variation. Both go
through Python and back, and are asked for the goal and the room, as at the start of every episode.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from arms.machine import heading

from untwine.envs.registry import get_family
from untwine.envs.scienceworld.jvm import get_jvm


def timed(load: Callable[[], Any], server: Any) -> float:
    start = time.perf_counter()
    load()
    server.getTaskDescription()
    server.freeActionLook()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tasks", default="", help="separated by commas; all unless given")
    given = parser.parse_args()
    catalogue = get_family("scienceworld").catalogue
    machine = get_jvm()
    plain, quick = machine.new_server(), machine.new_server()
    tasks = given.tasks.split(",") if given.tasks else catalogue.tasks()
    times: dict[str, list[tuple[float, float]]] = {task: [] for task in tasks}
    for turn in range(2 * given.repeats):
        for task, found in times.items():
            known = catalogue.variations(task)
            number = known[turn * len(known) // (2 * given.repeats)]
            ordinary = timed(partial(plain.load, task, number, "", False), plain)
            ours = timed(partial(machine.load_quickly, quick, task, number, ""), quick)
            machine.keep_ids_apart()
            found.append((ordinary, ours))
    rows = []
    for task, found in times.items():
        ordinary, ours = map(statistics.median, zip(*found[given.repeats :], strict=True))
        rows.append((task, ordinary, ours))
    print(heading("scienceworld_loads.py", f"{given.repeats} repetitions of each task"))
    print("| task | `load`, ms | ours, ms | ratio |")
    print("|---|---:|---:|---:|")
    for task, ordinary, ours in sorted(rows, key=lambda row: row[2] / row[1]):
        print(f"| {task} | {1e3 * ordinary:.1f} | {1e3 * ours:.1f} | {ordinary / ours:.1f} |")
    ratio = statistics.median(ordinary / ours for _, ordinary, ours in rows)
    print(f"\nMedian of the ratios: {ratio:.1f}")


if __name__ == "__main__":
    main()
