"""The bytes of planned tensors into their places: copied, cast, or computed, many tensors at a time.

Memory stays within a budget whatever the size of the model: copies are left to the kernel, all else goes block by
block, and a tensor starts only when its work still fits beside that of the others.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tlt_cli.checkpoint.files import start_writeback, write_at
from tlt_cli.checkpoint.header import tensor_bytes
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import PlannedTensor
from tlt_cli.checkpoint.shards import Shard
from tlt_cli.checkpoint.staging import plain_errors
from tlt_cli.errors import TltError

if TYPE_CHECKING:
    import torch

_COPIED_BYTES = 8 << 20
_CAST_ELEMENTS = 1 << 19  # few enough that a block stays in the processor's cache
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEPT_BYTES = -1, -3, 1 << 28  # of mallopt
_BUDGET_PER_JOB = 64 << 20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Tally:
    """Bytes done so far, over all threads; `stop` tells the threads to leave what they do."""

    total: int
    progress: Callable[[int, int], None] | None
    done: int = 0
    stop: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        """Count bytes as done and say so."""
        with self.lock:
            self.done += count
            if self.progress is not None:
                self.progress(self.done, self.total)


@dataclass(frozen=True)
class OpenShard:
    """A shard whose file exists at its full size, ready to be filled in any order."""

    shard: Shard
    path: Path
    descriptor: int


@contextmanager
def opened(shards: Sequence[Shard], folder: Path) -> Iterator[list[OpenShard]]:
    """Create the files at their full size, headers written, so that a full disk shows before the work; sync at exit."""
    files: list[OpenShard] = []
    try:
        for shard in shards:
            path = folder / shard.name
            with plain_errors(path):
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
                files.append(OpenShard(shard, path, descriptor))
                _reserve(descriptor, shard.size)
                write_at(descriptor, memoryview(shard.header), 0)
        yield files
        for file in files:
            with plain_errors(file.path):
                os.fsync(file.descriptor)
    finally:
        for file in files:
            os.close(file.descriptor)


def fill(files: Sequence[OpenShard], values: Checkpoint, *, jobs: int, tally: Tally) -> None:
    """Write every tensor, up to `jobs` at once. The bytes do not depend on `jobs`."""
    work = [(file, tensor) for file in files for tensor in file.shard.tensors]
    budget = jobs * _BUDGET_PER_JOB
    running: dict[Future[None], int] = {}

    def await_one() -> None:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            del running[future]
            future.result()

    computes = any(not _is_copy(tensor, values) for _, tensor in work)
    if computes:
        _keep_freed_memory()
    with one_thread_each(computes), ThreadPoolExecutor(jobs) as pool:
        try:
            for file, tensor in work:
                memory = tensor.work or (0 if _is_copy(tensor, values) else 16 * _CAST_ELEMENTS)
                # One that exceeds the budget by itself runs alone.
                while running and (len(running) >= jobs or sum(running.values()) + memory > budget):
                    await_one()
                running[pool.submit(_fill_one, file, tensor, values, tally)] = memory
            while running:
                await_one()
        except BaseException:
            tally.stop = True
            raise


def _fill_one(file: OpenShard, tensor: PlannedTensor, values: Checkpoint, tally: Tally) -> None:
    start = file.shard.starts[tensor.name]
    size = tensor_bytes(tensor.dtype, tensor.shape)
    if _is_copy(tensor, values):
        position = start
        for source, begin, end in _byte_ranges(tensor, values):
            for offset in range(begin, end, _COPIED_BYTES):
                if tally.stop:
                    return
                length = min(_COPIED_BYTES, end - offset)
                with plain_errors(file.path):
                    values.copy_bytes(source, offset, length, descriptor=file.descriptor, position=position)
                start_writeback(file.descriptor, position, length)
                tally.add(length)
                position += length
        assert position == start + size, f"{tensor.name}: {position - start} of {size} bytes copied"
        return
    from tlt_cli.checkpoint.cast import memory

    written = 0
    for block in _blocks(tensor, values):
        if tally.stop:
            return
        assert block.shape[1:] == tensor.shape[1:], f"{tensor.name}: rows of {list(block.shape)} for {tensor.shape}"
        encoded = _encoded(block, tensor, values)
        data = memory(encoded)
        assert written + len(data) <= size, f"{tensor.name}: more rows than {tensor.shape}"
        with plain_errors(file.path):
            write_at(file.descriptor, data, start + written)
        start_writeback(file.descriptor, start + written, len(data))
        written += len(data)
        tally.add(len(data))
    assert written == size, f"{tensor.name}: {written} of {size} bytes computed"


def _is_copy(tensor: PlannedTensor, values: Checkpoint) -> bool:
    if tensor.copies:
        return all(values.tensors[rows.source].dtype == tensor.dtype for rows in tensor.copies)
    if tensor.compute is not None:
        return False
    info = values.tensors[tensor.source]
    assert info.shape == tensor.shape, f"{tensor.name} {tensor.shape} is a copy of {info.shape}"
    return info.dtype == tensor.dtype


def _byte_ranges(tensor: PlannedTensor, values: Checkpoint) -> Iterator[tuple[str, int, int]]:
    """(source, first byte, end) of what is copied, one after the other."""
    if not tensor.copies:
        yield tensor.source, 0, values.tensors[tensor.source].nbytes
    for rows in tensor.copies:
        info = values.tensors[rows.source]
        row = tensor_bytes(info.dtype, info.shape[1:])
        yield rows.source, rows.start * row, rows.stop * row


def _blocks(tensor: PlannedTensor, values: Checkpoint) -> Iterable[torch.Tensor]:
    """Its rows, computed or as they are in the source."""
    if tensor.compute is not None:
        return tensor.compute(values)
    if not tensor.shape:
        return (values.read(tensor.source),)
    rows = tensor.shape[0]
    step = max(1, _CAST_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
    return (values.read_rows(tensor.source, row, min(row + step, rows)) for row in range(0, rows, step))


def _encoded(block: torch.Tensor, tensor: PlannedTensor, values: Checkpoint) -> torch.Tensor:
    """A block in the tensor's dtype, rounded once; TltError if a number is not finite before or after."""
    import torch

    from tlt_cli.checkpoint.cast import torch_dtype

    dtype = torch_dtype(tensor.dtype)
    if block.is_floating_point() and block.numel():
        if block.element_size() == 1:
            block = block.float()  # 8-bit floats know no arithmetic
        largest = max(abs(bound.item()) for bound in torch.aminmax(block))
        if not math.isfinite(largest):
            raise TltError(_not_finite(tensor, values))
        if dtype.is_floating_point and largest >= _overflows_at(dtype):
            raise TltError(
                f"{tensor.name}: {largest:.6g} does not fit {tensor.dtype}, whose largest number is "
                f"{torch.finfo(dtype).max:.6g}; choose a wider one: --dtype BF16 or F32"
            )
    return block.to(device="cpu", dtype=dtype).contiguous()


