"""A Plan for factored matrices of any checkpoint, family known or not: multiplied out, or as two tensors each.

Needs names and shapes alone. What a known family's runtime wants beside them is the business of `lowrank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tlt_cli.checkpoint.header import TensorInfo
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.surgery.matrices import Matrix, write_back
from tlt_cli.surgery.plan import Plan

OPERATION = "factor"
Factors = Callable[[Matrix, int], tuple[Tensor, Tensor]]


def multiplied_plan(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
    ranks: Mapping[Matrix, int],
    factors: Factors,
    *,
    details: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Plan:
    """Every tensor as it was, those of `ranks` with b @ a in the matrices' places: stock, and no smaller."""
    by_tensor: dict[str, list[Matrix]] = {}
    for matrix in ranks:
        by_tensor.setdefault(matrix.tensor, []).append(matrix)

    def computed(name: str) -> Callable[[Tensors], Iterator[Tensor]]:
        def compute(values: Tensors) -> Iterator[Tensor]:
            stored = values.read(name)
            products = {}
            for matrix in by_tensor[name]:
                a, b = factors(matrix, ranks[matrix])
                products[matrix] = b @ a
            yield write_back(stored.to(torch.promote_types(stored.dtype, torch.float32)), products)

        return compute

    planned = [
        PlannedTensor(
            name, info.shape, info.dtype, name,
            computed(name) if name in by_tensor else None, work=16 * math.prod(info.shape) if name in by_tensor else 0,
        )
        for name, info in tensors.items()
    ]  # fmt: skip
    return Plan(OPERATION, tuple(planned), dict(config or {}), exact=False, details=dict(details), notes=tuple(notes))


def separate_plan(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
    ranks: Mapping[Matrix, int],
    factors: Factors,
    *,
    details: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Plan:
    """`<slot>.lowrank_a.weight` [r, in] and `<slot>.lowrank_b.weight` [out, r] instead of each matrix of `ranks`.

    For checkpoints of no known family, where every matrix is a tensor of its own.
    """
    by_tensor = {matrix.tensor: matrix for matrix in ranks}
    assert len(by_tensor) == len(ranks), "without a family nothing is known to be fused"
    planned = []
    for name, info in tensors.items():
        if name not in by_tensor:
            planned.append(PlannedTensor(name, info.shape, info.dtype, name))
            continue
        matrix = by_tensor[name]
        rank, work = ranks[matrix], 16 * matrix.size
        for side, shape in enumerate(((rank, matrix.columns), (matrix.rows, rank))):
            stored = f"{matrix.name}.lowrank_{'ab'[side]}.weight"
            planned.append(PlannedTensor(stored, shape, info.dtype, name, _side(factors, matrix, rank, side), work))
    changed = {**(config or {}), "lowrank": {"version": 1, "ranks": {matrix.name: ranks[matrix] for matrix in ranks}}}
    return Plan(OPERATION, tuple(planned), changed, exact=False, details=dict(details), notes=tuple(notes))


def _side(factors: Factors, matrix: Matrix, rank: int, side: int) -> Callable[[Tensors], Iterator[Tensor]]:
    def compute(values: Tensors) -> Iterator[Tensor]:
        yield factors(matrix, rank)[side].contiguous()

    return compute
