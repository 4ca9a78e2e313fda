"""Writes data/transcripts.json: walks recorded from the real engine (needs the extra `alfworld`).

    PYTHONPATH=src python tests/envs/alfworld/record_transcripts.py

Each walk is a list of [command, text, won, checksum of the admissible commands]; the first command
is null (reset). Every tenth row has the commands themselves instead of their checksum.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import alfworld_cases as cases

from untwine.envs.alfworld.engine import Engine
from untwine.envs.alfworld.game_file import load_game
from untwine.envs.alfworld.stock import StockEngine

LENGTH = 40


def checksum(commands: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(commands).encode()).hexdigest()[:12]


def games() -> dict[str, dict[str, Any]]:
    """The fixtures as they are, one scrambled game of each, and two of older age."""
    found = {}
    for number, task_type in enumerate(cases.task_types()):
        found[task_type] = cases.game_tree(task_type)
        found[f"{task_type}/scrambled"] = cases.scrambled(task_type, number)
    tree = cases.game_tree("pick_two_obj_and_place")
    found["older"] = cases.older(tree, inline_help=False)
    found["older/help"] = cases.older(tree, inline_help=True)
    return found


def commands(engine: Engine, name: str, plan: tuple[str, ...] | None) -> list[str]:
    """For fixtures a solution, then (or else) a mixed walk; `engine` says what is admissible."""
    chosen = [] if plan is None or "/" in name or name == "older" else list(plan)
    engine.reset()
    for command in chosen:
        engine.step(command)
    for kind in ("eager", "adversarial"):
        for command in cases.walk(engine, kind, len(name), LENGTH // 2):
            engine.step(command)
            chosen.append(command)
    return chosen


def record(path: Path, name: str, plan: tuple[str, ...] | None) -> list[list[Any]]:
    engine, real = Engine(load_game(path)), StockEngine(path)
    rows: list[list[Any]] = []
    for number, command in enumerate([None, *commands(engine, name, plan)]):
        turn = real.reset() if command is None else real.step(command)
        listed = real.admissible()
        shown = list(listed) if number % 10 == 0 else checksum(listed)
        rows.append([command, turn.text, turn.won, shown])
    return rows


def main() -> None:
    walks = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, tree) in enumerate(games().items()):
            path = cases.write_game(Path(folder) / str(number), tree)
            walks[name] = record(path, name, tree["walkthrough"])
            print(name, len(walks[name]), sum(row[2] for row in walks[name]), flush=True)
    lines = [f'"{name}": {json.dumps(rows)}' for name, rows in walks.items()]
    (cases.DATA / "transcripts.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
