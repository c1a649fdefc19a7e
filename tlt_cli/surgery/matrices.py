"""Which matrices a checkpoint holds, whatever their storage: plain, transposed, fused with others, or a convolution.

A *slot* names one matrix: the module's name, with ".0", ".1", ... behind it where the module stores several fused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from tlt_cli import axes
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit, Place
from tlt_cli.families.place import named

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tlt_cli.checkpoint.planned import Tensors

FLOATS = ("F64", "F32", "F16", "BF16")
LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Matrix:
    """One matrix [rows, columns], outputs by inputs, and where it lies.

    `tensor` is the stored tensor; `transposed` says that it is stored inputs by outputs; `part` of `parts` equal slices
    of its outputs. `role` and `layer` come from the family's wiring. `stored` is the stored tensor's whole shape.
    """

    name: str
    tensor: str
    rows: int
    columns: int
    transposed: bool
    part: int | None = None
    parts: int | None = None
    role: str | None = None
    layer: int | None = None
    stored: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.rows * self.columns

    @property
    def full_rank(self) -> int:
        """The largest rank it can have."""
        return min(self.rows, self.columns)

    @property
    def break_even(self) -> int:
        """The smallest rank whose two factors are no fewer numbers than the matrix itself: r (m + n) >= m n."""
        return -(-self.size // (self.rows + self.columns))


def matrices(shapes: Mapping[str, Sequence[int]], fitted: Fit | None, *, only: Sequence[str] = ()) -> list[Matrix]:
    """The matrices of tensors of these shapes, in their order.

    With a family: the linears of its blocks; embeddings and the head only where a glob of `only` names them. Without:
    every tensor of two dims, and every "*.weight" of more, as its leading dim by the rest. `only` keeps those whose
    slot or stored tensor one of its globs matches; UsageError for a glob that matches none, with the nearest names.
    """
    known = _all(shapes) if fitted is None else _of_family(shapes, fitted)
    if not only:
        return [matrix for matrix in known if fitted is None or matrix.role in LINEARS]
    for glob in only:
        if not any(_named(matrix, glob) for matrix in known):
            names = [matrix.name for matrix in known]
            near = get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
            raise UsageError(f"--only {glob}: no matrix of the checkpoint is called that; the nearest are {near}")
    return [matrix for matrix in known if any(_named(matrix, glob) for glob in only)]


def by_layer(found: Iterable[Matrix]) -> dict[int, dict[str, Matrix]]:
    """The linears of blocks among these matrices, by layer and by role."""
    layers: dict[int, dict[str, Matrix]] = {}
    for matrix in found:
        assert matrix.layer is not None and matrix.role is not None
        layers.setdefault(matrix.layer, {})[matrix.role] = matrix
    return layers


def linears(fitted: Fit) -> dict[int, dict[str, Matrix]]:
    """All linears of a model's blocks, by layer and by role."""
    return by_layer(
        matrices({name: axes.shape(spot.arrow, fitted.sizes) for name, spot in fitted.places.items()}, fitted)
    )


def head_name(fitted: Fit) -> str:
    """The stored tensor that makes logits: the embedding where it is the head too."""
    found = named(fitted.places, "embedding" if fitted.tied else "head")
    assert found is not None
    return found


def _named(matrix: Matrix, glob: str) -> bool:
    return fnmatchcase(matrix.name, glob) or fnmatchcase(matrix.tensor, glob)


def _all(shapes: Mapping[str, Sequence[int]]) -> list[Matrix]:
    found = []
    for name, shape in shapes.items():
        if len(shape) == 2 or (len(shape) > 2 and name.endswith(_WEIGHT)):
            rows, columns = shape[0], math.prod(shape[1:])
            if min(rows, columns) > 1:
                slot = name.removesuffix(_WEIGHT)
                found.append(Matrix(slot, name, rows, columns, False, stored=tuple(shape)))
    return found


def _of_family(shapes: Mapping[str, Sequence[int]], fitted: Fit) -> list[Matrix]:
    return [
        matrix
        for name, place in fitted.places.items()
        if place.kind == "weight" and place.arrow.sign and place.roles and len(shapes[name]) == 2
        for matrix in _parts(name, tuple(shapes[name]), place)
    ]


def _parts(name: str, shape: tuple[int, ...], place: Place) -> list[Matrix]:
    slot, transposed = name.removesuffix(_WEIGHT), place.arrow.sign == "->"
    rows, columns = shape[::-1] if transposed else shape
    count = len(place.roles)
    if count == 1:
        return [Matrix(slot, name, rows, columns, transposed, None, None, place.roles[0], place.layer, shape)]
    if rows % count:
        raise TltError(
            f"{name} {list(shape)} fuses {', '.join(place.roles)}, but {rows} outputs are not {count} equal parts"
        )
    return [
        Matrix(f"{slot}.{part}", name, rows // count, columns, transposed, part, count, role, place.layer, shape)
        for part, role in enumerate(place.roles)
    ]


def read_matrix(values: Tensors, matrix: Matrix, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix [rows, columns], in float32 where no dtype is given. TltError where it holds NaN or infinity."""
    import torch

    if matrix.part is not None and not matrix.transposed:
        start = matrix.part * matrix.rows
        stored = values.read_rows(matrix.tensor, start, start + matrix.rows)
    else:
        stored = values.read(matrix.tensor)
    value = part_of(stored, matrix) if matrix.part is not None and matrix.transposed else stored
    value = value.T if matrix.transposed else value.reshape(matrix.rows, matrix.columns)
    value = value.to(dtype or torch.float32).contiguous()
    if not torch.stack(torch.aminmax(value)).isfinite().all():
        raise TltError(f"{matrix.tensor} holds NaN or infinite values: the weights are broken")
    return value


def write_back(stored: Tensor, changed: Mapping[Matrix, Tensor]) -> Tensor:
    """A copy of the stored tensor in which these matrices have these values [rows, columns]; the rest is as it was."""
    result = stored.clone()
    for matrix, value in changed.items():
        put(result, matrix, value)
    return result


def put(stored: Tensor, matrix: Matrix, value: Tensor) -> None:
    """Write the matrix's values [rows, columns] into the stored tensor."""
    assert value.shape == (matrix.rows, matrix.columns) and tuple(stored.shape) == matrix.stored
    target = part_of(stored, matrix)
    target.copy_((value.T if matrix.transposed else value).reshape(target.shape))


def part_of(stored: Tensor, matrix: Matrix) -> Tensor:
    """The part of the whole stored tensor that is this matrix: a view, in the layout of the file."""
    if matrix.part is None:
        return stored
    return stored.narrow(1 if matrix.transposed else 0, matrix.part * matrix.rows, matrix.rows)
