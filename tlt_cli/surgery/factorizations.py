"""The decompositions of a checkpoint's matrices, each made once, when first asked for, and kept while there is room."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

from torch import Tensor

from tlt_cli.checkpoint.planned import Tensors
from tlt_cli.surgery.decompose import truncated
from tlt_cli.surgery.factor import losses
from tlt_cli.surgery.matrices import Matrix, read_matrix
from tlt_cli.surgery.metrics import Factorization, Seen, factorize

_ROOM = 4 << 30
LARGE = 2048
_SHARE = 32


def is_few(matrix: Matrix, rank: int) -> bool:
    """Whether a rank is so low, of so large a matrix, that looking for it alone is much faster."""
    return matrix.full_rank >= LARGE and rank * _SHARE <= matrix.full_rank


class Factorizations:
    """Reads, decomposes, remembers. Several threads may ask; one decomposition runs at a time, with all cores.

    Factors that no longer fit into `room` bytes are forgotten, the oldest first, and made again when asked for; spectra
    are kept. `corpus` is what is recorded of the text behind `seen`. `seconds` is what each matrix took: its
    decomposition, and where every rank is a search of its own those.
    """

    def __init__(
        self,
        values: Tensors,
        method: str,
        seen: Callable[[Matrix], Seen | None],
        *,
        corpus: Mapping[str, Any] | None = None,
        room: int = _ROOM,
    ) -> None:
        self.corpus = corpus
        self.seconds: dict[str, float] = {}
        self._values, self._method, self._seen, self._room = values, method, seen, room
        self._kept: dict[str, Factorization] = {}
        self._spectra: dict[str, Tensor] = {}
        self._errors: dict[tuple[str, int], float] = {}
        self._quick: tuple[tuple[str, int], Factorization | None] | None = None
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

    def losses(self, matrix: Matrix, ranks: Sequence[int] = ()) -> Tensor:
        """Its squared error at rank 0, 1, ..., k: [k + 1] float64.

        Where factors are not nested nothing tells those but the factors themselves: of `ranks` they are exact, and
        between them what the search for them starts from."""
        found = losses(self.spectrum(matrix))
        if not self.nested:
            for rank in ranks:
                if rank < len(found):
                    found[rank] = self.error(matrix, rank) ** 2
        return found

    def factors(self, matrix: Matrix, rank: int) -> tuple[Tensor, Tensor]:
        """(a [rank, n], b [m, rank]). A single low rank of a large matrix takes no whole decomposition, where a quick
        one proves to be as good."""
        made = self._few(matrix, rank) or self.of(matrix)
        with self._lock:
            start = time.perf_counter()
            factors = made.factors(rank)
            self._errors[matrix.name, rank] = made.error(rank)
            if not self.nested:
                self.seconds[matrix.name] += time.perf_counter() - start
        return factors

    def as_if_first(self, ranks: Mapping[Matrix, int]) -> None:
        """Let go of the decompositions that are not made where these ranks are all that is asked for: the factors are
        then the same, bit by bit."""
        for matrix, rank in ranks.items():
            if self._method == "svd" and is_few(matrix, rank):
                self._kept.pop(matrix.name, None)
                self._spectra.pop(matrix.name, None)

    def error(self, matrix: Matrix, rank: int) -> float:
        """What its factors of this rank lose, in the metric's norm."""
        if (matrix.name, rank) not in self._errors:
            self.factors(matrix, rank)
        return self._errors[matrix.name, rank]

    def seen(self, matrix: Matrix) -> Seen | None:
        """What it is weighed by."""
        return self._seen(matrix)

    def forget(self, matrix: Matrix) -> None:
        """Let go of a matrix that is not asked for again."""
        self._kept.pop(matrix.name, None)

    def _few(self, matrix: Matrix, rank: int) -> Factorization | None:
        """The factors of one low rank, unless a decomposition is there or must be made."""
        if self._method != "svd" or not is_few(matrix, rank) or matrix.name in self._spectra:
            return None
        with self._lock:
            if self._quick is None or self._quick[0] != (matrix.name, rank):
                start = time.perf_counter()
                found = truncated(read_matrix(self._values, matrix), rank)
                self.seconds[matrix.name] = self.seconds.get(matrix.name, 0.0) + time.perf_counter() - start
                self._quick = (matrix.name, rank), found
            return self._quick[1]

    def _make(self, matrix: Matrix) -> None:
        start = time.perf_counter()
        made = factorize(read_matrix(self._values, matrix), self._method, self._seen(matrix))
        if matrix.name not in self._spectra:
            self.seconds[matrix.name] = self.seconds.get(matrix.name, 0.0) + time.perf_counter() - start
        self._sizes[matrix.name] = 4 * matrix.full_rank * (matrix.rows + matrix.columns)
        if not self.nested:
            self._sizes[matrix.name] += 16 * matrix.size  # the weights and the matrix in float64, for the next rank
        while self._kept and sum(self._sizes[name] for name in (*self._kept, matrix.name)) > self._room:
            del self._kept[next(iter(self._kept))]
        self._kept[matrix.name] = made
        self._spectra[matrix.name] = made.singular
