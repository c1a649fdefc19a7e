"""What a compressed block's matrices are made of while they are being fitted: two factors, or one matrix.

Leaves are plain tensors that a fit may move; pieces that share a leaf share a right factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlt_cli.calibration.shelf import Shelf
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
PieceAt = Callable[[Slot], Piece]


def low(a: Tensor, bs: Sequence[Tensor]) -> list[Low]:
    """Factors of one right factor a [r, n] and its left ones, scaled so that row i of a and column i of all b together
    are equally long: steps of one size then suit both."""
    together = torch.cat(list(bs)).double()
    scale = (together.norm(dim=0) / a.double().norm(dim=1).clamp_min(1e-300)).sqrt().clamp_min(1e-30)
    shared = (a.double() * scale[:, None]).float().contiguous()
    return [Low(shared, (b.double() / scale).float().contiguous()) for b in bs]


@dataclass(frozen=True)
class Part:
    """What is known of a piece [rows, columns] without its numbers: the rank, None where it is whole, and the slot
    under which its right factor is kept, its own or the one it shares with."""

    rows: int
    columns: int
    rank: int | None
    owner: Slot


class Pieces:
    """The pieces of all blocks, on disk: whoever asks for them gets their own. `parts` tells what there is."""

    def __init__(self) -> None:
        self.parts: dict[Slot, Part] = {}
        self._values = Shelf[tuple[Slot, str]]()

    def put(self, layer: int, pieces: Mapping[str, Piece]) -> None:
        """Keep a block's pieces by role, instead of those that were there."""
        owners: dict[int, Slot] = {}
        for role, piece in pieces.items():
            slot = layer, role
            if isinstance(piece, Dense):
                self.parts[slot] = Part(len(piece.value), piece.value.shape[1], None, slot)
                self._values[slot, "whole"] = piece.value
                continue
            owner = owners.setdefault(id(piece.a), slot)
            self.parts[slot] = Part(len(piece.b), piece.a.shape[1], len(piece.a), owner)
            self._values[slot, "left"] = piece.b
            if owner == slot:
                self._values[slot, "right"] = piece.a

    def block(self, layer: int) -> dict[str, Piece]:
        """A block's pieces by role; those that share a right factor share the tensor."""
        rights: dict[Slot, Tensor] = {}
        found: dict[str, Piece] = {}
        for slot, part in self.parts.items():
            if slot[0] == layer and part.rank is not None and part.owner not in rights:
                rights[part.owner] = self._values[part.owner, "right"]
            if slot[0] == layer:
                found[slot[1]] = self._piece(slot, rights.get(part.owner))
        return found

    def piece(self, slot: Slot) -> Piece:
        """One piece alone."""
        part = self.parts[slot]
        return self._piece(slot, None if part.rank is None else self._values[part.owner, "right"])

    def _piece(self, slot: Slot, right: Tensor | None) -> Piece:
        return Dense(self._values[slot, "whole"]) if right is None else Low(right, self._values[slot, "left"])


def replacements(found: Iterable[Matrix], piece: PieceAt, layer: int) -> dict[str, Callable[[], Tensor]]:
    """Per stored tensor of a block how to put it together from its pieces, as the file stores it."""
    by_tensor: dict[str, list[Matrix]] = {}
    for matrix in found:
        if matrix.layer == layer:
            by_tensor.setdefault(matrix.tensor, []).append(matrix)
    return {name: put_together(parts, piece) for name, parts in by_tensor.items()}


def put_together(parts: Sequence[Matrix], piece: PieceAt) -> Callable[[], Tensor]:
    """How the stored tensor of all these parts comes about, in the layout of the file."""
    ordered = sorted(parts, key=lambda matrix: matrix.part or 0)

    def made() -> Tensor:
        values = [piece(slot_of(matrix)).weight() for matrix in ordered]
        value = values[0] if len(values) == 1 else torch.cat(values)
        return value.T if ordered[0].transposed else value

    return made


def slot_of(matrix: Matrix) -> Slot:
    """The layer and role of a block's matrix."""
    assert matrix.layer is not None and matrix.role is not None
    return matrix.layer, matrix.role
