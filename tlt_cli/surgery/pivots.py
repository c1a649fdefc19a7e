"""Factors of which one holds rows of the matrix as they are: r(m + n) - r^2 numbers instead of r(m + n).

b @ a = (b T^-1) (T a) for any invertible T. With T made of r rows of b, those rows of b T^-1 are the identity and need
no storage, and T a are rows of the matrix (the interpolative decomposition, Cheng, Gimbutas, Martinsson, Rokhlin 2005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 2.0  # of the entries of b T^-1: rows are exchanged until none is larger
_EXCHANGES = 4  # at most so many per row


@dataclass(frozen=True)
class Pivoted:
    """`rows` by matrix, ascending: which of its rows `right` [r, in] holds, matrix after matrix; `lefts` [out - k, r]
    have the others."""

    right: Tensor
    lefts: tuple[Tensor, ...]
    rows: dict[int, Tensor]


def pivot(right: Tensor, lefts: Sequence[Tensor], chosen: Sequence[int]) -> Pivoted:
    """Factors of the same products, lefts[i] @ right. The rows are taken from the `chosen` lefts [out, r] together.

    They are those that eliminate the lefts' orthonormal basis, exchanged until no other row needs one of them more than
    twice (a maximal volume, Goreinov et al. 2010): rounding is hardly amplified, whatever the condition of the lefts.
    """
    stacked = torch.cat([lefts[index] for index in chosen]).double()
    rank = stacked.shape[1]
    assert len(stacked) >= rank, "fewer rows than the rank"
    basis, upper = torch.linalg.qr(stacked)
    picked = _well_conditioned(basis)
    sizes = [len(lefts[index]) for index in chosen]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    order = picked.sort().values  # ascending in the stack: matrix after matrix
    rows = {
        index: order[(order >= starts[at]) & (order < starts[at + 1])] - starts[at] for at, index in enumerate(chosen)
    }
    square = basis[order]
    wide = right.double()
    new_lefts = []
    for index, left in enumerate(lefts):
        if index in rows:
            at = list(chosen).index(index)
            own = basis[int(starts[at]) : int(starts[at + 1])]
            others = torch.ones(len(own), dtype=torch.bool)
            others[rows[index]] = False
            new_lefts.append(torch.linalg.solve(square, own[others], left=False))
        else:
            new_lefts.append(left.double() @ torch.linalg.pinv(square @ upper))
    return Pivoted((square @ upper) @ wide, tuple(new_lefts), rows)


def _well_conditioned(basis: Tensor) -> Tensor:
    """Numbers of r rows of an orthonormal [m, r] that span it well."""
    count, rank = basis.shape
    order = torch.arange(count)
    for place, row in enumerate((torch.linalg.lu_factor(basis)[1] - 1).tolist()):
        order[[place, row]] = order[[row, place]]
    picked = order[:rank].clone()
    made_with = torch.linalg.solve(basis[picked], basis, left=False)  # [m, r], the identity in the picked rows
    for _ in range(_EXCHANGES * rank):
        row, column = divmod(int(made_with.abs().argmax()), rank)
        if abs(float(made_with[row, column])) <= _LARGEST:
            break
        step = made_with[row].clone()
        step[column] -= 1.0
        made_with.addr_(made_with[:, column] / made_with[row, column], step, alpha=-1.0)
        picked[column] = row
    return picked
