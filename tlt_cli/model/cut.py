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
_BLOCK = 1 << 20  # elements that are read at a time


@dataclass(frozen=True, eq=False)
class Cut:
    """One tensor of a part: entries of each stored dim of the parent's `source` (None: all), times `factors` by dim.

    A gain stored as w + `offset` is multiplied with its offset. `shape` is that of the result.
    """

    source: str
    shape: tuple[int, ...]
    kept: tuple[Index | None, ...]
    factors: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)
    offset: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether the tensor goes over as it is."""
        return not self.factors and all(kept is None for kept in self.kept)

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

    def __call__(self, tensors: Tensors) -> Iterator[Tensor]:
        """Consecutive blocks of the part's rows, in float32 or better, with a few MB of the parent's in memory."""
        rows = self.kept[0]
        if len(self.shape) == 1:
            yield self.of(tensors.read(self.source).double())
            return
        count = self.shape[0]
        wide = max(self.shape[1:][0], 1)
        step = max(1, _BLOCK // wide)
        for start in range(0, count, step):
            some = np.arange(start, min(count, start + step)) if rows is None else rows[start : start + step]
            low, high = int(some.min()), int(some.max()) + 1
            block = tensors.read_rows(self.source, low, high)
            block = block if block.dtype == torch.float64 or not self.factors else block.float()
            factors = {
                dim: factors[start : start + step] if dim == 0 else factors for dim, factors in self.factors.items()
            }
            piece = replace(self, kept=(some, *self.kept[1:]), factors=factors)
            found = piece.of(block, low)
            yield (found if found.dtype == torch.float64 else found.float()).contiguous()


def _take(tensor: Tensor, dim: int, kept: Index) -> Tensor:
    steps = np.diff(kept)
    if len(kept) and (len(kept) == 1 or (steps[0] > 0 and np.all(steps == steps[0]))):
        step = int(steps[0]) if len(steps) else 1
        where: list[slice] = [slice(None)] * tensor.dim()
        where[dim] = slice(int(kept[0]), int(kept[-1]) + 1, step)
        return tensor[tuple(where)]
    return tensor.index_select(dim, torch.from_numpy(kept).to(tensor.device))
