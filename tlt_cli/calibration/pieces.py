"""What a compressed block's matrices are made of while they are being fitted: two factors, or one matrix.

Leaves are plain tensors that a fit may move; pieces that share a leaf share a right factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlt_cli.surgery.matrices import Matrix

Slot = tuple[int, str]  # layer and role


@dataclass(eq=False)
class Dense:
    """A matrix kept whole [m, n]."""

    value: Tensor

    def weight(self) -> Tensor:
        """The matrix [m, n]."""
        return self.value

    def leaves(self) -> list[Tensor]:
        """What may be moved."""
        return [self.value]


@dataclass(eq=False)
class Low:
    """b @ a: a [r, n], b [m, r]. With pivots (r rows of it kept as they are) it is r (m + n) - r^2 numbers when stored,
    the same matrix: fitting needs no such care."""

    a: Tensor
    b: Tensor

    def weight(self) -> Tensor:
        """The matrix [m, n]."""
        return self.b @ self.a

    def leaves(self) -> list[Tensor]:
        """What may be moved."""
        return [self.a, self.b]


Piece = Dense | Low


def low(a: Tensor, bs: Sequence[Tensor]) -> list[Low]:
    """Factors of one right factor a [r, n] and its left ones, scaled so that row i of a and column i of all b together
    are equally long: steps of one size then suit both."""
    together = torch.cat(list(bs)).double()
    scale = (together.norm(dim=0) / a.double().norm(dim=1).clamp_min(1e-300)).sqrt().clamp_min(1e-30)
    shared = (a.double() * scale[:, None]).float().contiguous()
    return [Low(shared, (b.double() / scale).float().contiguous()) for b in bs]


def replacements(found: Iterable[Matrix], pieces: Mapping[Slot, Piece], layer: int) -> dict[str, Callable[[], Tensor]]:
    """Per stored tensor of a block how to put it together from its pieces, as the file stores it."""
    by_tensor: dict[str, list[Matrix]] = {}
    for matrix in found:
        if matrix.layer == layer:
            by_tensor.setdefault(matrix.tensor, []).append(matrix)
    return {name: _stored(parts, pieces) for name, parts in by_tensor.items()}


def _stored(parts: Sequence[Matrix], pieces: Mapping[Slot, Piece]) -> Callable[[], Tensor]:
    ordered = sorted(parts, key=lambda matrix: matrix.part or 0)

    def put_together() -> Tensor:
        values = [pieces[_slot(matrix)].weight() for matrix in ordered]
        value = values[0] if len(values) == 1 else torch.cat(values)
        return value.T if ordered[0].transposed else value

    return put_together


def _slot(matrix: Matrix) -> Slot:
    assert matrix.layer is not None and matrix.role is not None
    return matrix.layer, matrix.role
