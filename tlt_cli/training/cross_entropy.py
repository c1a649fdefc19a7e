"""Cross-entropy on the CPU with one pass over the logits there and one back, where torch makes five."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_FAINT = 1e-30  # a probability whose logarithm is taken of the logits instead


def summed_cross_entropy(logits: Tensor, wanted: Tensor, ignored: int) -> Tensor:
    """The sum of -log softmax(logits)[wanted] over rows; logits [N, V], wanted [N], where `ignored` is not scored."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling():  # which makes one pass of it itself
        return functional.cross_entropy(logits, wanted, ignore_index=ignored, reduction="sum")
    total: Tensor = _Summed.apply(logits, wanted, ignored)  # type: ignore[no-untyped-call]
    return total


class _Summed(torch.autograd.Function):
    """Keeps the probabilities, and makes the gradient in their place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, ignored: int) -> Tensor:
        shares, scored = logits.softmax(-1), wanted != ignored
        index = wanted.where(scored, 0)[:, None]
        picked = shares.gather(1, index)[:, 0]
        nll = -picked.log()
        faint = picked < _FAINT
        if bool(faint.any()):
            rows = logits[faint]
            nll[faint] = rows.logsumexp(-1) - rows.gather(1, index[faint])[:, 0]
        ctx.kept = shares, index, scored
        return nll.where(scored, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (shares, index, scored), ctx.kept = ctx.kept, None
        shares.scatter_add_(1, index, shares.new_full((1, 1), -1.0).expand_as(index))
        return shares.mul_(scored[:, None] * gradients[0]), None, None
