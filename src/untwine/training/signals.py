"""SIGINT and SIGTERM ask the loop to stop at the next safe place; the loop saves first. A second
signal stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from untwine.errors import Interrupted


class StopRequest:
    """Context that catches the signals (only in the main thread, where Python allows it).

    resume  how to go on, for the message
    """

    def __init__(self, resume: str = "--resume") -> None:
        self._resume = resume
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.signum is not None:
            name = signal.Signals(self.signum).name
            raise Interrupted(
                f"stopped by {name}; everything finished so far is saved, continue with "
                f"{self._resume}",
                self.signum,
            )

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
