"""Maps and fills that are dense: any isometry of the residual stream, and the continued singular spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlt_cli.surgery.maps import COPY, AxisMap


@dataclass(frozen=True, eq=False)
class DenseMap:
    """P [new, old] with PT P = `square` I. `extra` [new] is a unit vector outside its image, kept free of noise."""

    matrix: Tensor
    square: float
    extra: Tensor | None = None

    @property
    def old(self) -> int:
        """Number of old entries."""
        return self.matrix.shape[1]

    @property
    def new(self) -> int:
        """Number of new entries."""
        return self.matrix.shape[0]

    @property
    def plain(self) -> bool:
        """A dense map always changes something."""
        return False

    @property
    def null_entries(self) -> NDArray[np.int64]:
        """No single entry is null: as many as there are null directions, to be counted."""
        return np.arange(self.new - self.old)

    def write(self, value: Tensor) -> Tensor:
        """value [..., old] -> [..., new], through P."""
        written: Tensor = value @ self.matrix.T.to(value.dtype)
        return written

    def read(self, value: Tensor) -> Tensor:
        """value [..., old] -> [..., new], through P+ from the right."""
        return self.write(value) / self.square

    def scaled(self, factor: float) -> DenseMap:
        """The same map with its writes multiplied, and its reads divided."""
        return DenseMap(self.matrix * factor, self.square * factor**2, self.extra)

    def narrow(self, value: Tensor, *, reads: bool) -> Tensor:
        """value [..., new] -> [..., old]: P+ of what was written, or P behind what was read."""
        back = value @ self.matrix.to(value.dtype)
        return back if reads else back / self.square

    def project_out(self, value: Tensor) -> Tensor:
        """value (I - P P+), and nothing along `extra`."""
        matrix = self.matrix.to(value.dtype)
        value = value - (value @ matrix) @ matrix.T / self.square
        if self.extra is not None:
            extra = self.extra.to(value.dtype)
            value = value - (value @ extra)[:, None] * extra
        return value


def random_isometry(old: int, new: int, *, keep_mean: bool, seed: int) -> DenseMap:
    """A random P with PT P = (new/old) I. With `keep_mean` it sends the all-ones direction to the all-ones direction,
    so that LayerNorm's mean and variance survive; a spare direction is then left for the norms' biases."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(new, old + int(keep_mean and new > old), generator=generator, dtype=torch.float64)
    if keep_mean:
        # Work in bases whose first vectors are the all-ones directions: Q = F diag(1, Q') E^T.
        columns[:, 0] = 1.0
    basis, _ = torch.linalg.qr(columns)
    extra = basis[:, old] if basis.shape[1] > old else None
    basis = basis[:, :old]
    if keep_mean:
        if float(basis[0, 0]) < 0:
            basis[:, 0] = -basis[:, 0]
        start = torch.randn(old, old, generator=generator, dtype=torch.float64)
        start[:, 0] = 1.0
        old_basis, _ = torch.linalg.qr(start)
        if float(old_basis[0, 0]) < 0:
            old_basis[:, 0] = -old_basis[:, 0]
        basis = basis @ old_basis.T
    return DenseMap(basis * math.sqrt(new / old), new / old, extra)


def null_basis(mapped: AxisMap | DenseMap, seed: int) -> Tensor:
    """Orthonormal V [new, n] that the grown state never reaches: PT V = 0, and no entry that must stay zero."""
    if isinstance(mapped, DenseMap):
        random = torch.randn(mapped.new, mapped.new, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        count = mapped.new - mapped.old - (0 if mapped.extra is None else 1)
        null: Tensor = torch.linalg.qr(mapped.project_out(random.T).T[:, : max(count, 0)])[0]
        return null
    entries = mapped.null_entries
    copied = mapped.kind[entries] == COPY
    groups = mapped.source[entries[copied]]
    count = len(entries) - len(np.unique(groups))
    random = torch.randn(len(entries), count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if copied.any():
        # Take off each group's component along its own writes, the only direction in it that carries a value.
        where = torch.from_numpy(np.flatnonzero(copied))
        write = torch.from_numpy(mapped.write[entries[copied]])
        index = torch.from_numpy(groups)
        norms = torch.zeros(mapped.old, dtype=torch.float64).index_add_(0, index, write**2)
        sums = torch.zeros(mapped.old, count, dtype=torch.float64)
        sums.index_add_(0, index, random[where] * write[:, None])
        random[where] -= sums[index] * (write / norms[index])[:, None]
    basis, _ = torch.linalg.qr(random)
    full = torch.zeros(mapped.new, count, dtype=torch.float64)
    full[torch.from_numpy(entries)] = basis
    return full


def spectral_fill(weight: Tensor, rows: int, basis: Tensor, generator: np.random.Generator) -> Tensor:
    """U diag(tau) VT: the singular spectrum of `weight` continued into the null directions `basis` [columns, n].

    tau_k = exp(a) k^-b, the power law fitted to the log of the bulk k in [d/4, d], never above the last singular
    value. U is random orthonormal: kept orthogonal to the weight it would preserve the symmetry of copies for ever.
    """
    values = torch.linalg.svdvals(weight.double())
    last = len(values)
    count = min(basis.shape[1], rows)
    rank = torch.arange(1, last + 1, dtype=torch.float64)
    bulk = slice(max(0, last // 4 - 1), last)
    positive = values[bulk].clamp_min(torch.finfo(torch.float64).tiny).log()
    design = torch.stack([torch.ones(last - max(0, last // 4 - 1), dtype=torch.float64), -rank[bulk].log()], 1)
    intercept, slope = torch.linalg.lstsq(design, positive[:, None]).solution.flatten().tolist()
    order = torch.arange(last + 1, last + count + 1, dtype=torch.float64)
    tail = (intercept - slope * order.log()).exp().clamp_max(float(values[-1]))
    left, _ = torch.linalg.qr(torch.from_numpy(generator.standard_normal((rows, count))))
    filled: Tensor = (left * tail) @ basis[:, :count].T.double()
    return filled.to(weight.dtype)