def _overflows_at(dtype: torch.dtype) -> float:
    """The least number that rounding to nearest takes beyond the largest one of a float dtype.

    Not left to the cast: some 8-bit casts saturate and others give infinity.
    """
    import torch

    limits = torch.finfo(dtype)
    return limits.max + 2.0 ** (math.frexp(limits.max)[1] - 1) * limits.eps / 2


def _not_finite(tensor: PlannedTensor, values: Checkpoint) -> str:
    import torch

    if tensor.source in values.tensors:
        source = values.read(tensor.source).to(torch.float32)
        bad = source.numel() - int(torch.isfinite(source).sum())
        if bad:
            return (
                f"{values.source}: {tensor.source} holds {bad:,} NaN or infinite values of {source.numel():,}; "
                "such a checkpoint is broken: fetch it again or use an earlier one"
            )
    return (
        f"{tensor.name}: computing it gives NaN or infinite values, though {tensor.source} holds none; "
        "look for NaN or huge values in what else it is computed from"
    )


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise
        os.ftruncate(descriptor, size)  # a disk that cannot reserve


def _keep_freed_memory() -> None:
    """Blocks of a megabyte come and go by the thousand; glibc would map and unmap each, which cost as much again."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    except (OSError, AttributeError):  # another libc: it does as it does
        pass


@contextmanager
def one_thread_each(wanted: bool = True) -> Iterator[None]:
    """Many tensors at once use the cores better than many threads on one, which wait for each other at every step; so
    does one small matrix after the other, ten times so where something else is running."""
    if not wanted:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
