"""A Plan: what will exist after a surgery and how each tensor is computed, from headers alone.

A surgery makes a Plan without opening a file; dry runs, early errors, disk checks, parallel and distributed writing
all follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Tensors(Protocol):
    """Where a plan's values come from: a checkpoint, or anything that reads tensors by name."""

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of its leading dim."""
        ...


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor that will exist. `compute` yields consecutive blocks of its rows in float32 or better.

    `source` is the tensor it mainly comes from; where `compute` is None it is that tensor, byte for byte.
    `work` is the peak memory in bytes that computing it takes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    compute: Callable[[Tensors], Iterable[torch.Tensor]] | None = None
    work: int = 0


@dataclass(frozen=True)
class Plan:
    """All tensors, the new config, what to tell the user, and the record that goes into the lineage."""

    operation: str
    tensors: tuple[PlannedTensor, ...]
    config: dict[str, Any]
    exact: bool
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes, as a family is fitted to them."""
        return {tensor.name: tensor.shape for tensor in self.tensors}

    @property
    def parameters(self) -> int:
        """Number of stored parameters."""
        total = 0
        for tensor in self.tensors:
            size = 1
            for length in tensor.shape:
                size *= length
            total += size
        return total
