"""A checkpoint opened lazily: headers are read and checked at once, tensors one at a time.

A source is a .safetensors/.st file, a folder in Hugging Face layout or a repository of the hub. All
three become the same Checkpoint, and nothing behind this file knows which of them it was.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_cli.checkpoint import folder as layout
from tlt_cli.checkpoint.files import OpenFiles
from tlt_cli.checkpoint.header import (
    DTYPE_BITS,
    PREFIX_BYTES,
    TensorInfo,
    header_length,
    parse_header,
)
from tlt_cli.errors import TltError

if TYPE_CHECKING:
    import torch

_HASHING_THREADS = 8
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^\s@]+)?\Z")


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors, still on disk, with everything that the headers say.

    `location` is the local folder or file, None where only the headers of a remote repository were
    read; `repository` and `revision` (a commit) are set for sources on the hub. `tensors` are in
    the order of their bytes, shard after shard.
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
    _files: OpenFiles | None = field(default=None, repr=False, compare=False)
    _digests: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own. Threads may read at the same time."""
        info = self._info(name)
        return self._read(info, info.shape, 0, info.nbytes)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the leading dim, [stop - start, ...]; no other bytes are read."""
        info = self._info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise TltError(f"{name} {list(info.shape)} has no rows {start}:{stop}")
        row_bits = info.nbytes * 8 // max(info.shape[0], 1)
        if row_bits % 8:
            raise TltError(f"{name} {info.dtype} {list(info.shape)}: rows end within a byte")
        begin, length = start * (row_bits // 8), (stop - start) * (row_bits // 8)
        return self._read(info, (stop - start, *info.shape[1:]), begin, length)

    def read_bytes(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes of the tensor from its byte `offset` on."""
        info = self._info(name)
        if not 0 <= offset <= offset + length <= info.nbytes:
            raise TltError(f"{name} holds {info.nbytes} bytes, not {offset}:{offset + length}")
        return self._open_files().read(info.file, info.start + offset, length)

    def digest(self) -> str:
        """sha256 of the weight file; of several shards, of what `sha256sum SHARDS` prints, sorted.

        Sources on the hub answer with the digests that the hub lists, without a download.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
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

    def _read(
        self, info: TensorInfo, shape: tuple[int, ...], begin: int, length: int
    ) -> torch.Tensor:
        import torch

        from tlt_cli.checkpoint.cast import memory, torch_dtype, torch_shape

        files = self._open_files()
        tensor = torch.empty(torch_shape(info.dtype, shape), dtype=torch_dtype(info.dtype))
        assert tensor.numel() * tensor.element_size() == length
        files.read_into(info.file, info.start + begin, memory(tensor))
        return tensor

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            from difflib import get_close_matches

            near = get_close_matches(name, self.tensors, n=3) or list(self.tensors)[:3]
            raise TltError(f"{self.source} has no tensor {name!r}; the nearest are {near}")
        return self.tensors[name]

    def _open_files(self) -> OpenFiles:
        if self._files is None:
            raise TltError(f"{self.source}: only its headers were read; its values are on the hub")
        return self._files


def open_checkpoint(source: str | Path, *, values: bool = True) -> Checkpoint:
    """Find, read and check the headers of `source`.

    An existing path wins; "hf://..." and URLs of the hub are always remote; a bare "org/name" or
    "org/name@revision" is remote where no such path exists. With `values=False` a remote source is
    known by kilobytes of headers alone and cannot be read. Raises TltError for whatever is wrong.
    """
    text = str(source)
    if text.startswith(("hf://", "http://", "https://")):
        return _open_remote(text, text, values)
    path = Path(source).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise TltError(f"{text!r}: not a usable path: {error}") from None
    if is_folder:
        return open_folder(path, text)
    if exists:
        layout.check_file_name(path.name)
        return open_file(path, text)
    if isinstance(source, str) and _REPOSITORY.match(text) and not text.endswith(_FILE_SUFFIXES):
        return _open_remote(text, "hf://" + text, values)
    raise TltError(f"{text}: no such file or folder")


_FILE_SUFFIXES = layout.SAFE_SUFFIXES + layout.PICKLE_SUFFIXES


def open_file(path: Path, source: str) -> Checkpoint:
    """One weight file; its config is in its metadata, or else in the config.json beside it."""
    files = OpenFiles({path.name: path})
    tensors, metadata = read_header(files, path.name, str(path))
    if "config" in metadata:
        config = layout.parse_config(metadata["config"], f"{path}: __metadata__ config")
    else:
        config = _config_in(path.parent)
    return Checkpoint(
        source=source,
        location=path,
        config=config,
        tensors=tensors,
        metadata=metadata,
        shards=(path.name,),
        companions=layout.companions_of_file(path),
        lineage=lineage_in(metadata),
        _files=files,
    )


def open_folder(path: Path, source: str) -> Checkpoint:
    """A folder with one weight file, or with an index and its shards."""
    try:
        names = [entry.name for entry in path.iterdir() if not entry.is_dir()]
        companions = layout.companions_of_folder(path)
        card = path / "README.md"
        card_text = card.read_text("utf-8", errors="replace") if card.is_file() else None
        chosen = layout.choose_weights(names, str(path))
        index = (path / chosen).read_bytes() if chosen == layout.INDEX else None
    except OSError as error:
        raise TltError(f"{path}: cannot read: {error.strerror}") from error
    where = f"{path / chosen}"
    weight_map = None if index is None else layout.parse_index(index, where, names)
    shards = (chosen,) if weight_map is None else tuple(sorted(set(weight_map.values())))
    files = OpenFiles({shard: path / shard for shard in shards})
    headers = {shard: read_header(files, shard, str(path / shard)) for shard in shards}
    tensors, metadata = merge_headers(headers, weight_map, where)
    config = _config_in(path)
    if config is None and "config" in metadata:
        config = layout.parse_config(metadata["config"], f"{path}: __metadata__ config")
    return Checkpoint(
        source=source,
        location=path,
        config=config,
        tensors=tensors,
        metadata=metadata,
        shards=shards,
        companions=companions,
        lineage=lineage_in(metadata),
        card=card_text,
        _files=files,
    )
