"""Proof that a merged checkpoint computes the weighted mean of its models' logits: each of them is run by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tlt_cli.checkpoint.filling import one_thread_each
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.families import Fit, fit
from tlt_cli.model.compare import distance
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.verify import Verification, bound_of, planned_decoder, twice

_MOST_LOGITS, _FEWEST = 1 << 20, 8


def shortened(ids: Tensor, vocab: int) -> Tensor:
    """The first tokens of rows ids [B, T]: as few as keep a large vocabulary's logits small, at least 8."""
    return ids[:, : max(_FEWEST, _MOST_LOGITS // (ids.shape[0] * vocab))]


@torch.no_grad()
def verify_merge(
    plan: Plan,
    values: Checkpoint,
    written: Checkpoint,
    sources: Sequence[tuple[Checkpoint, Fit]],
    weights: Sequence[float],
    ids: Tensor,
    *,
    coarse: bool = False,
    rows: Sequence[Sequence[int] | None] | None = None,
) -> Verification:
    """The written file on ids [B, T] against its sources, all streamed: memory is one tensor and the logits.

    `coarse` says that the file was rounded to a coarser dtype than its sources': then the plan is held against them,
    and the file too. A miss in float32 is measured again in float64 before it counts. `rows` are each source's own
    number of every token [V], None where it has the same: then those that all know are compared.
    """
    merged = fit(plan.shapes, plan.config, family=sources[0][1].family)
    known = shared_tokens(rows)

    def measured(dtype: torch.dtype) -> Verification:
        wanted = mean_logits(sources, weights, ids, dtype=dtype, rows=rows)
        file = load_checkpoint(written, merged, stream=True, dtype=dtype)
        made = planned_decoder(plan, merged, values, dtype=dtype) if coarse else file
        second = distance(wanted, file(ids)[..., known]) if coarse else None
        return Verification(distance(wanted, made(ids)[..., known]), bound_of(merged), second)

    with one_thread_each():  # a few tokens through many small matrices
        return twice(measured)


@torch.no_grad()
def mean_logits(
    sources: Sequence[tuple[Checkpoint, Fit]],
    weights: Sequence[float],
    ids: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    rows: Sequence[Sequence[int] | None] | None = None,
) -> Tensor:
    """The weighted mean of what the sources, streamed, say on ids [B, T]: logits of the tokens that all know."""
    known = shared_tokens(rows)
    total = torch.zeros((), dtype=dtype)
    for number, ((checkpoint, fitted), weight) in enumerate(zip(sources, weights, strict=True)):
        own = None if rows is None or rows[number] is None else torch.tensor(rows[number])
        logits = load_checkpoint(checkpoint, fitted, stream=True, dtype=dtype)(ids if own is None else own[ids])
        if rows is not None:
            logits = logits[..., known if own is None else own[known]]
        total = total + logits.mul_(weight)
    return total


def shared_tokens(rows: Sequence[Sequence[int] | None] | None) -> Tensor | slice:
    """The ids that all sources know; all of them where nothing was translated."""
    translated = [torch.tensor(own) for own in rows or () if own is not None]
    if not translated:
        return slice(None)
    return torch.nonzero(torch.stack([own >= 0 for own in translated]).all(0)).flatten()
