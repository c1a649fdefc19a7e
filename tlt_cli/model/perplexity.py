"""Perplexity over contiguous windows: exp of the mean negative log-likelihood of the scored tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from tlt_cli.errors import TltError
from tlt_cli.model.decoder import Decoder


def windows(ids: torch.Tensor, context: int) -> torch.Tensor:
    """ids [N] -> contiguous windows [N // context, context]; the tail is dropped, a short text is one short window."""
    if context < 2:
        raise TltError(f"a context of {context} scores nothing; it must be at least 2 tokens")
    if len(ids) < 2:
        raise TltError(f"the text has {len(ids)} token{'' if len(ids) == 1 else 's'}; at least 2 are needed")
    if len(ids) < context:
        return ids[None]
    return ids[: len(ids) // context * context].reshape(-1, context)


@torch.no_grad()
def perplexity(
    decoder: Decoder,
    ids: torch.Tensor,
    context: int = 512,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """{perplexity, nll, tokens} of ids [N]: every position but each window's first is scored, sums in float64.

    `progress(done, all)` is called after each batch of windows. Raises TltError where the loss is not finite.
    """
    rows = windows(ids, context)
    if decoder.longest is not None and rows.shape[1] > decoder.longest:
        raise TltError(f"--context {rows.shape[1]} is more than the model's {decoder.longest} positions")
    total, tokens = 0.0, rows.shape[0] * (rows.shape[1] - 1)
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        loss = summed_loss(decoder, some)
        if not math.isfinite(loss):
            raise TltError(f"the loss is {loss} in windows {first} to {first + len(some) - 1}: the weights are broken")
        total += loss
        if progress is not None:
            progress(first + len(some), len(rows))
    mean = total / tokens
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    return {"perplexity": value, "nll": mean, "tokens": tokens}


@torch.no_grad()
def summed_loss(decoder: Decoder, rows: torch.Tensor) -> float:
    """The loss of windows [n, T], summed in float64 over every position but each window's first."""
    rows = rows.to(decoder.device)
    logits = decoder(rows)[:, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = functional.cross_entropy(wide.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return float(losses.double().sum())
