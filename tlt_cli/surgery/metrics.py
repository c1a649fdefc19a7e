"""What "closest" means: each method is a way of weighing the entries of W when it is cut down to a rank.

- svd         all entries alike (Eckart and Young 1936)
- activation  columns by the mean size of their input, to the power 1/2 (ASVD, arXiv:2312.05821)
- whiten      inputs by their second moment: the output's own squared error (SVD-LLM's optimum, arXiv:2403.07378)
- fisher      inputs by the squared gradients of their entries, summed (FWSVD, arXiv:2207.00112)
- kfac        inputs and output gradients by their second moments: the loss to second order (K-FAC, arXiv:1503.05671)
- weighted    every entry by its squared gradient: no closed form, expectation maximisation (Srebro and Jaakkola 2003)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tlt_cli.errors import UsageError, nearest
from tlt_cli.surgery.decompose import DAMPING, Decomposition, decompose

METHODS = ("svd", "weighted", "fisher", "kfac", "activation", "whiten")
_WITH_TEXT = METHODS[1:]
_WITH_GRADIENTS = ("weighted", "fisher", "kfac")
_WITH_ENTRIES = ("weighted", "fisher")
_MOST_STEPS = 200
_SETTLED = 1e-4  # relative gain of a step below which another one is not worth its decomposition
_FLOOR = 1e-6  # of the mean weight: rows without any are carried along instead of divided by zero


class Factorization(Protocol):
    """A matrix's factors at every rank, and what they lose. See `Decomposition`."""

    @property
    def singular(self) -> Tensor:
        """Singular values in the metric [k], descending."""
        ...

    @property
    def energy(self) -> float:
        """The squared norm of the whole matrix in the metric."""
        ...

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(a [rank, n], b [m, rank]), W ~ b @ a."""
        ...

    def error(self, rank: int) -> float:
        """The norm of what is lost, in the metric."""
        ...


@dataclass(frozen=True, eq=False)
class Seen:
    """What a text says of one matrix [m, n]: `inputs` E[x xT] [n, n], `absolute` E|x| [n], `outputs` E[g gT]
    [m, m] of the gradients at its outputs, `importance` E[(g x)^2] [m, n] of those of its entries.

    Without `importance` its Kronecker approximation stands for it: E[g^2] E[x^2].
    """

    inputs: Tensor | None = None
    absolute: Tensor | None = None
    outputs: Tensor | None = None
    importance: Tensor | None = None


def check_method(method: str) -> None:
    """UsageError for a method that does not exist."""
    if method not in METHODS:
        raise UsageError(f"--method {method}: unknown{nearest(method, METHODS)}; expected one of {', '.join(METHODS)}")


def needs_text(method: str) -> bool:
    """Whether the method weighs by what a text shows."""
    return method in _WITH_TEXT


def needs_gradients(method: str) -> bool:
    """Whether it weighs by the loss's gradients on that text."""
    return method in _WITH_GRADIENTS


def needs_entries(method: str) -> bool:
    """Whether it weighs every entry of a matrix by itself."""
    return method in _WITH_ENTRIES


def factorize(weight: Tensor, method: str, seen: Seen | None = None) -> Factorization:
    """The factors of weight [m, n] by a method, at every rank. `seen` holds what the method weighs by."""
    if method == "svd":
        return decompose(weight)
    assert seen is not None, f"{method} needs calibration"
    if method == "activation":
        assert seen.absolute is not None
        return decompose(weight, inputs=seen.absolute)  # (|x|^1/2)^2: the scaling is the root of the weight
    if method == "whiten":
        assert seen.inputs is not None
        return decompose(weight, inputs=seen.inputs)
    if method == "kfac":
        assert seen.inputs is not None and seen.outputs is not None
        return decompose(weight, inputs=seen.inputs, outputs=seen.outputs)
    if seen.importance is None:
        assert seen.inputs is not None and seen.outputs is not None
        columns, rows = _diagonal(seen.inputs), _diagonal(seen.outputs)
        if method == "fisher":
            return decompose(weight, inputs=columns * rows.sum())
        return decompose(weight, inputs=columns, outputs=rows, damping=_FLOOR)
    if method == "fisher":
        return decompose(weight, inputs=seen.importance.sum(0))
    return Weighted(weight.double(), seen.importance.double())


