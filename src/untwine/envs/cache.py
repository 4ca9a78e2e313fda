"""Where environments keep what takes long to make: solutions, games."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """`$UNTWINE_CACHE`, or ~/.cache/untwine."""
    named = os.environ.get("UNTWINE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "untwine"
