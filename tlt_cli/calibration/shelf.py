"""Tensors put away in a temporary folder until they are wanted: what would grow with the number of blocks lies on disk.

The folder is made where TMPDIR says, and goes when nothing refers to it any more, or at the end of the program.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Hashable, Iterator, MutableMapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


class Shelf(MutableMapping[Key, Tensor]):
    """A mapping of tensors of which memory holds none: each is read anew, from a file of its own, bit by bit as it was.

    Several threads may read at once. What is read belongs to the reader: to change it changes nothing here.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tlt-"))
        self._kept: dict[Key, tuple[Path, torch.Size, torch.dtype]] = {}
        self._count = 0
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __setitem__(self, key: Key, value: Tensor) -> None:
        path = self._folder / str(self._count)
        self._count += 1
        value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(path)
        self.pop(key, None)
        self._kept[key] = path, value.shape, value.dtype

    def __getitem__(self, key: Key) -> Tensor:
        path, shape, dtype = self._kept[key]
        found = torch.empty(shape, dtype=dtype)
        if found.numel():
            with path.open("rb") as file:
                read = file.readinto(found.reshape(-1).view(torch.uint8).numpy().data)
            assert read == found.numel() * found.element_size()
        return found

    def __delitem__(self, key: Key) -> None:
        self._kept.pop(key)[0].unlink()

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def __iter__(self) -> Iterator[Key]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