def energy(change: Tensor, method: str, seen: Seen | None = None) -> float:
    """The squared norm of a change [m, n] in the method's metric: what `factorize` makes as small as it can be.

    Measured on the change itself, in float64, with no decomposition of anything.
    """
    change = change.double()
    if method == "svd":
        return float(change.square().sum())
    assert seen is not None
    if method in ("weighted", "fisher"):
        assert seen.importance is not None
        weights = seen.importance if method == "weighted" else seen.importance.sum(0)
        return float((weights.double() * change.square()).sum())
    if method == "activation":
        assert seen.absolute is not None
        return float((seen.absolute.double() * change.square()).sum())
    assert seen.inputs is not None
    felt = change
    if method == "kfac":
        assert seen.outputs is not None
        outputs = seen.outputs.double()
        mean = outputs.diagonal().mean()
        felt = outputs @ change + DAMPING * mean * change if mean > 0 else change
    return max(0.0, float((felt * (change @ seen.inputs.double())).sum()))


def _diagonal(moment: Tensor) -> Tensor:
    return moment if moment.dim() == 1 else moment.diagonal()


@dataclass(eq=False)
class Weighted:
    """min sum_ij I_ij (W - b a)_ij^2 for weights I [m, n] of any rank: every rank is a search of its own.

    Where I = r cT this is a plain truncation of diag(r)^1/2 W diag(c)^1/2. With r and c the sums of rows and columns of
    I that is where the search starts, and in these coordinates, where the weights t that are left are flat, it fills
    in: the next b a is the truncation of t W + (1 - t) b a, t at most 1, which never raises the loss. Steps are
    carried on as far as that pays. `singular` are those of the start, scaled to the right energy.
    """

    weight: Tensor
    importance: Tensor
    start: Decomposition = field(init=False, repr=False)
    _rows: Tensor = field(init=False, repr=False)
    _columns: Tensor = field(init=False, repr=False)
    _found: dict[int, tuple[Tensor, Tensor, float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        root = float(self.importance.sum()) ** 0.5 or 1.0
        self._rows, self._columns = (_floored(self.importance.sum(dim) / root).sqrt() for dim in (1, 0))
        self.start = decompose(self._scaled(self.weight))

    @property
    def energy(self) -> float:
        """The weighted squared norm of the whole matrix."""
        return float((self.importance * self.weight**2).sum())

    @property
    def singular(self) -> Tensor:
        """Singular values of the start [k]."""
        return self.start.singular * math.sqrt(self.energy / (self.start.energy or 1.0))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(a [rank, n], b [m, rank])."""
        return self._at(rank)[:2]

    def error(self, rank: int) -> float:
        """The root of the weighted squared error at this rank: measured, since nothing predicts it."""
        return math.sqrt(self.energy) if rank == 0 else self._at(rank)[2]

    def _scaled(self, matrix: Tensor) -> Tensor:
        return self._rows[:, None] * matrix * self._columns

    def _at(self, rank: int) -> tuple[Tensor, Tensor, float]:
        if rank not in self._found:
            a, b = (factor.double() for factor in self._search(rank))
            a, b = (a / self._columns).float(), (b / self._rows[:, None]).float()
            loss = (self.importance * (self.weight - b.double() @ a.double()) ** 2).sum()
            self._found[rank] = a, b, math.sqrt(float(loss))
        return self._found[rank]

    def _search(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors in the scaled coordinates."""
        target = self._scaled(self.weight)
        left = self.importance / (self._rows[:, None] ** 2 * self._columns**2)
        share = left / left.max().clamp_min(1e-300)
        best = self.start.factors(rank)
        before = now = ahead = _product(best)
        loss, pace = float((left * (target - now) ** 2).sum()), 1.0
        for _ in range(_MOST_STEPS):
            found = decompose(ahead + share * (target - ahead)).factors(rank)
            then = _product(found)
            reached = float((left * (target - then) ** 2).sum())
            if reached >= loss:
                if pace == 1.0:  # no step at all is left, but for rounding
                    break
                ahead, pace = now, 1.0  # carried too far: go on from the best without
                continue
            settled = reached > (1 - _SETTLED) * loss
            best, before, now, loss = found, now, then, reached
            if settled:
                break
            faster = (1 + math.sqrt(1 + 4 * pace**2)) / 2  # Nesterov's
            ahead, pace = now + (pace - 1) / faster * (now - before), faster
        return best


def _floored(weights: Tensor) -> Tensor:
    return weights.clamp_min(_FLOOR * float(weights.mean()) or 1.0)


def _product(factors: tuple[Tensor, Tensor]) -> Tensor:
    return factors[1].double() @ factors[0].double()
