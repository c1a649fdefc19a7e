"""Folding an adapter into its base: W + s B A, one plain matrix again, every other tensor as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from tlt_cli.axes import shape
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.families import Fit
from tlt_cli.families.groups import refuse_grouped
from tlt_cli.surgery.fold import fold
from tlt_cli.surgery.plan import Plan

_BLOCK = 1 << 22  # entries that are added at a time


@dataclass(frozen=True)
class Update:
    """scale * b @ a for the module of that name; a [r, in], b [out, r]. `transposed`: the file stores [in, out]."""

    module: str
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    def rows(self, start: int, stop: int, columns: int) -> Tensor:
        """Rows of the stored update in float64, [stop - start, columns], with zeros where the base was made wider."""
        a, b = self.a.double(), self.b.double()
        left, right = (a.T, b.T) if self.transposed else (b, a)
        block = self.scale * (left[start:stop] @ right)
        return functional.pad(block, (0, columns - block.shape[1], 0, stop - start - block.shape[0]))


def fold_updates(
    fitted: Fit, dtypes: Mapping[str, str], updates: Sequence[Update], *, details: Mapping[str, Any]
) -> Plan:
    """The Plan of the base with all updates in it. `dtypes` are the base's by tensor name.

    Sums are computed in float64 and rounded once; a base of factors is folded first, as `fold` does it.
    """
    refuse_grouped(fitted.groups, "folding an adapter, which mixes all of them,")
    if fitted.lowrank is not None:
        plan = fold(fitted, dtypes)
    else:
        tensors = tuple(
            PlannedTensor(name, shape(place.arrow, fitted.sizes), dtypes[name], name)
            for name, place in fitted.places.items()
        )
        plan = Plan("fold", tensors, dict(fitted.config), exact=True, details={"family": fitted.family.name})
    by_name = {f"{update.module}.weight": update for update in updates}
    assert len(by_name) == len(updates) and by_name.keys() <= {tensor.name for tensor in plan.tensors}
    added = tuple(_added(tensor, by_name[tensor.name]) if tensor.name in by_name else tensor for tensor in plan.tensors)
    return replace(plan, tensors=added, details={**plan.details, **details, "updated": len(updates)})


def _added(tensor: PlannedTensor, update: Update) -> PlannedTensor:
    columns = tensor.shape[1]

    def compute(values: Tensors) -> Iterator[Tensor]:
        start = 0
        for block in tensor.compute(values) if tensor.compute is not None else _rows(tensor, values):
            yield block.double() + update.rows(start, start + len(block), columns)
            start += len(block)

    work = 8 * (3 * min(_BLOCK, math.prod(tensor.shape)) + update.a.numel() + update.b.numel())
    return replace(tensor, compute=compute, work=tensor.work + work)


def _rows(tensor: PlannedTensor, values: Tensors) -> Iterable[Tensor]:
    """The stored rows, a block at a time."""
    height = max(1, _BLOCK // max(1, tensor.shape[1]))
    for start in range(0, tensor.shape[0], height):
        yield values.read_rows(tensor.source, start, min(start + height, tensor.shape[0]))
