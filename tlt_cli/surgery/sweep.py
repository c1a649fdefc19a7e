"""What every rank costs and loses, from one decomposition per matrix: the curve behind `--rank-sweep`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tlt_cli.checkpoint.header import TensorInfo, tensor_bytes
from tlt_cli.errors import UsageError
from tlt_cli.surgery.factor import Ranks, ranks_at
from tlt_cli.surgery.matrices import Matrix

POINTS = 32
_ALIGNED = 256  # from this largest rank on, ranks are multiples of 8: what hardware likes


@dataclass(frozen=True)
class Point:
    """The whole checkpoint with every matrix at one rank, None for the checkpoint as it is.

    `factored` matrices are below their break-even, the others stay dense. `keep` is the share of the matrices' own
    parameters, `parameters` and `bytes` are of the whole checkpoint; `error` is the relative error of all matrices
    together, in the metric they were decomposed in.
    """

    rank: int | None
    factored: int
    keep: float
    parameters: int
    bytes: int
    error: float


def grid(found: Sequence[Matrix], given: Sequence[int] | None = None) -> list[int]:
    """Ascending ranks worth a look: `given`, or up to 32 between 1 and the largest break-even, half of them evenly
    spaced and half by a factor. UsageError for ranks that no matrix can use."""
    most = max(matrix.break_even for matrix in found) - 1
    if given is not None:
        for rank in given:
            if not 1 <= rank <= most:
                raise UsageError(
                    f"--ranks {rank}: expected ranks of 1 to {most}; no matrix gets smaller with any other"
                )
        return sorted(set(given))
    if most < 1:
        raise UsageError("every matrix is too small to be factored")
    if most <= POINTS:
        return list(range(1, most + 1))
    unit = 8 if most >= _ALIGNED else 1
    ranks = {1, most // unit * unit}
    for step in range(1, POINTS // 2):
        ranks.add(max(1, round(most * step / (POINTS // 2) / unit) * unit))
    for step in range(1, POINTS):  # powers of a factor fill the gaps below until there are enough
        if len(ranks) >= POINTS:
            break
        rank = most ** (step / POINTS)
        ranks.add(max(1, round(rank / unit) * unit if rank >= unit else round(rank)))
    return sorted(ranks)


def sweep(
    found: Sequence[Matrix],
    errors: Mapping[str, Tensor],
    ranks: Sequence[int],
    tensors: Mapping[str, TensorInfo],
) -> list[Point]:
    """One point per rank and a last one with all matrices dense; `errors` [k + 1] are squared, as `losses` gives."""
    energy = math.fsum(float(errors[matrix.name][0]) for matrix in found)
    points = []
    for rank in (*ranks, None):
        chosen = dense(found) if rank is None else ranks_at(found, rank)
        lost = math.fsum(float(errors[slot][at]) for slot, at in chosen.factored.items())
        points.append(
            Point(
                rank,
                factored=len(chosen.factored),
                keep=chosen.keep,
                parameters=sum(math.prod(info.shape) for info in tensors.values()) + chosen.parameters - chosen.before,
                bytes=stored_bytes(found, chosen, tensors),
                error=math.sqrt(lost / energy) if energy else 0.0,
            )
        )
    return points


def dense(found: Sequence[Matrix]) -> Ranks:
    """No matrix factored."""
    size = sum(matrix.size for matrix in found)
    return Ranks({matrix.name: None for matrix in found}, size, size)


def stored_bytes(found: Sequence[Matrix], chosen: Ranks, tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of all tensors once these matrices are stored as factors, in the dtype that each has."""
    total = sum(info.nbytes for info in tensors.values())
    for matrix in found:
        rank = chosen.by_slot[matrix.name]
        if rank is not None:
            dtype = tensors[matrix.tensor].dtype
            total += tensor_bytes(dtype, (rank, matrix.rows + matrix.columns)) - tensor_bytes(dtype, (matrix.size,))
    return total
