"""Figures as files, drawn without a display. The same numbers give the same file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from untwine.errors import ConfigError

COLOURS = ("#1b6ca8", "#d1495b", "#e8a33d", "#3b8a5a", "#7a5195")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "untwine",
    "svg.fonttype": "path",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
}


@contextmanager
def drawing(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure that is saved to `path` when the block ends; its folder is made."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            no_date: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=110, metadata=no_date)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; choose another --out"
            ) from None
