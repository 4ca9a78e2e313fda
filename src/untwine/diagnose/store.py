"""Tensors that wait for later use: in memory up to a budget, beyond it in a temporary file.

What is beyond the budget is written to the file and read through a mapping of it, so that it is an
ordinary tensor whose pages the system may drop and fetch again. Room in the file is used again as
soon as the last tensor that reads it is gone.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from untwine.errors import UntwineError

_ALIGN = 64  # bytes
_SMALL = 1 << 12  # bytes; less stays in memory and is not counted
_SEGMENT = 128 << 20  # bytes the file grows by, at least
_CPU_MIB = 1024

Storage = Any  # torch.UntypedStorage
Bytes = np.ndarray[Any, Any]


def default_memory_mib(device: torch.device) -> int:
    """1024 on a CPU, a quarter of the device's memory with CUDA."""
    if device.type != "cuda":
        return _CPU_MIB
    return int(torch.cuda.get_device_properties(device).total_memory) >> 22


class Store:
    """Keeps tensors; a context, whose file is gone afterwards.

    memory_mib  what may stay in memory (that of the tensors' own device); None is the default above
    folder      where the file is made once it is needed; None is the system's for temporary files.
                The file has no name there, so that nothing remains even of a process that is killed
    """

    def __init__(
        self, device: torch.device, memory_mib: float | None = None, folder: Path | None = None
    ) -> None:
        if memory_mib is None:
            memory_mib = default_memory_mib(device)
        if not memory_mib >= 0:
            raise UntwineError(f"memory_mib is {memory_mib}; it must be at least 0")
        self.device = device
        self._budget = int(memory_mib * (1 << 20))
        self._folder = Path(tempfile.gettempdir()) if folder is None else Path(folder)
        self._file: Any = None
        self._segments: list[tuple[int, Bytes]] = []  # first byte, mapping
        self._free: list[tuple[int, int]] = []  # first byte, bytes; in order, never touching
        self._used = 0
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._here: set[int] = set()  # addresses of storages that are counted or in the file
        self._copies: dict[int, weakref.ref[Bytes]] = {}
        # Garbage may be collected in the midst of anything, so it only leaves a note.
        self._dead: deque[tuple[str, int, int]] = deque()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._segments.clear()  # mappings end with the last tensor that reads them
        self._free.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return sum(len(bytes_) for _, bytes_ in self._segments)

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        """A kept tensor on the device it came from."""
        return tensor.to(self.device)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers, detached: `tensor` itself or, beyond the budget, a copy in the file.

        Must not be written to. With CUDA what is in the file is on the CPU; see `back`.
        """
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        if storage.nbytes() < _SMALL:
            return tensor
        self._bury()
        address = storage.data_ptr()
        if address in self._here:
            return tensor
        if self._used + storage.nbytes() <= self._budget:
            self._count(storage)
            return tensor
        if storage.nbytes() > 2 * tensor.nbytes:  # a small view: its storage is not worth keeping
            return self._written([tensor.contiguous()], tensor.shape)
        return self._copy_of(tensor, storage)

    def table(self, shape: tuple[int, int], dtype: torch.dtype) -> Table:
        """Room for (N, P) numbers, to be written some rows at a time."""
        size = math.prod(shape) * dtype.itemsize
        self._bury()
        if size < _SMALL or self._used + size <= self._budget:
            rows_NP = torch.empty(shape, dtype=dtype, device=self.device)
            if size >= _SMALL:
                self._count(rows_NP.untyped_storage())
            return Table(self, rows_NP)
        first, region = self._region(size)
        return Table(self, self._mapped(region, dtype).view(shape), first)

    def write_rows(
        self, first: int, like: torch.Tensor, write: Callable[[torch.Tensor], object]
    ) -> None:
        """Let `write` fill a tensor like `like`, and write that to the file at byte `first`. The
        tensor is used again and again: new pages cost as much as a product that fills them."""
        if len(self._buffer) < like.nbytes:
            self._buffer = torch.empty(like.nbytes, dtype=torch.uint8, device=self.device)
        filled = self._buffer[: like.nbytes].view(like.dtype).view(like.shape)
        write(filled)
        self._write(first, [filled])

    def cat(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """`torch.cat` along the first axis, kept."""
        size = sum(t.nbytes for t in tensors)
        self._bury()
        if len(tensors) == 1 or self._used + size <= self._budget or size < _SMALL:
            return self.keep(torch.cat([self.back(t) for t in tensors]))
        shape = torch.Size((sum(len(t) for t in tensors), *tensors[0].shape[1:]))
        return self._written([t.contiguous() for t in tensors], shape)

    def _count(self, storage: Storage) -> None:
        self._used += storage.nbytes()
        self._note(storage, "counted", storage.data_ptr(), storage.nbytes())
        self._here.add(storage.data_ptr())

    def _note(self, thing: Any, what: str, first: int, size: int) -> None:
        weakref.finalize(thing, self._dead.append, (what, first, size)).atexit = False

    def _copy_of(self, tensor: torch.Tensor, storage: Storage) -> torch.Tensor:
        """The whole storage, once for all tensors that are views of it."""
        address = storage.data_ptr()
        known = self._copies.get(address)
        region = known() if known is not None else None
        if region is None:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            region = self._kept([whole])
            self._copies[address] = weakref.ref(region)
            self._note(storage, "copied", address, 0)
        flat = self._mapped(region, tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _written(self, tensors: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor:
        return self._mapped(self._kept(tensors), tensors[0].dtype).view(shape)

    def _mapped(self, region: Bytes, dtype: torch.dtype) -> torch.Tensor:
        flat = torch.from_numpy(region).view(dtype)
        self._here.add(flat.untyped_storage().data_ptr())
        return flat

    def _bury(self) -> None:
        while self._dead:
            what, first, size = self._dead.popleft()
            if what == "counted":
                self._used -= size
                self._here.discard(first)
            elif what == "copied":
                self._copies.pop(first, None)
            elif self._segments:
                self._here.discard(self._address(first))
                self._release(first, size)

    def _address(self, first: int) -> int:
        begin, mapping = next(s for s in reversed(self._segments) if s[0] <= first)
        address: int = mapping.ctypes.data
        return address + first - begin

    def _kept(self, tensors: Sequence[torch.Tensor]) -> Bytes:
        """Contiguous tensors, one after the other, as bytes in the file."""
        first, region = self._region(sum(t.nbytes for t in tensors))
        self._write(first, tensors)
        return region

    def _region(self, size: int) -> tuple[int, Bytes]:
        """Room for so many bytes in the file: where it begins, and its mapping."""
        room = -(-size // _ALIGN) * _ALIGN
        try:
            first = self._take(room)
        except OSError as error:
            raise self._full(error) from error
        begin, mapping = next(s for s in reversed(self._segments) if s[0] <= first)
        region: Bytes = mapping[first - begin : first - begin + size]
        self._note(region, "region", first, room)
        return first, region

    def _write(self, first: int, tensors: Sequence[torch.Tensor]) -> None:
        try:
            self._file.seek(first)
            for tensor in tensors:
                flat: Any = tensor.detach().cpu().flatten().view(torch.uint8).numpy()
                raw = memoryview(flat)
                while raw:
                    raw = raw[self._file.write(raw) :]
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> UntwineError:
        return UntwineError(
            f"{self.file_bytes >> 20} MiB of gradients are kept in {self._folder} and no more "
            f"can be written there ({error.strerror}): name another folder, give more "
            "`memory_mib`, or take fewer samples"
        )

    def _take(self, room: int) -> int:
        for n, (first, size) in enumerate(self._free):
            if size >= room:
                self._free[n : n + 1] = [(first + room, size - room)] if size > room else []
                return first
        first, size = self._grow(max(room, _SEGMENT))
        if size > room:
            self._free.append((first + room, size - room))
        return first

    def _grow(self, size: int) -> tuple[int, int]:
        """A new segment: its first byte, and how many it has."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(  # noqa: SIM115
                buffering=0, prefix="untwine-", dir=self._folder
            )
        first = self.file_bytes
        size += -size % mmap.ALLOCATIONGRANULARITY
        if hasattr(
            os, "posix_fallocate"
        ):  # a full disk is then an error here, and writes are quick
            os.posix_fallocate(self._file.fileno(), first, size)
        else:
            self._file.truncate(first + size)
        mapping = mmap.mmap(self._file.fileno(), size, offset=first)
        self._segments.append((first, np.frombuffer(mapping, dtype=np.uint8)))
        return first, size

    def _release(self, first: int, size: int) -> None:
        """Put a region back among the free ones, joined with its neighbours of the same segment."""
        begins = {begin for begin, _ in self._segments}
        joined: list[tuple[int, int]] = []
        for begin, length in sorted([*self._free, (first, size)]):
            if joined and sum(joined[-1]) == begin and begin not in begins:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((begin, length))
        self._free = joined


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that are written some at a time.

    rows_NP   all of them; those not written yet are anything
    first     where they are in the file of the store; None: in memory
    """

    store: Store
    rows_NP: torch.Tensor
    first: int | None = None

    def write(self, rows: range, write: Callable[[torch.Tensor], object]) -> None:
        """Let `write` fill a contiguous tensor that becomes these rows."""
        here = self.rows_NP[rows.start : rows.stop]
        if self.first is None:
            write(here)
        else:
            begin = self.first + rows.start * self.rows_NP.shape[1] * self.rows_NP.itemsize
            self.store.write_rows(begin, here, write)
