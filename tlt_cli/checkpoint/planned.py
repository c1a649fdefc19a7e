"""What a writer must know of a tensor that does not exist yet: its name, shape, dtype, and how its rows are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Tensors(Protocol):
    """Where values come from: a checkpoint, or anything that reads tensors by name."""

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of its leading dim."""
        ...


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a stored tensor's leading dim."""

    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor that will exist. `compute` yields consecutive blocks of its rows, in float32 or better where
    anything is computed.

    `source` is the tensor it mainly comes from; where `compute` is None it is that tensor, byte for byte (cast where
    `dtype` is another one). `copies` are stored rows whose bytes, one after the other, are what `compute` gives: where
    all of them have this dtype they are copied and nothing is computed. `work` is the peak memory in bytes that
    computing takes. `file` names a file of its own beside the model's, such as the optimizer's state; None where the
    tensor belongs to the model.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    compute: Callable[[Tensors], Iterable[torch.Tensor]] | None = None
    work: int = 0
    file: str | None = None
    copies: tuple[Rows, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)
