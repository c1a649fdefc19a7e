"""Seconds to truncate one matrix, beside torch.linalg.svd: python tests/benchmarks/svd.py [ROWS COLUMNS RANK].

Prints both errors, the ratio of the times (the aim is 5 for 4096 x 14336), and what 32 ranks cost beside one (1.2 at
most). The matrix has a few strong directions over a flat bulk, as trained weights do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tlt_cli.surgery.decompose import decompose


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def trained_like(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    few = max(1, min(rows, columns) // 64)
    strong = torch.randn(rows, few, generator=generator) @ torch.randn(few, columns, generator=generator) / few**0.5
    return strong + torch.randn(rows, columns, generator=generator)


def classic(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return right[:rank], left[:, :rank] * values[:rank]


def main() -> None:
    rows, columns, rank = (int(word) for word in sys.argv[1:4]) if len(sys.argv) > 3 else (1024, 3584, 256)
    weight = trained_like(rows, columns)
    decompose(weight[:64]), classic(weight[:64], 1)  # what the library sets up once belongs to neither
    slow, (a, b) = timed(lambda: classic(weight, rank))
    best = float((weight - b @ a).double().norm())
    fast, (a, b) = timed(lambda: decompose(weight).factors(rank))
    ours = float((weight - b @ a).double().norm())
    ranks = range(rank, rank + 32)
    many, _ = timed(lambda: [(found.factors(r), found.error(r)) for found in [decompose(weight)] for r in ranks])
    print(f"{rows} x {columns}, rank {rank}, {torch.get_num_threads()} thread(s)")
    print(f"torch.linalg.svd {slow:.2f} s, error {best:.6f}")
    print(f"decompose        {fast:.2f} s, error {ours:.6f} ({ours / best - 1:+.1e})")
    print(f"ratio {slow / fast:.1f}; 32 ranks cost {many / fast:.2f} times one")


if __name__ == "__main__":
    main()
