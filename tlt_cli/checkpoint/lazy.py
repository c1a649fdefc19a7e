"""A checkpoint whose headers are known and whose tensors are still in their files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from tlt_cli.checkpoint.files import OpenFiles
from tlt_cli.checkpoint.header import TensorInfo
from tlt_cli.errors import TltError

if TYPE_CHECKING:
    import torch

_HASHING_THREADS = 8
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors, still on disk, with everything that the headers say.

    `location` is the local folder or file, None where only the headers of a remote repository were
    read; `repository` and `revision` (a commit) are set for sources on the hub. `tensors` are in
    the order of their bytes, shard after shard. `parents` are the checkpoints that lie side by side in one that
    `together` made, else none.
    """

    source: str
    location: Path | None
    config: dict[str, Any] | None
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    shards: tuple[str, ...]
    companions: tuple[Path, ...]
    lineage: dict[str, Any] | None
    repository: str | None = None
    revision: str | None = None
    card: str | None = field(default=None, repr=False)
    parents: tuple[Checkpoint, ...] = field(default=(), repr=False)
    _files: OpenFiles | None = field(default=None, repr=False, compare=False)
    _digests: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own. Threads may read at the same time."""
        info = self._info(name)
        return self._read(info, info.shape, 0, info.nbytes)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the leading dim, [stop - start, ...]; no other bytes are read."""
        info = self._info(name)
        return self._rows(info, info.shape, start, stop)

    def read_vectors(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Vectors [start, stop) along the last dim, counted through all leading ones: [stop - start, last]."""
        info = self._info(name)
        return self._rows(info, (math.prod(info.shape[:-1]), *info.shape[-1:]), start, stop)

    def _rows(self, info: TensorInfo, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor as if it had this shape."""
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise TltError(f"{info.name} {list(info.shape)} has no rows {start}:{stop}")
        row_bits = info.nbytes * 8 // max(shape[0], 1)
        if row_bits % 8:
            raise TltError(f"{info.name} {info.dtype} {list(info.shape)}: rows end within a byte")
        begin, length = start * (row_bits // 8), (stop - start) * (row_bits // 8)
        return self._read(info, (stop - start, *shape[1:]), begin, length)

    def read_bytes(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes of the tensor from its byte `offset` on."""
        info = self._info(name)
        if not 0 <= offset <= offset + length <= info.nbytes:
            raise TltError(f"{name} holds {info.nbytes} bytes, not {offset}:{offset + length}")
        return self._open_files().read(info.file, info.start + offset, length)

    def copy_bytes(self, name: str, offset: int, length: int, *, descriptor: int, position: int) -> None:
        """Copy `length` bytes of the tensor, from its byte `offset` on, to `position` in a file open for writing.

        They do not pass through this process where the system can do without. OSError if it cannot be written.
        """
        info = self._info(name)
        assert 0 <= offset <= offset + length <= info.nbytes
        self._open_files().copy(info.file, info.start + offset, length, descriptor, position)

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors have the same dtype, shape and bytes; no more than two blocks are in memory."""
        one, two = self._info(name), self._info(other)
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        blocks = ((offset, min(_BLOCK, one.nbytes - offset)) for offset in range(0, one.nbytes, _BLOCK))
        return all(self.read_bytes(name, *block) == self.read_bytes(other, *block) for block in blocks)

    def digest(self) -> str:
        """sha256 of the weight file; of several shards, of what `sha256sum SHARDS` prints, sorted.

        Sources on the hub answer with the digests that the hub lists, without a download.
        """
        return self._hashing.result()

    def begin_digest(self) -> None:
        """Start hashing now, in the background: it takes no Python, so it overlaps with importing and planning."""
        assert self._hashing is not None

    @cached_property
    def _hashing(self) -> Future[str]:
        future: Future[str] = Future()

        def work() -> None:
            try:
                future.set_result(self._compute_digest())
            except BaseException as error:
                future.set_exception(error)

        Thread(target=work, daemon=True).start()  # a daemon: a command that fails early does not wait for it
        return future

    def _compute_digest(self) -> str:
        digests = dict(self._digests)
        unknown = [shard for shard in self.shards if shard not in digests]
        if unknown:
            files = self._open_files()
            with ThreadPoolExecutor(_HASHING_THREADS) as pool:
                digests.update(zip(unknown, pool.map(files.sha256, unknown), strict=True))
        if len(self.shards) == 1:
            return digests[self.shards[0]]
        lines = "".join(f"{digests[shard]}  {shard}\n" for shard in sorted(self.shards))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _read(self, info: TensorInfo, shape: tuple[int, ...], begin: int, length: int) -> torch.Tensor:
        import torch

        from tlt_cli.checkpoint.cast import memory, torch_dtype, torch_shape

        files = self._open_files()
        tensor = torch.empty(torch_shape(info.dtype, shape), dtype=torch_dtype(info.dtype))
        assert tensor.numel() * tensor.element_size() == length
        files.read_into(info.file, info.start + begin, memory(tensor))
        return tensor

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            near = get_close_matches(name, self.tensors, n=3) or list(self.tensors)[:3]
            raise TltError(f"{self.source} has no tensor {name!r}; the nearest are {near}")
        return self.tensors[name]

    def _open_files(self) -> OpenFiles:
        if self._files is None:
            raise TltError(f"{self.source}: only its headers were read; its values are on the hub")
        return self._files
