"""How far two models are apart: their logits and next-token distributions on the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tlt_cli.errors import TltError
from tlt_cli.model.decoder import Decoder


@dataclass(frozen=True)
class Distance:
    """`max_logit` is the largest |difference| of two logits, `deviation` the first model's standard deviation of them;
    `kl` is the mean and `max_kl` the largest KL divergence of a position, in nats; `same_top` the share of positions
    with the same likeliest token; `tokens` counts positions."""

    max_logit: float
    deviation: float
    kl: float
    max_kl: float
    same_top: float
    tokens: int

    @property
    def relative(self) -> float:
        """Largest logit difference, in standard deviations."""
        return self.max_logit / self.deviation if self.deviation else self.max_logit


@torch.no_grad()
def compare(first: Decoder, second: Decoder, ids: torch.Tensor) -> Distance:
    """The distance on ids [B, T], over the first model's words. Raises TltError where logits are not finite."""
    vocab = first.description["vocab"]
    return distance(first(ids.to(first.device)).cpu(), second(ids.to(second.device))[..., :vocab].cpu())


def distance(before: torch.Tensor, after: torch.Tensor) -> Distance:
    """The distance of two models' logits [B, T, V]. Raises TltError where they are not finite."""
    for name, logits in (("source", before), ("output", after)):
        if not bool(torch.isfinite(logits).all()):
            raise TltError(f"the {name}'s logits are not finite: its weights are broken or too large for its dtype")
    largest, kls, same = 0.0, [], 0
    for row, other in zip(before.flatten(0, -2), after.flatten(0, -2), strict=True):  # a position at a time: V is large
        largest = max(largest, float((row - other).abs().max()))
        log, log_other = row.double().log_softmax(-1), other.double().log_softmax(-1)
        kls.append(float((log.exp() * (log - log_other)).sum()))
        same += int(row.argmax() == other.argmax())
    return Distance(
        max_logit=largest,
        deviation=_deviation(before),
        kl=max(0.0, sum(kls) / len(kls)),
        max_kl=max(0.0, *kls),
        same_top=same / len(kls),
        tokens=len(kls),
    )


def _deviation(logits: torch.Tensor) -> float:
    """The standard deviation of all entries, summed in float64 a position at a time."""
    rows, count = logits.flatten(0, -2), logits.numel()
    mean = sum(float(row.double().sum()) for row in rows) / count
    squares = sum(float((row.double() - mean).square().sum()) for row in rows)
    return math.sqrt(squares / (count - 1)) if count > 1 else math.nan
