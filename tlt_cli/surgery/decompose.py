"""The best low-rank factors of a matrix in a metric: one eigendecomposition serves every rank.

W [m, n] ~ b a minimises ||G^1/2 (W - b a) H^1/2||_F, where H is the second moment of the inputs (what SVD-LLM whitens
with) and G that of the gradients at the outputs (with both: K-FAC's second-order loss). No inverse of H is taken:

    with W~ = G^1/2 W and U the leading eigenvectors of W~ H W~T:   b = G^-1/2 U,   a = UT W~

is optimal whatever the rank of H: Eckart and Young (1936) in the metric. Where W~ has more rows than columns, the same
U is an orthonormal basis of W~ H^1/2 V, with V the eigenvectors of the n x n side. With G alone the transposed problem
takes no inverse either; with both, G is damped and inverted.

W~ = U (UT W~) whatever U, so the energy in H of the rows of `a` that are left out is what the factors lose: `error` is
what these very factors have, not an eigenvalue's idea of it. The directions themselves are the best only as far as the
Gram matrix resolves them, down to s1 times the root of the precision: large plain matrices go through float32, and
again through float64 where values that small come before break-even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tlt_cli.errors import TltError

DAMPING = 0.05  # of G's mean diagonal; insensitive between 0.005 and 0.3
_RIDGE = 1e-12  # of H's mean diagonal: orders the directions that no input reached, far below what the metric sees
_SMALL = 1024  # a side up to which float64 costs nothing that anyone would notice
_RESOLVED = 1e-5  # of the largest energy: what a Gram matrix in float32 tells apart from its rounding
_OVERSAMPLED = 16  # directions beside those that are wanted
_ITERATIONS = 4  # after so many the exact route is not much dearer
_STILL = 1e-6  # relative gain of an iteration in the squared error that is none
_UNSEEN = 1e-14  # of the largest energy in a metric: what is less is rounding, and keeps the ridge's order


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Factors of every rank. `singular` [k], float64 and descending, are the singular values of G^1/2 W H^1/2 as the
    factors meet them; `energy` is the sum of their squares."""

    singular: Tensor
    energy: float
    _left: Tensor = field(repr=False)
    _right: Tensor = field(repr=False)
    _tails: Tensor = field(repr=False)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(a [rank, n], b [m, rank]) in float32, W ~ b @ a. TltError for a rank that the matrix cannot have."""
        if not 1 <= rank <= len(self.singular):
            raise TltError(f"rank {rank} of a {self._left.shape[0]} x {self._right.shape[1]} matrix: "
                           f"expected 1 to {len(self.singular)}")  # fmt: skip
        return self._right[:rank], self._left[:, :rank]

    def error(self, rank: int) -> float:
        """||G^1/2 (W - b a) H^1/2||_F at this rank; at 0 the norm of the whole."""
        return float(self._tails[rank])


def decompose(
    weight: Tensor, *, inputs: Tensor | None = None, outputs: Tensor | None = None, damping: float = DAMPING
) -> Decomposition:
    """The optimal factors of weight [m, n] at every rank up to min(m, n).

    `inputs` is H = E[x xT] [n, n] or its diagonal [n], `outputs` is G = E[g gT] [m, m] or its diagonal [m]; None is the
    identity. H may be singular: directions without any weight come last, in the order of plain SVD. Given both, G is
    damped by `damping` times its mean diagonal, and so is it in `error`. The arithmetic is float64 wherever there is a
    metric or a side is no more than 1024.
    """
    assert weight.dim() == 2
    rows, columns = weight.shape
    assert inputs is None or inputs.shape in ((columns,), (columns, columns))
    assert outputs is None or outputs.shape in ((rows,), (rows, rows))
    if inputs is None and (outputs is not None or rows > columns):
        right, left, squares = _solve(weight.T, outputs, None, damping)
        left, right = left.T, right.T
    else:
        left, right, squares = _solve(weight, inputs, outputs, damping)
    squares, order = squares.sort(descending=True, stable=True)
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]).sqrt()
    return Decomposition(
        squares.sqrt(), float(squares.sum()), left[:, order].float(), right[order].float().contiguous(), tails
    )


def truncated(weight: Tensor, rank: int) -> Decomposition | None:
    """The best factors [m, n] of one rank, by randomized subspace iteration (Halko, Martinsson, Tropp 2011); None where
    they are not found to be the best.

    What they lose is measured, ||W - b a||, and found to be the least by one more power iteration, which must not lower
    it any more: so it is where singular values fall off behind the rank. Where they do not, as in the flat bulk of
    trained weights, only `decompose` tells.
    """
    wide = weight.float()
    scale = wide.abs().max()
    if not scale > 0:
        return None
    wide = wide / scale
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(wide.shape[1], rank + _OVERSAMPLED, generator=generator).to(wide)
    basis = torch.linalg.qr(wide @ start)[0]
    energy, before = float(wide.square().sum(dtype=torch.float64)), math.inf
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]
        inner = (basis.T @ wide).double()
        squares, turned = _eigh(inner @ inner.T)
        squares = squares.flip(0)[:rank].clamp_min(0)
        lost = max(0.0, energy - float(squares.sum()))
        if before - lost <= _STILL * lost:
            left = basis @ turned.flip(1)[:, :rank].to(basis)
            right = left.T @ wide
            lost = float((wide - left @ right).square().sum(dtype=torch.float64))
            tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) + lost
            wider = float(scale)
            return Decomposition(
                squares.sqrt() * wider, float(tails[0]) * wider**2, left, right * scale, tails.sqrt() * wider
            )
        before = lost
    return None


def _solve(
    weight: Tensor, inputs: Tensor | None, outputs: Tensor | None, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(b [m, k], a [k, n], the energy of each row of `a` [k] in float64), leading first or nearly so."""
    if inputs is None and outputs is None and min(weight.shape) > _SMALL:
        found = _solve_in(torch.float32, weight, None, None, damping)
        used = weight.numel() // sum(weight.shape)
        if found[2][used] > _RESOLVED * found[2][0]:
            return found
    return _solve_in(torch.float64, weight, inputs, outputs, damping)


