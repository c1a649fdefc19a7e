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

from tlt_cli.surgery.maps import AxisMap
from tlt_cli.surgery.spectrum import DenseMap

_LEAST = 0.02  # of the matrix's spread: even a column of zeros gets some noise, or its copies could never part


@dataclass(frozen=True, eq=False)
class Spread:
    """Standard deviation of a matrix, and of each of its input columns [in]."""

    whole: float
    columns: Tensor | None = None


def spread_of(rows: Tensor) -> Spread:
    """The spread of a matrix, from all or some of its rows [n, in]."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    whole = float(rows.std(correction=0))
    return Spread(whole, torch.linalg.vector_norm(rows, dim=0).div_(math.sqrt(len(rows))).clamp_min_(_LEAST * whole))


def add_null_noise(
    out: Tensor, mapped: AxisMap | DenseMap, spread: Spread, size: float, generator: np.random.Generator
) -> None:
    """Add R (I - P P+) to `out` [rows, new in] in place, R with `size` times the spread."""
    if isinstance(mapped, DenseMap):
        out += mapped.project_out(uniform(generator, out.shape, spread.whole * size).to(out.dtype))
        return
    width = sum(run.length for run in mapped.null_runs)
    noise = uniform(generator, torch.Size((out.shape[0], width)), size).to(out.dtype)
    parts = torch.split(noise, [run.length for run in mapped.null_runs], dim=1)
    sums = out.new_zeros(out.shape[0], mapped.old)  # per old entry what the noise on its copies would add up to
    for run, part in zip(mapped.null_runs, parts, strict=True):
        if run.source < 0 or spread.columns is None:
            part.mul_(spread.whole)
        else:
            part.mul_(spread.columns[run.source : run.source + run.length].to(out.dtype))
        if run.source >= 0:
            write = torch.from_numpy(mapped.write[run.start : run.start + run.length]).to(out.dtype)
            sums[:, run.source : run.source + run.length].addcmul_(part, write)
    for run, part in zip(mapped.null_runs, parts, strict=True):
        if run.source >= 0:
            read = torch.from_numpy(mapped.read[run.start : run.start + run.length]).to(out.dtype)
            part.addcmul_(sums[:, run.source : run.source + run.length], read, value=-1)
        out[:, run.start : run.start + run.length] += part


def generator_for(seed: int, name: str, start: int) -> np.random.Generator:
    """The random numbers of the rows of one tensor from `start` on."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, digest, start])))


def uniform(generator: np.random.Generator, shape: torch.Size, spread: float) -> Tensor:
    """Uniform around zero with this standard deviation (a uniform on [-a, a] has a / sqrt(3)), on 2^16 levels:
    noise needs no more, and four numbers of one draw are several times faster than four draws."""
    count = math.prod(shape)
    drawn = generator.integers(0, 2**64 - 1, -(-count // 4), dtype=np.uint64, endpoint=True)
    levels = torch.from_numpy(drawn.view(np.int16)[:count]).to(torch.float32)
    return levels.mul_(math.sqrt(3) * spread / 2**15).view(shape)
