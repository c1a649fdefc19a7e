"""A Plan: what will exist after a surgery and how each tensor is computed, from headers alone.

A surgery makes a Plan without opening a file; dry runs, early errors, disk checks, parallel and distributed writing
all follow from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tlt_cli.checkpoint.planned import PlannedTensor


@dataclass(frozen=True)
class Plan:
    """All tensors, the new config, what to tell the user, and the record that goes into the lineage.

    `exact` says whether the result computes what the source computed. `details` are JSON-able.
    """

    operation: str
    tensors: tuple[PlannedTensor, ...]
    config: dict[str, Any]
    exact: bool
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes, as a family is fitted to them."""
        return {tensor.name: tensor.shape for tensor in self.tensors if tensor.file is None}

    @property
    def parameters(self) -> int:
        """Number of stored parameters."""
        return sum(tensor.parameters for tensor in self.tensors if tensor.file is None)
