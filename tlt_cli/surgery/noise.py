"""The null-space term R (I - P P+): random, never seen by the function, and what makes new coordinates trainable.

It is drawn uniformly, from a generator seeded by the tensor's name and the row, so that neither the order of work nor
the number of jobs changes it. Its size follows two rules, both so that rounding stays where it was:

- sqrt(old inputs / new inputs): a matrix of more inputs needs smaller entries for the same spectrum (arXiv:2310.17813).
  Without it every layer amplifies the rounding differences between copies: 15 times the float32 floor at four times
  the width of a two-layer model, and more with depth.
- the columns of the matrix: trained models carry a few entries of the stream that are far larger than the rest, behind
  small weights; noise of the whole matrix's size on those cancels only up to a rounding error that is seen.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tlt_cli.surgery.maps import COPY, AxisMap
from tlt_cli.surgery.spectrum import DenseMap

_LEAST = 0.02  # of the matrix's spread: even a column of zeros gets some noise, or its copies could never part


@dataclass(frozen=True, eq=False)
class Spread:
    """Standard deviation of a matrix, and of each of its input columns [in]."""

    whole: float
    columns: Tensor | None = None


def spread_of(rows: Tensor) -> Spread:
    """The spread of a matrix, from all or some of its rows [n, in]."""
    rows = rows.double()
    whole = float(rows.std(correction=0))
    return Spread(whole, rows.square().mean(0).sqrt().clamp_min(_LEAST * whole))


def add_null_noise(
    out: Tensor, mapped: AxisMap | DenseMap, spread: Spread, size: float, generator: np.random.Generator
) -> None:
    """Add R (I - P P+) to `out` [rows, new in] in place, R with `size` times the spread."""
    if isinstance(mapped, DenseMap):
        noise = uniform(generator, out.shape, spread.whole * size).to(out.dtype)
        out += mapped.project_out(noise)
        return
    entries = mapped.null_entries
    if not len(entries):
        return
    noise = uniform(generator, torch.Size((out.shape[0], len(entries))), size).to(out.dtype)
    copied = mapped.kind[entries] == COPY
    deviations = torch.full((len(entries),), spread.whole, dtype=out.dtype)
    if copied.any() and spread.columns is not None:
        deviations[torch.from_numpy(copied)] = spread.columns[mapped.source[entries[copied]]].to(out.dtype)
    noise *= deviations
    if copied.any():
        members = entries[copied]
        where = torch.from_numpy(np.flatnonzero(copied))
        groups = torch.from_numpy(mapped.source[members])
        write = torch.from_numpy(mapped.write[members]).to(out.dtype)
        read = torch.from_numpy(mapped.read[members]).to(out.dtype)
        part = noise[:, where]
        sums = out.new_zeros(out.shape[0], mapped.old).index_add_(1, groups, part * write)
        noise[:, where] = part - sums[:, groups] * read
    if entries[-1] - entries[0] + 1 == len(entries):
        out[:, int(entries[0]) : int(entries[-1]) + 1] += noise
    else:
        out[:, torch.from_numpy(entries)] += noise


def generator_for(seed: int, name: str, start: int) -> np.random.Generator:
    """The random numbers of the rows of one tensor from `start` on."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, digest, start])))


def uniform(generator: np.random.Generator, shape: torch.Size, spread: float) -> Tensor:
    """Uniform with mean zero and this standard deviation (a uniform on [-a, a] has a / sqrt(3))."""
    noise = torch.from_numpy(generator.random(tuple(shape), dtype=np.float32))
    return noise.sub_(0.5).mul_(2 * math.sqrt(3) * spread)
