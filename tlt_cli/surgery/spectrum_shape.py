"""A singular spectrum in a few numbers and one word: how many directions count, and how it falls off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARP, GRADUAL, CLUSTERS, NOTHING = "sharp drop", "gradual decay", "clusters", "zero"
_DROP = math.log(2)  # a step of the spectrum that halves it, ...
_OVER_ITS_LIKE = 4.0  # ... and that is this many times the usual step around it, is a drop
_AROUND = 8
_HEAD = 0.05  # drops are looked for among values of at least this share of the largest: below, noise has its own
_ZERO = 1e-6


@dataclass(frozen=True)
class Shape:
    """What a spectrum looks like. With p = s^2 / sum s^2, and always stable <= participation <= effective <= rank:

    `effective` exp of p's entropy (Roy and Vetterli 2007), `participation` 1 / sum p^2, `stable` 1 / max p, `rank` the
    number of values that are not rounding. `name` is one of the words above; `drops` are the ranks behind which the
    spectrum falls.
    """

    name: str
    effective: float
    participation: float
    stable: float
    rank: int
    drops: tuple[int, ...] = ()


def shape_of(singular: Tensor) -> Shape:
    """The shape of singular values [k], descending.

    >>> shape_of(torch.tensor([5.0, 5.0, 5.0, 0.1, 0.1])).drops
    (3,)
    """
    values = singular.double()
    if not len(values) or float(values[0]) <= 0:
        return Shape(NOTHING, 0.0, 0.0, 0.0, 0)
    values = values / values[0]
    share = values.square() / values.square().sum()
    drops = _drops(values.clamp_min(_ZERO))
    return Shape(
        (GRADUAL, SHARP, CLUSTERS)[min(len(drops), 2)],
        effective=math.exp(float(torch.special.entr(share).sum())),
        participation=1 / float(share.square().sum()),
        stable=1 / float(share.max()),
        rank=int((values > _ZERO).sum()),
        drops=drops,
    )


def _drops(values: Tensor) -> tuple[int, ...]:
    steps = values.log().diff().neg()
    found = []
    for index in torch.nonzero((steps >= _DROP) & (values[:-1] >= _HEAD)).flatten().tolist():
        around = torch.cat([steps[max(0, index - _AROUND) : index], steps[index + 1 : index + 1 + _AROUND]])
        if not len(around) or float(steps[index]) >= _OVER_ITS_LIKE * float(around.median()):
            found.append(index + 1)
    return tuple(found)


def knee(costs: Sequence[float], losses: Sequence[float]) -> int | None:
    """The index of the point furthest below the line from the first to the last: where more cost stops paying.

    `costs` ascend. None where no point lies below that line, or there are fewer than three.

    >>> knee([0, 1, 2, 3], [9, 2, 1, 0])
    1
    """
    if len(costs) < 3 or costs[-1] <= costs[0] or losses[0] <= losses[-1]:
        return None
    below = [
        1 - (cost - costs[0]) / (costs[-1] - costs[0]) - (loss - losses[-1]) / (losses[0] - losses[-1])
        for cost, loss in zip(costs, losses, strict=True)
    ]
    best = max(range(len(below)), key=below.__getitem__)
    return best if below[best] > 1e-9 else None
