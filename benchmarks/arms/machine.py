"""What a table must say about the run it comes from: command, date, machine."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


def heading(script: str, *facts: str) -> str:
    """The lines above a table: command, date and machine, then one line for each fact."""
    arguments = " ".join(sys.argv[1:])
    lines = [
        f"Command: `python benchmarks/{script}{' ' + arguments if arguments else ''}`",
        f"Date: {datetime.date.today()}; machine: {_processor()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}",
        *facts,
    ]
    return "  \n".join(lines) + "\n"


def clock(threads: int, device: str = "cpu") -> Callable[[], float]:
    """Seconds. Of one thread, those of the processor: other processes disturb them less. They are
    those of the wall on a quiet machine. On a GPU those of the wall, once it has done its work."""
    if device == "cuda":
        return _when_done
    return time.process_time if threads == 1 else time.perf_counter


def _when_done() -> float:
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
