"""Memory that was freed, given back to the system.

The tensors that stand for what a chunk left behind are small and outlive it. They lie between its
activations, so those of the next chunk do not fit into the gaps, and the heap grows with every
chunk although what is in use does not (docs/log.md).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

EVERY = 4  # chunks: each time their activations must get new pages, which takes about 0.2 s


def give_back() -> bool:
    """Return free pages of the heap, also those in its midst; whether that could be done (with
    glibc only)."""
    trim = _trim()
    return trim is not None and bool(trim(0))


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
