"""The fixture `make_run`: a factory of synthetic run directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(folder: str = "run", name: str = "boil water", **options: Any) -> Path:
        return write_run(tmp_path / folder, name, **options)

    return make