def _solve_in(
    dtype: torch.dtype, weight: Tensor, inputs: Tensor | None, outputs: Tensor | None, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = weight.to(dtype)
    scale = wide.abs().max()  # so that no square overflows or underflows, in either precision
    if scale == 0:
        scale = torch.ones_like(scale)
    wide = wide / scale
    unweight = None
    if outputs is not None:
        weighted, unweight = _roots(outputs.to(wide), damping)
        wide = weighted[:, None] * wide if weighted.dim() == 1 else weighted @ wide
    moment, ridge = _moment(inputs, wide)
    basis = _basis(wide, moment, ridge)
    right = basis.T @ wide
    squares = (_times(right, moment) * right).sum(1, dtype=torch.float64)
    if moment is not None:
        squares = squares.where(squares > _UNSEEN * squares.max(), 0.0)
    left = basis
    if unweight is not None:
        left = unweight[:, None] * basis if unweight.dim() == 1 else unweight @ basis
    return left, right * scale, squares * scale.double() ** 2


def _moment(inputs: Tensor | None, like: Tensor) -> tuple[Tensor | None, float]:
    """H as given but in the dtype worked in, and the weight of the identity that is added where U is looked for."""
    if inputs is None:
        return None, 0.0
    moment = inputs.to(like)
    mean = float((moment if moment.dim() == 1 else moment.diagonal()).mean())
    return moment, _RIDGE * mean if mean > 0 else 1.0


def _roots(outputs: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """A root R of damped G, RT R = G, and its inverse; diagonals where G is one. No gradient at all: the identity."""
    diagonal = outputs if outputs.dim() == 1 else outputs.diagonal()
    mean = diagonal.mean()
    if mean <= 0:
        return torch.ones_like(diagonal), torch.ones_like(diagonal)
    if outputs.dim() == 1:
        root = (outputs.clamp_min(0) + damping * mean).sqrt()
        return root, 1 / root
    values, vectors = _eigh(outputs)
    root = (values.clamp_min(0) + damping * mean).sqrt()
    return root[:, None] * vectors.T, vectors / root


def _basis(wide: Tensor, moment: Tensor | None, ridge: float) -> Tensor:
    """Orthonormal U [m, k]: its first r columns are the best r-dimensional space of outputs, for every r."""
    rows, columns = wide.shape
    if rows <= columns:
        gram = _times(wide, moment) @ wide.T
        if ridge:
            gram += ridge * (wide @ wide.T)
        return _eigh(gram)[1].flip(1)
    assert moment is not None, "a plain tall matrix is solved transposed"
    if moment.dim() == 1:
        half = wide * (moment.clamp_min(0) + ridge).sqrt()
    else:
        values, vectors = _eigh(moment)
        half = (wide @ vectors) * (values.clamp_min(0) + ridge).sqrt()
    # The columns of half V are orthogonal but for rounding; QR makes the smallest so too, keeping every leading span.
    basis: Tensor = torch.linalg.qr(half @ _eigh(half.T @ half)[1].flip(1))[0]
    return basis


def _times(left: Tensor, moment: Tensor | None) -> Tensor:
    """left H, for H the identity, a diagonal or a matrix."""
    if moment is None:
        return left
    return left * moment if moment.dim() == 1 else left @ moment


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; in float64 where float32's iteration does not converge."""
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except RuntimeError:
        values, vectors = (found.to(symmetric.dtype) for found in torch.linalg.eigh(symmetric.double()))
    return values, vectors
