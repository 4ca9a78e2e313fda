"""Free pages in the midst of the heap go back to the system."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from untwine.diagnose.heap import give_back

STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes of this process that are in memory and belong to no file."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_holes_between_small_tensors_are_given_back() -> None:
    large, small = [], []
    for _ in range(400):  # 100 MiB, each piece below what is mapped apart, with a survivor behind
        large.append(torch.ones(1 << 16))
        small.append(torch.ones(64))
    full = resident()
    large.clear()
    give_back()
    assert full - resident() > 60 << 20
    assert float(sum(x.sum() for x in small)) == 400 * 64
