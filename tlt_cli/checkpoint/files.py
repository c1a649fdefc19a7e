"""Bytes of files by position: one descriptor per file, shared by all threads.

Reads go through pread and not through a mapping: mapped pages count as the process's own memory,
and a file that shrinks under a mapping kills the process where a short read can be reported.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

from tlt_cli.errors import TltError

_HASH_BLOCK = 4 << 20
_COPY_BLOCK = 1 << 20
_WRITE_BLOCK = 256 << 10
_SYNC_FILE_RANGE_WRITE = 2  # start, do not wait
# What a kernel or a disk answers when it cannot copy between these two files by itself.
_COPY_ELSEWHERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


class OpenFiles:
    """The files of one checkpoint, opened when first read and closed with the object."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = dict(paths)
        self._descriptors: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def path(self, file: str) -> Path:
        """Where the file lies, for messages."""
        return self._paths[file]

    def size(self, file: str) -> int:
        """The file's bytes when it was opened."""
        self._descriptor(file)
        return self._sizes[file]

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from absolute byte `offset`; TltError if the file ends before that."""
        descriptor = self._descriptor(file)
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[filled:]], offset + filled)
            except OSError as error:
                raise TltError(f"{self._paths[file]}: cannot read: {error.strerror}") from error
            if count == 0:
                raise TltError(
                    f"{self._paths[file]}: ends at byte {offset + filled}, but bytes up to "
                    f"{offset + len(buffer)} were wanted; it was cut short since it was opened"
                )
            filled += count

    def read(self, file: str, offset: int, length: int) -> bytes:
        """A copy of `length` bytes from absolute byte `offset`."""
        buffer = bytearray(length)
        self.read_into(file, offset, memoryview(buffer))
        return bytes(buffer)

    def copy(self, file: str, offset: int, length: int, descriptor: int, position: int) -> None:
        """Copy `length` bytes from absolute byte `offset` to `position` in an open file, by the kernel if it can.

        OSError where the target cannot be written, TltError where the source cannot be read.
        """
        copied = _kernel_copy(self._descriptor(file), offset, length, descriptor, position)
        buffer = memoryview(bytearray(min(_COPY_BLOCK, length - copied)))
        while copied < length:
            block = buffer[: length - copied]
            self.read_into(file, offset + copied, block)
            write_at(descriptor, block, position + copied)
            copied += len(block)

    def sha256(self, file: str) -> str:
        """The digest that `sha256sum` prints for the file."""
        digest = hashlib.sha256()
        block = memoryview(bytearray(_HASH_BLOCK))
        size = self.size(file)
        for offset in range(0, size, _HASH_BLOCK):
            part = block[: min(_HASH_BLOCK, size - offset)]
            self.read_into(file, offset, part)
            digest.update(part)
        return digest.hexdigest()

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                path = self._paths[file]
                try:  # without waiting: a pipe would block until somebody writes into it
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                except OSError as error:
                    raise TltError(f"{path}: cannot open: {error.strerror}") from error
                self._descriptors[file] = descriptor
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise TltError(f"{path}: not a regular file, so it cannot hold a checkpoint")
                self._sizes[file] = status.st_size
            return self._descriptors[file]


def write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of `data` at absolute byte `position` of an open file.

    In pieces: for megabytes at once Linux takes fresh huge pages, which virtual machines get at a tenth of the speed.
    """
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written : written + _WRITE_BLOCK], position + written)


def start_writeback(descriptor: int, position: int, length: int) -> None:
    """Let the disk begin with these bytes now: then an fsync at the end finds little left. Advice, on Linux alone."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call(descriptor, ctypes.c_int64(position), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def _kernel_copy(source: int, offset: int, length: int, target: int, position: int) -> int:
    """How many bytes the kernel copied: all, or fewer where it cannot or where the source ends."""
    copied = 0
    if not hasattr(os, "copy_file_range"):
        return 0
    while copied < length:
        try:
            count = os.copy_file_range(source, target, length - copied, offset + copied, position + copied)
        except OSError as error:
            if error.errno in _COPY_ELSEWHERE:
                break
            raise
        if count == 0:
            break
        copied += count
    return copied
