"""Factors as 8-bit integers: codes between -127 and 127, and one scale per row in the checkpoint's own dtype.

b @ a takes r (m + n) bytes, and r + m scales. Rounding to nearest comes first; then, as LPLR (arXiv:2310.11028)
and CALDERA (arXiv:2405.18886) do it, each factor in turn is refit in closed form to the other one as it is rounded, and
rounded itself; the best pair of all is kept. What is approached is b @ a in the metric of the inputs' second moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tlt_cli.checkpoint.planned import Tensors

LARGEST = 127
PRECISION = 0.5 / LARGEST  # the largest rounding, as a share of the largest number of a row
_ROUNDS = 3
_RIDGE = 1e-9  # of a Gram matrix's mean diagonal: directions that nothing decides stay as they were


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix [m, n] as int8 `codes` [m, n], each row times its `scale` [m]."""

    codes: Tensor
    scale: Tensor

    def values(self) -> Tensor:
        """The matrix, float64."""
        return self.codes.double() * self.scale.double()[:, None]


def rounded(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Codes:
    """Round to nearest, [m, n]; the largest number of every row becomes 127 of its scale, which is in `dtype`, or less
    where that is so small that few numbers are left to choose a scale from."""
    wide, kind = matrix.double(), torch.finfo(dtype)
    exact, step = wide.abs().amax(dim=1) / LARGEST, kind.smallest_normal * kind.eps
    scale = torch.where(exact < kind.smallest_normal, (exact / step).ceil() * step, exact).to(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (wide / scale.double()[:, None]).round().clamp(-LARGEST, LARGEST)
    return Codes(codes.to(torch.int8), scale)


def quantized(
    a: Tensor,
    b: Tensor,
    *,
    inputs: Tensor | None = None,
    pivoted: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Codes, Codes]:
    """Codes of a [r, n] and b [m, r] whose product is close to b @ a, and no further than that of rounding to nearest.

    Close is ||(b a - b' a') H^1/2||_F, with `inputs` H [n, n] or its diagonal [n]; None is the identity. With `pivoted`
    the rows of `a` are rows of the matrix themselves, beside those that b makes of them.
    """
    a, b = a.double(), b.double()
    if not pivoted:  # the scales of a's rows serve b's columns as well
        length = b.square().mean(0).sqrt()
        length = torch.where(length > 0, length, torch.ones_like(length))
        even = _even(a * length[:, None], b / length)
        a, b = a * (length * even)[:, None], b / (length * even)
    metric = None if inputs is None else inputs.double()
    gram = _times(a, metric) @ a.T
    right, left = rounded(a, dtype), rounded(b, dtype)
    best, least = (right, left), _loss(a, b, right, left, gram, metric, pivoted)
    for _ in range(_ROUNDS):
        left = rounded(_left_for(a, b, right.values(), metric), dtype)
        loss = _loss(a, b, right, left, gram, metric, pivoted)
        if loss < least:
            best, least = (right, left), loss
        right = rounded(_right_for(a, b, left.values(), pivoted), dtype)
    return best


def read_factor(values: Tensors, slot: str, kind: str, bits: int | None) -> Tensor:
    """A stored factor of a slot in float64, from its codes where it has some. `kind` is "lowrank_a" or "lowrank_b"."""
    stored = values.read(f"{slot}.{kind}.weight")
    return stored.double() if bits is None else Codes(stored, values.read(f"{slot}.{kind}.scale")).values()


def _even(a: Tensor, b: Tensor) -> float:
    """A power of two, which changes no code, by which a grows and b shrinks to about one size: the scales of small
    matrices then fit into float16."""
    sizes = float(a.abs().max()), float(b.abs().max())
    return 2.0 ** round(0.5 * math.log2(sizes[1] / sizes[0])) if min(sizes) > 0 else 1.0


def _left_for(a: Tensor, b: Tensor, right: Tensor, metric: Tensor | None) -> Tensor:
    """The b' that makes the best of a' = right: b + b (a - a') H a'T (a' H a'T)^-1."""
    weighed = _times(right, metric)
    return b + b @ _solve(weighed @ right.T, weighed @ (a - right).T).T


def _right_for(a: Tensor, b: Tensor, left: Tensor, pivoted: bool) -> Tensor:
    """The a' that makes the best of b' = left, whatever the metric; the rows that pivots keep hold it back."""
    gram = left.T @ left
    if pivoted:
        gram = gram + torch.eye(len(gram), dtype=gram.dtype)
    return a + _solve(gram, left.T @ (b - left)) @ a


def _solve(gram: Tensor, wanted: Tensor) -> Tensor:
    ridge = _RIDGE * float(gram.diagonal().mean()) or 1.0
    found: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), wanted)
    return found


def _loss(a: Tensor, b: Tensor, right: Codes, left: Codes, gram: Tensor, metric: Tensor | None, pivoted: bool) -> float:
    """The squared distance, from b a - b' a' = (b - b') a + b' (a - a'): small terms only. `gram` is a H aT."""
    lefts, wide = left.values(), a - right.values()
    ours, weighed = b - lefts, _times(wide, metric)
    mixed, own = weighed @ a.T, weighed @ wide.T
    loss = ((ours @ gram) * ours).sum() + 2 * ((lefts @ mixed) * ours).sum() + ((lefts @ own) * lefts).sum()
    return float(loss + own.trace() if pivoted else loss)


def _times(left: Tensor, metric: Tensor | None) -> Tensor:
    if metric is None:
        return left
    return left * metric if metric.dim() == 1 else left @ metric
