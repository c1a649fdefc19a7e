"""Token ids in a file, .npy, .bin or .safetensors: mapped, not read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tlt_cli.checkpoint.local import open_file
from tlt_cli.errors import TltError

SUFFIXES = (".npy", ".bin", ".safetensors")
_BLOCK = 1 << 22  # ids looked at together
_SHARD_MARK, _SHARD_HEADER = (20240520, 1), 1024  # llm.c's shards say what they are before the ids, nanoGPT's do not
_STORED = {"U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8"}


def open_ids(path: Path) -> np.ndarray:
    """The ids [N] that a file holds, of its own integer type. Raises TltError where it holds something else."""
    try:
        found = _opened(path)
    except OSError as error:
        raise TltError(f"cannot read {path}: {error.strerror or error}") from error
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise TltError(f"{path} holds {found.dtype} {list(found.shape)}; token ids are integers in one dimension")
    if not len(found):
        raise TltError(f"{path} holds no ids")
    return found


def _opened(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        try:
            found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise TltError(f"{path} cannot be read as .npy: {error}") from error
        return found
    if path.suffix == ".bin":
        size = path.stat().st_size
        if size % 2:
            raise TltError(f"{path} is {size} bytes long, an odd number; a .bin holds ids as uint16, two bytes each")
        start = _SHARD_HEADER if tuple(np.fromfile(path, "<i4", 2)) == _SHARD_MARK else 0
        return np.memmap(path, dtype="<u2", mode="r", offset=start) if size > start else np.empty(0, dtype="<u2")
    tensors = open_file(path, str(path)).tensors
    if len(tensors) != 1:
        raise TltError(f"{path} holds {len(tensors)} tensors; a file of token ids holds one")
    (tensor,) = tensors.values()
    if tensor.dtype not in _STORED:
        raise TltError(f"{path}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}; token ids are integers")
    if not tensor.nbytes:
        return np.empty(tensor.shape, dtype=_STORED[tensor.dtype])
    return np.memmap(path, dtype=_STORED[tensor.dtype], mode="r", offset=tensor.start, shape=tensor.shape)


def checked_blocks(ids: np.ndarray, path: Path, vocab: int) -> Iterator[np.ndarray]:
    """ids [N] block by block. Raises TltError for an id that the vocabulary does not have."""
    for first in range(0, len(ids), _BLOCK):
        block = ids[first : first + _BLOCK]
        for wrong in (int(block.max()), int(block.min())):
            if not 0 <= wrong < vocab:
                at = first + int((block == wrong).argmax())
                raise TltError(
                    f"{path}: id {wrong} at place {at} is not in the vocabulary of {vocab}; "
                    "were these ids made with the tokenizer of this checkpoint?"
                )
        yield block
