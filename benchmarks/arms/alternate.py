"""Arms in processes of their own that take turns: one works, the others wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from arms.machine import peak_bytes
from arms.world import Count


@dataclass(frozen=True, slots=True)
class Answer:
    """What an arm says after an iteration.

    peak      bytes, largest resident set so far
    at_start  bytes, the same before the first iteration
    """

    count: Count
    peak: int
    at_start: int


class Worker:
    """The side of the one who asks."""

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def iterate(self) -> Answer:
        """Let the arm do one iteration; it first gets ready, if it is not."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last is shown below
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").strip()[-2000:]
            sys.exit(f"{last}\n\nthe arm {self.name!r} broke off; its last words are above")
        count, peak, at_start = json.loads(line)
        return Answer(Count(*count), peak, at_start)

    def close(self) -> None:
        """End the process, if it has not ended."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._said.close()


class Pipe:
    """The side of the arm: a `Turn` over standard input and output."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed must not mix with the answers
        self._at_start = 0

    def wait(self) -> None:
        self._at_start = self._at_start or peak_bytes()
        if not sys.stdin.readline():
            sys.exit(0)

    def done(self, count: Count) -> None:
        self._answers.write(json.dumps([count, peak_bytes(), self._at_start]) + "\n")
        self._answers.flush()
