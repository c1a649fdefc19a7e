"""What was written, held against the source matrix by matrix: the errors that a factorization reports.

Both are measured on the file's own tensors. The relative error is ||W - W'|| / ||W||; the metric's is the same in the
norm that the method makes small (`metrics.energy`), and has the method's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.families import Fit
from tlt_cli.surgery.fold import fold
from tlt_cli.surgery.matrices import Matrix, read_matrix
from tlt_cli.surgery.metrics import Seen, energy

Written = Callable[[Matrix], Tensor]


@dataclass(frozen=True)
class Error:
    """One matrix: squared norms of the change and of the whole, plain and in the metric of a method."""

    lost: float
    whole: float
    metric_lost: float
    metric_whole: float

    @property
    def relative(self) -> float:
        """||W - W'|| / ||W||, 0 for a matrix of zeros."""
        return _relative(self.lost, self.whole)

    @property
    def metric(self) -> float:
        """The same in the metric."""
        return _relative(self.metric_lost, self.metric_whole)


def error_of(
    weight: Tensor, written: Tensor, method: str, seen: Seen | None = None, *, counted: Tensor | None = None
) -> Error:
    """How far written [m, n] is from weight [m, n]. `counted` [k] are the rows whose change the metric counts; None
    counts all."""
    weight, change = weight.double(), weight.double() - written.double()
    felt = change
    if counted is not None:
        felt = torch.zeros_like(change)
        felt[counted] = change[counted]
    return Error(energy(change, "svd"), energy(weight, "svd"), energy(felt, method, seen), energy(weight, method, seen))


def shaken(a: Tensor, b: Tensor, method: str, seen: Seen | None = None) -> float:
    """What the metric's norm of b @ a feels when every entry of both factors moves by its whole size, up or down:
    times a precision, what rounding to it costs."""
    generator = torch.Generator().manual_seed(0)
    wide = [factor.detach().cpu().double() for factor in (a, b)]
    moved = [
        factor * (2 * torch.randint(0, 2, factor.shape, generator=generator, dtype=torch.float64) - 1)
        for factor in wide
    ]
    return math.sqrt(energy(moved[1] @ wide[0] + wide[1] @ moved[0], method, seen))


def reported(errors: Mapping[str, Error], method: str) -> dict[str, Any]:
    """{error, errors} over all matrices and by slot, and for a method with a metric of its own {METHOD_error,
    METHOD_errors} too."""
    found: dict[str, Any] = {
        "error": _relative(*(math.fsum(getattr(one, part) for one in errors.values()) for part in ("lost", "whole"))),
        "errors": {slot: one.relative for slot, one in errors.items()},
    }
    if method != "svd":
        sums = (math.fsum(getattr(one, f"metric_{part}") for one in errors.values()) for part in ("lost", "whole"))
        found |= {f"{method}_error": _relative(*sums), f"{method}_errors": {s: one.metric for s, one in errors.items()}}
    return found


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole > 0 else 0.0


def multiplied(staged: Checkpoint, fitted: Fit, found: Iterable[Matrix], kept: Mapping[int, Tensor]) -> Written:
    """How to read the source's matrices from a checkpoint that holds them compressed, in their own sizes: products
    multiplied out, and zeros for the neurons that `kept`, by layer, does not list."""
    planned: Mapping[str, PlannedTensor] = {}
    if fitted.lowrank is not None:
        plan = fold(fitted, {name: info.dtype for name, info in staged.tensors.items()})
        planned = {tensor.name: tensor for tensor in plan.tensors}
    values = _Multiplied(staged, planned, {matrix.tensor: matrix.stored for matrix in found})

    def written(matrix: Matrix) -> Tensor:
        value = read_matrix(values, matrix)
        stays = kept.get(-1 if matrix.layer is None else matrix.layer)
        if stays is None or matrix.role not in ("gate", "up", "down"):
            return value
        wide = torch.zeros_like(value)
        if matrix.role == "down":
            wide[:, stays] = value[:, : len(stays)]
        else:
            wide[stays] = value[: len(stays)]
        return wide

    return written


@dataclass(frozen=True)
class _Multiplied:
    """A folded checkpoint to read from, every tensor filled up with zeros to the source's shape."""

    staged: Tensors
    planned: Mapping[str, PlannedTensor]
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        tensor = self.planned.get(name)
        if tensor is None or tensor.compute is None:
            value = self.staged.read(name if tensor is None else tensor.source)
        else:
            value = torch.cat([*tensor.compute(self.staged)])
        if tuple(value.shape) == self.shapes[name]:
            return value
        wide = value.new_zeros(self.shapes[name])
        wide[tuple(slice(size) for size in value.shape)] = value
        return wide

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]
