"""One tensor of a part: entries of the parent's tensor along every dim, times factors. The same for files and views."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlt_cli.checkpoint.planned import Tensors

Index = NDArray[np.int64]
_BLOCK = 1 << 20  # elements of the parent that are kept of one block of rows
_SPAN = 4  # how many times as many rows may be read in one go as are kept


@dataclass(frozen=True, eq=False)
class Cut:
    """One tensor of a part: entries of each stored dim of the parent's `source` (None: all), times `factors` by dim.

    A gain stored as w + `offset` is multiplied with its offset. `shape` is that of the result, `row` the number of
    entries of one row of the parent's.
    """

    source: str
    shape: tuple[int, ...]
    kept: tuple[Index | None, ...]
    factors: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)
    offset: float = 0.0
    row: int = 1

    @property
    def plain(self) -> bool:
        """Whether the tensor goes over as it is."""
        return not self.factors and all(kept is None for kept in self.kept)

    @property
    def rows(self) -> tuple[int, int] | None:
        """The rows [start, stop) of the parent's tensor that the part's is, byte for byte; None where it is not."""
        if self.factors or any(kept is not None for kept in self.kept[1:]):
            return None
        first = np.arange(self.shape[0]) if self.kept[0] is None else self.kept[0]
        if np.any(np.diff(first) != 1):
            return None
        return int(first[0]), int(first[-1]) + 1

    @property
    def work(self) -> int:
        """Peak bytes of memory that computing takes, roughly."""
        return 8 * (_SPAN + 3) * max(_BLOCK, self.row) if len(self.shape) > 1 else 24 * self.shape[0]

    def of(self, parent: Tensor, first: int = 0) -> Tensor:
        """The part's tensor [*shape] of the parent's, differentiably; a view where entries follow each other.

        `parent` may hold the rows from `first` on alone, and then every kept row must be among them.
        """
        found = parent
        for dim, kept in enumerate(self.kept):
            if kept is not None:
                found = _take(found, dim, kept - first if dim == 0 and first else kept)
        if not self.factors:
            return found
        found = found + self.offset if self.offset else found
        for dim, factors in self.factors.items():
            shape = [-1 if at == dim else 1 for at in range(found.dim())]
            found = found * torch.from_numpy(factors).to(found).reshape(shape)
        return found - self.offset if self.offset else found

    def between(self, start: int, stop: int) -> Cut:
        """The rows from `start` to `stop` of the result alone."""
        rows = np.arange(start, stop) if self.kept[0] is None else self.kept[0][start:stop]
        factors = {dim: by[start:stop] if dim == 0 else by for dim, by in self.factors.items()}
        return replace(self, shape=(len(rows), *self.shape[1:]), kept=(rows, *self.kept[1:]), factors=factors)

    def __call__(self, tensors: Tensors) -> Iterator[Tensor]:
        """Consecutive blocks of the part's rows, with a few MB of the parent's in memory: as they are stored where
        entries only move, else in float32 or better."""
        if len(self.shape) == 1:
            # in float64, for a gain stored as 1 + w must come back from its sum with 1
            vector = tensors.read(self.source)
            yield self.of(vector.double() if self.factors else vector).contiguous()
            return
        step = max(1, _BLOCK // self.row)
        for start in range(0, self.shape[0], step):
            yield self.between(start, min(self.shape[0], start + step)).read(tensors).contiguous()

    def read(self, tensors: Tensors, dtype: torch.dtype | None = None) -> Tensor:
        """The part's tensor [*shape] of the parent's rows that it needs, computed in `dtype`; without one as it is
        stored where entries only move, else in float32 or better."""
        rows = np.arange(self.shape[0]) if self.kept[0] is None else self.kept[0]
        block = _read_rows(tensors, self.source, rows)
        kind = dtype or (block.dtype if block.dtype == torch.float64 or not self.factors else torch.float32)
        return replace(self, kept=(None, *self.kept[1:])).of(block.to(kind))


def _read_rows(tensors: Tensors, name: str, rows: Index) -> Tensor:
    """Rows of a stored tensor in any order: of one stretch where they lie close, else run by run."""
    low, high = int(rows.min()), int(rows.max()) + 1
    if high - low <= _SPAN * len(rows):
        return _take(tensors.read_rows(name, low, high), 0, rows - low)
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return torch.cat([tensors.read_rows(name, int(run[0]), int(run[-1]) + 1) for run in runs])


def _take(tensor: Tensor, dim: int, kept: Index) -> Tensor:
    steps = np.diff(kept)
    if len(kept) and (len(kept) == 1 or (steps[0] > 0 and np.all(steps == steps[0]))):
        step = int(steps[0]) if len(steps) else 1
        where: list[slice] = [slice(None)] * tensor.dim()
        where[dim] = slice(int(kept[0]), int(kept[-1]) + 1, step)
        return tensor[tuple(where)]
    return tensor.index_select(dim, torch.from_numpy(kept).to(tensor.device))
