"""Solutions of ScienceWorld instances: the gold paths of the simulator, checked and kept on disk.

A gold path takes 0.1 to 17 seconds to compute, so each is kept in a file per task. It counts only
when a replay in a freshly loaded world reaches 100: the path is cut where the replay is complete.
A second version leaves out the commands that only look, for agents to whom the room is shown
anyway, and those that open what is open; it is kept when its own replay reaches 100 too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from untwine.envs.scienceworld.jvm import Session

FORMAT = 2
TRIES = 2  # worlds with bees and seeds vary from run to run
_LOOKING = re.compile(r"look around|inventory|task")
_ALREADY = re.compile(r"is already open")


@dataclass(frozen=True, slots=True)
class Expert:
    """A verified solution, or a record that there is none (score below 100).

    commands  up to the command that completes the task
    brief     the same without looking around and opening what is open; equal to `commands` when
              that does not solve it
    """

    score: int
    commands: tuple[str, ...]
    brief: tuple[str, ...]

    @property
    def solves(self) -> bool:
        return self.score == 100


def search(session: Session, task: str, variation: int, simplifications: str) -> Expert:
    """Compute and check the gold path; the session's episode is gone afterwards."""
    session.load(task, variation, simplifications, gold=True)
    gold = tuple(session.gold_commands())
    score, answers = replay(session, task, variation, simplifications, gold)
    if score != 100:
        return Expert(score, gold, gold)
    commands = gold[: len(answers)]
    short = tuple(
        command
        for command, answer in zip(commands, answers, strict=True)
        if not _LOOKING.fullmatch(command) and not _ALREADY.search(answer)
    )
    score_short, answers = replay(session, task, variation, simplifications, short)
    return Expert(score, commands, short[: len(answers)] if score_short == 100 else commands)


def replay(
    session: Session, task: str, variation: int, simplifications: str, commands: Sequence[str]
) -> tuple[int, list[str]]:
    """Final score and the answers until completion, of the best of `TRIES` fresh worlds."""
    best: tuple[int, list[str]] = (-101, [])
    for _ in range(TRIES):
        session.load(task, variation, simplifications)
        answers = []
        for command in commands:
            answers.append(session.step(command))
            if session.completed():
                break
        best = max(best, (session.score(), answers), key=lambda found: found[0])
        if best[0] == 100:
            break
    return best


class ExpertCache:
    """Solutions on disk, one JSON file per task.

    Several processes may use it at once: files are replaced in one go. When two add to the same
    file in the same instant, one addition may be forgotten, and is computed again later. A file
    that cannot be read is written anew; a folder that cannot be written is done without.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, task: str, variation: int) -> Expert | None:
        return self._read(task).get(variation)

    def put(self, task: str, variation: int, expert: Expert) -> None:
        experts = {**self._read(task), variation: expert}
        entries = {str(v): asdict(experts[v]) for v in sorted(experts)}
        text = json.dumps({"format": FORMAT, "task": task, "experts": entries})
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=f".{task}-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).replace(self._path(task))

    def _path(self, task: str) -> Path:
        return self.folder / f"{task}.json"

    def _read(self, task: str) -> dict[int, Expert]:
        try:
            tree = json.loads(self._path(task).read_text(encoding="utf-8"))
            if tree["format"] != FORMAT or tree["task"] != task:
                return {}
            return {
                int(variation): Expert(
                    int(entry["score"]), _strings(entry["commands"]), _strings(entry["brief"])
                )
                for variation, entry in tree["experts"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _strings(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("not a list of commands")
    return tuple(values)
