"""The decompositions of a checkpoint's matrices, each made once, when first asked for, and kept while there is room."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from torch import Tensor

from tlt_cli.checkpoint.planned import Tensors
from tlt_cli.surgery.factor import losses
from tlt_cli.surgery.matrices import Matrix, read_matrix
from tlt_cli.surgery.metrics import Factorization, Seen, factorize

_ROOM = 4 << 30


class Factorizations:
    """Reads, decomposes, remembers. Several threads may ask; one decomposition runs at a time, with all cores.

    Factors that no longer fit into `room` bytes are forgotten, the oldest first, and made again when asked for; spectra
    are kept. `seconds` is what each matrix took when it was first made.
    """

    def __init__(
        self, values: Tensors, method: str, seen: Callable[[Matrix], Seen | None], *, room: int = _ROOM
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._values, self._method, self._seen, self._room = values, method, seen, room
        self._kept: dict[str, Factorization] = {}
        self._spectra: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._lock = Lock()

    @property
    def nested(self) -> bool:
        """Whether the factors of a rank are the first ones of every higher rank."""
        return self._method != "weighted"

    def of(self, matrix: Matrix) -> Factorization:
        """Its factors at every rank."""
        with self._lock:
            if matrix.name not in self._kept:
                self._make(matrix)
            return self._kept[matrix.name]

    def spectrum(self, matrix: Matrix) -> Tensor:
        """Its singular values in the metric [k], float64, descending."""
        if matrix.name not in self._spectra:
            self.of(matrix)
        return self._spectra[matrix.name]

    def losses(self, matrix: Matrix) -> Tensor:
        """Its squared error at rank 0, 1, ..., k: [k + 1] float64."""
        return losses(self.spectrum(matrix))

    def factors(self, matrix: Matrix, rank: int) -> tuple[Tensor, Tensor]:
        """(a [rank, n], b [m, rank])."""
        return self.of(matrix).factors(rank)

    def _make(self, matrix: Matrix) -> None:
        start = time.perf_counter()
        made = factorize(read_matrix(self._values, matrix), self._method, self._seen(matrix))
        self.seconds.setdefault(matrix.name, time.perf_counter() - start)
        self._sizes[matrix.name] = 4 * matrix.full_rank * (matrix.rows + matrix.columns)
        while self._kept and sum(self._sizes[name] for name in (*self._kept, matrix.name)) > self._room:
            del self._kept[next(iter(self._kept))]
        self._kept[matrix.name] = made
        self._spectra[matrix.name] = made.singular
