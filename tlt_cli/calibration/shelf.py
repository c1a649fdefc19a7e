"""Tensors put away in a temporary file until they are wanted: what would grow with the number of blocks lies on disk.

The file lies where TMPDIR says and has no name: however the program ends, killed or not, its space is free again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterator, MutableMapping
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from tlt_cli.errors import TltError

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class _Place:
    """Where in the file a tensor lies, in bytes, and what it is."""

    start: int
    stop: int
    shape: torch.Size
    dtype: torch.dtype


class Shelf(MutableMapping[Key, Tensor]):
    """A mapping of tensors of which memory holds none: each is read anew, bit by bit as it was.

    Several threads may use it at once. What is read belongs to the reader: to change it changes nothing here. Whatever
    is taken away from the end of the file makes it shorter.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="tlt-")  # noqa: SIM115 - closed with the shelf
        self._places: dict[Key, _Place] = {}
        self._end = 0
        self._lock = Lock()

    def __setitem__(self, key: Key, value: Tensor) -> None:
        data = _bytes(value.detach().cpu().contiguous())
        with self._lock:
            old = self._places.get(key)
            start = old.start if old is not None and old.stop - old.start == len(data) else self._end
            try:
                self._file.seek(start)
                self._file.write(data)
                self._file.flush()  # a full disk is known here, not in some later read
            except OSError as error:
                raise TltError(
                    f"what calibration puts away in {tempfile.gettempdir()} does not fit: {error.strerror}; set TMPDIR "
                    "to a folder with more room"
                ) from error
            self._end = max(self._end, start + len(data))
            self._places[key] = _Place(start, start + len(data), value.shape, value.dtype)

    def __getitem__(self, key: Key) -> Tensor:
        place = self._places[key]
        found = torch.empty(place.shape, dtype=place.dtype)
        with self._lock:
            self._file.seek(place.start)
            read = self._file.readinto(_bytes(found))
        assert read == place.stop - place.start
        return found

    def __delitem__(self, key: Key) -> None:
        with self._lock:
            place = self._places.pop(key)
            if place.stop == self._end:
                self._end = place.start
                self._file.truncate(self._end)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[Key]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _bytes(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    found: memoryview = value.reshape(-1).view(torch.uint8).numpy().data
    return found
