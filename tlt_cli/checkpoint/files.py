"""Bytes of files by position: one descriptor per file, shared by all threads.

Reads go through pread and not through a mapping: mapped pages count as the process's own memory,
and a file that shrinks under a mapping kills the process where a short read can be reported.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from tlt_cli.errors import TltError

_HASH_BLOCK = 4 << 20


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
                try:
                    descriptor = os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC)
                    self._sizes[file] = os.fstat(descriptor).st_size
                except OSError as error:
                    raise TltError(f"{self._paths[file]}: cannot open: {error.strerror}") from error
                self._descriptors[file] = descriptor
            return self._descriptors[file]
