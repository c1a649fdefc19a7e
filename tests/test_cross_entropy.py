"""The cross-entropy of our own is torch's, and so is its gradient, for rows that are skipped and for hopeless ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tlt_cli.training.cross_entropy import summed_cross_entropy

IGNORED = -100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_one_of_torch(dtype: torch.dtype) -> None:
    logits = 4 * torch.randn(60, 97, dtype=dtype)
    logits[3] *= 200  # probabilities that are zero in any dtype
    logits.requires_grad_()
    wanted = torch.randint(0, 97, (60,))
    wanted[5:9] = IGNORED
    ours = summed_cross_entropy(logits, wanted, IGNORED)
    theirs = functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    assert ours > 500
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.isclose(ours, theirs, rtol=bound)
    (gradient,) = torch.autograd.grad(0.3 * ours, logits)
    (expected,) = torch.autograd.grad(0.3 * theirs, logits)
    assert torch.allclose(gradient, expected, rtol=0, atol=bound)
    assert float(expected.abs().max()) > 0.1
    assert not gradient[5:9].any()
    scored = functional.cross_entropy(logits, wanted.clamp(min=0), reduction="sum")
    assert not torch.isclose(ours, scored, rtol=bound), "rows that are skipped would not be missed"
