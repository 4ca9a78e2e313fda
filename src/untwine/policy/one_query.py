"""Attention of rows that ask one query each: what decoding spends most of its time with.

On a CPU a new token's attention is bound by how quickly the keys and values of its row come from
memory. torch's kernels are made for many queries and reach half of that speed with one, so it is
done by a small C function (one_query.c), compiled when it is first needed. Where there is no
compiler, or numbers are not float32, torch does it, with the same results up to rounding.

Shape suffixes: B queries, K key heads, G query heads of a key head, D head size, R rows, C
capacity.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

_FLAGS = ("-O3", "-shared", "-fPIC")
_LANES = 32  # the head size must be a multiple
_WORTH_THREADS = 1 << 20  # numbers to read; for fewer, threads cost more than they save
_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


def one_query(
    query_BKGD: torch.Tensor,
    keys_RKCD: torch.Tensor,
    values_RKCD: torch.Tensor,
    rows: Sequence[int],
    lengths: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """softmax(scale <q, k>) v of each query over the first `lengths[b]` tokens of row `rows[b]`,
    (B, K, G, D). Lengths are at least 1; no gradients."""
    kernel = _kernel() if _fits(query_BKGD, keys_RKCD, values_RKCD) else None
    if kernel is None:
        return _by_torch(query_BKGD, keys_RKCD, values_RKCD, rows, lengths, scale)
    query_BKGD = query_BKGD.contiguous()
    out = torch.empty_like(query_BKGD)
    count, heads, queries, size = query_BKGD.shape
    where, long = torch.tensor(rows), torch.tensor(lengths)
    longest = max(lengths, default=0)

    def part(first: int, last: int) -> None:
        scratch = torch.empty(queries * (longest + 16))
        kernel(
            *(x.data_ptr() for x in (query_BKGD, keys_RKCD, values_RKCD, out, scratch)),
            *(where.data_ptr(), long.data_ptr(), first, last),
            *(heads, queries, size, keys_RKCD.shape[2], scale),
        )

    threads = min(torch.get_num_threads(), count)
    if threads == 1 or sum(lengths) * heads * size < _WORTH_THREADS:
        part(0, count)
    else:
        cuts = [count * i // threads for i in range(threads + 1)]
        list(_threads(threads).map(part, *zip(*pairwise(cuts), strict=True)))
    return out


def available() -> bool:
    """Whether the C function could be compiled here."""
    return _kernel() is not None


def _by_torch(
    query_BKGD: torch.Tensor,
    keys_RKCD: torch.Tensor,
    values_RKCD: torch.Tensor,
    rows: Sequence[int],
    lengths: Sequence[int],
    scale: float,
) -> torch.Tensor:
    out = torch.empty_like(query_BKGD)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        # the heads of a group are like several queries
        k, v = keys_RKCD[row, :, None, :length], values_RKCD[row, :, None, :length]
        out[b] = scaled_dot_product_attention(query_BKGD[b, :, None], k, v, scale=scale)[:, 0]
    return out


def _fits(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    return (
        all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (query, keys, values))
        and keys.is_contiguous()
        and values.is_contiguous()
        and query.shape[-1] % _LANES == 0
        and not (torch.is_grad_enabled() and query.requires_grad)
    )


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="untwine-attention")


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    """The compiled function; None where that is not possible."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if not compiler:
        return None
    source = files("untwine.policy").joinpath("one_query.c").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="untwine-") as folder:
        for own in (["-march=native"], ["-mcpu=native"], []):
            library = Path(folder) / f"one_query{len(own)}.so"
            command = [*shlex.split(compiler), *_FLAGS, *own, "-x", "c", "-", "-o", str(library)]
            try:
                subprocess.run(
                    command, input=source, text=True, capture_output=True, check=True, timeout=60
                )
                function: Any = ctypes.CDLL(str(library)).one_query
            except (OSError, subprocess.SubprocessError, AttributeError):
                continue
            function.argtypes = [_POINTER] * 7 + [_INTEGER] * 6 + [ctypes.c_float]
            function.restype = None
            return function  # type: ignore[no-any-return]
    return None
