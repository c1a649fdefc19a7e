"""Which rank every matrix gets: one for all, a share of its parameters, a share of its energy, or the best allocation.

A rank r costs r (m + n) numbers; from break-even on that is no fewer than the m n of the matrix: it stays dense then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor

from tlt_cli.errors import TltError, UsageError
from tlt_cli.surgery.allocate import Choice, allocation
from tlt_cli.surgery.matrices import Matrix

UNIFORM, GLOBAL = "uniform", "global"
ALLOCATIONS = (UNIFORM, GLOBAL)


@dataclass(frozen=True)
class Ranks:
    """The rank of each slot, None where the matrix stays dense, and what they add up to.

    `parameters` and `before` count the numbers of these matrices alone. `bound` is a loss (a sum of squared errors)
    below which no allocation of as many parameters can get; None where ranks were not allocated.
    """

    by_slot: Mapping[str, int | None]
    parameters: int
    before: int
    bound: float | None = None

    @property
    def factored(self) -> dict[str, int]:
        """The slots that are factored, and their ranks."""
        return {slot: rank for slot, rank in self.by_slot.items() if rank is not None}

    @property
    def keep(self) -> float:
        """The share of the matrices' parameters that is kept."""
        return self.parameters / self.before


def stored_parameters(matrix: Matrix, rank: int | None) -> int:
    """Numbers that a matrix of this rank takes; None is the dense matrix."""
    return matrix.size if rank is None else rank * (matrix.rows + matrix.columns)


def at_rank(found: Sequence[Matrix], rank: int, *, saving: bool = True, align: int = 1) -> Ranks:
    """One rank for all. With `saving` a matrix stays dense where that takes no more, else only where its own rank is no
    higher. Raises UsageError for a rank that changes nothing at all, or is no multiple of `align`."""
    if rank < 1:
        raise UsageError(f"--rank {rank}: a rank is at least 1")
    if rank % align:
        raise UsageError(f"--rank {rank} is no multiple of --align {align}; take {max(1, rank // align) * align}")
    most = max(_limit(matrix, saving) for matrix in found)
    if rank >= most:
        what = "gets smaller" if saving else "has a higher rank"
        raise UsageError(f"--rank {rank}: no matrix {what} with it; the most that changes one is {most - 1}")
    return ranks_at(found, rank, saving=saving)


def ranks_at(found: Sequence[Matrix], rank: int, *, saving: bool = True) -> Ranks:
    """One rank for all that it changes; the others stay dense."""
    return _ranks(found, {matrix.name: rank for matrix in found}, saving=saving)


def at_keep(found: Sequence[Matrix], keep: float, *, saving: bool = True, align: int = 1) -> Ranks:
    """The same share of every matrix's parameters: r = floor(keep m n / (m + n)) down to a multiple of `align`, and at
    least that."""
    check_keep(keep)
    most = {matrix.name: floor(keep * matrix.size / (matrix.rows + matrix.columns)) for matrix in found}
    wanted = {name: max(1, rank // align) * align for name, rank in most.items()}
    return _ranks(found, wanted, saving=saving)


def at_energy(
    found: Sequence[Matrix], spectra: Mapping[str, Tensor], energy: float, *, saving: bool = True, align: int = 1
) -> Ranks:
    """The smallest rank of each matrix, a multiple of `align`, that holds this share of its squared singular values."""
    if not 0 < energy < 1:
        raise UsageError(f"--energy {energy}: expected a share between 0 and 1, such as 0.99")
    wanted = {}
    for matrix in found:
        held = spectra[matrix.name].square().cumsum(0)
        wanted[matrix.name] = -(-(1 + int((held < energy * held[-1]).sum())) // align) * align
    return _ranks(found, wanted, saving=saving)


def allocated(found: Sequence[Matrix], errors: Mapping[str, Tensor], keep: float, *, align: int = 1) -> Ranks:
    """The ranks that lose the least in all at a share of all parameters; ranks are multiples of `align`, or dense.

    `errors` [k + 1] are the losses of each matrix at rank 0, 1, ..., k: squared errors in one metric for all.
    """
    check_keep(keep)
    options = [choices(matrix, errors[matrix.name], align=align) for matrix in found]
    before = sum(matrix.size for matrix in found)
    best = allocation(options, floor(keep * before))
    picked = {matrix.name: group[at].rank for matrix, group, at in zip(found, options, best.chosen, strict=True)}
    return Ranks(picked, best.parameters, before, best.bound)


def choices(matrix: Matrix, errors: Tensor, *, align: int = 1) -> list[Choice]:
    """Every rank below break-even that is a multiple of `align`, with its loss from `errors` [k + 1], and dense."""
    ranks = range(align, matrix.break_even, align)
    found = [Choice(rank, stored_parameters(matrix, rank), float(errors[rank])) for rank in ranks if rank < len(errors)]
    return [*found, Choice(None, matrix.size, 0.0)]


def losses(singular: Tensor) -> Tensor:
    """The squared error at rank 0, 1, ..., k, from the tails of the spectrum [k]: [k + 1] float64."""
    squares = singular.double().square()
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


def check_keep(keep: float) -> None:
    """UsageError for a share that is none."""
    if not 0 < keep < 1:
        raise UsageError(f"--keep {keep}: the share of the parameters to keep, between 0 and 1, such as 0.8")


def check_some(ranks: Ranks) -> None:
    """TltError where every matrix would stay dense."""
    if not ranks.factored:
        raise TltError("every matrix would stay dense: two factors of the ranks asked for are no smaller")


def _limit(matrix: Matrix, saving: bool) -> int:
    """The rank from which on the matrix stays as it is."""
    return matrix.break_even if saving else matrix.full_rank


def _ranks(found: Sequence[Matrix], wanted: Mapping[str, int], *, saving: bool) -> Ranks:
    ranks = {
        matrix.name: wanted[matrix.name] if wanted[matrix.name] < _limit(matrix, saving) else None for matrix in found
    }
    parameters = sum(stored_parameters(matrix, ranks[matrix.name]) for matrix in found)
    return Ranks(ranks, parameters, sum(matrix.size for matrix in found))
