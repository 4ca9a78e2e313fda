"""Tensors beyond a budget come back from a file, whose room is used again."""

from __future__ import annotations

import resource
from functools import partial
from pathlib import Path

import pytest
import torch

from untwine.diagnose import store as room
from untwine.diagnose.store import Store
from untwine.errors import UntwineError

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_SEGMENT", 1 << 16)


def numbers(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_within_the_budget_nothing_is_copied(tmp_path: Path) -> None:
    with Store(CPU, 1, tmp_path) as store:
        first, second = numbers(200_000), numbers(100_000)
        assert store.keep(first).data_ptr() == first.data_ptr()
        assert store.keep(first[5:].view(-1, 1)).data_ptr() == first[5:].data_ptr()  # counted once
        assert store.file_bytes == 0
        assert store.keep(second).data_ptr() != second.data_ptr()
        assert store.file_bytes > 0
        del first
        assert store.keep(second).data_ptr() == second.data_ptr()  # there is room again


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
)
def test_numbers_and_views_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = (100 * numbers(6000)).to(dtype).view(20, 30, 10)
    views = [whole, whole.transpose(1, 2), whole[3:18], whole[:2], whole[:1].expand(5, 30, 10)]
    views.append(whole.requires_grad_() if dtype.is_floating_point else whole)
    with Store(CPU, 0, tmp_path) as store:
        kept = [store.keep(view) for view in views]
        for view, found in zip(views, kept, strict=True):
            assert torch.equal(view, found)
            assert found.dtype == dtype
            assert not found.requires_grad
            assert found.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        assert kept[0].untyped_storage().data_ptr() == kept[1].untyped_storage().data_ptr()
        assert store.keep(kept[0]).data_ptr() == kept[0].data_ptr()
        joined = store.cat([whole.detach(), whole.detach()[:4]])
        assert torch.equal(joined, torch.cat([whole, whole[:4]]))
    assert torch.equal(kept[1], views[1])  # as long as it is read, the mapping stays
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
def test_room_is_used_again(tmp_path: Path) -> None:
    sizes = [3000, 1100, 9000, 40_000, 2000, 1025, 7000, 20_000]
    with Store(CPU, 0, tmp_path) as store:
        most = 0
        for turn in range(30):
            kept = [store.keep(numbers(size, turn + i)) for i, size in enumerate(sizes)]
            del kept[turn % len(sizes)]  # a hole in the middle
            kept.append(store.keep(numbers(2500, turn)))
            rest = [s for i, s in enumerate(sizes) if i != turn % len(sizes)]
            seeds = [turn + i for i in range(len(sizes)) if i != turn % len(sizes)]
            for size, seed, found in zip([*rest, 2500], [*seeds, turn], kept, strict=True):
                assert torch.equal(found, numbers(size, seed))
            del kept, found
            most = most or store.file_bytes
        assert store.file_bytes <= 2 * most


@pytest.mark.usefixtures("small")
def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store(CPU, 0, tmp_path) as store:
        kept = store.keep(numbers(5000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, before[1]))
        try:
            with pytest.raises(UntwineError, match=r"no more can be written.*name another folder"):
                store.keep(numbers(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert torch.equal(kept, numbers(5000))


def _copied(given: torch.Tensor, into: torch.Tensor) -> None:
    into.copy_(given)


@pytest.mark.parametrize("memory_mib", [0, 1])
def test_a_table_is_written_some_rows_at_a_time(
    memory_mib: float, tmp_path: Path, small: None
) -> None:
    rows = numbers(50 * 700).view(50, 700)
    with Store(CPU, memory_mib, tmp_path) as store:
        table = store.table((50, 700), torch.float32)
        assert (store.file_bytes > 0) == (memory_mib == 0)
        for part in (range(30, 50), range(0, 1), range(1, 30)):
            given = rows[part.start : part.stop]
            table.write(part, partial(_copied, given))
        other = store.keep(numbers(1000, 3))  # goes elsewhere
        assert torch.equal(table.rows_NP, rows)
        assert torch.equal(other, numbers(1000, 3))
        size = store.file_bytes
        del table, other
        again = store.table((50, 700), torch.float32)  # the room is free again
        assert store.file_bytes == size
        again.write(range(50), lambda into: into.zero_())
        assert not again.rows_NP.any()
