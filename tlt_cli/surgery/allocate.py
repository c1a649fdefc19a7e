"""Which option each matrix gets under one budget of parameters: the least sum of losses, exactly.

One option per group, a sum of parameters that may not exceed the budget: the multiple-choice knapsack problem. A price
per parameter (the Lagrangian on the convex hulls) solves it but for the last step; what that step can still gain is
known, and it is small. A dynamic programme over the few options that lie within it finds the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tlt_cli.errors import TltError

_MOST_STATES = 100_000
_MOST_PAIRS = 20_000_000

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """One option: its rank (None is the dense matrix), the parameters it takes and the loss it brings."""

    rank: int | None
    parameters: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """The index chosen for each group, the sums, and `bound`: no allocation of the budget has a smaller loss.

    `exact` says that the choice is proven optimal; else it is within `loss - bound` of it.
    """

    chosen: tuple[int, ...]
    loss: float
    parameters: int
    bound: float
    exact: bool


def allocate(options: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Per group of options the index of the chosen one: the least sum of losses whose parameters fit into the budget.

    Raises TltError where even the smallest options do not fit.
    """
    return list(allocation(options, budget).chosen)


def allocation(options: Sequence[Sequence[Choice]], budget: int) -> Allocation:
    """As `allocate`, with the sums and what is known of the optimum."""
    sizes = [np.array([choice.parameters for choice in group], dtype=np.int64) for group in options]
    losses = [np.array([choice.loss for choice in group], dtype=np.float64) for group in options]
    return allocation_of(sizes, losses, budget)


def allocation_of(sizes: Sequence[Integers], losses: Sequence[Floats], budget: int) -> Allocation:
    """As `allocation`, of parameters and losses by group, the i-th choice the i-th of both."""
    assert all(len(group) for group in sizes) and all(np.isfinite(loss).all() for loss in losses)
    least = sum(int(size.min()) for size in sizes)
    if least > budget:
        raise TltError(f"the smallest choice of every matrix takes {least:,} parameters; the budget is {budget:,}")
    best = [int(np.lexsort((size, loss))[0]) for size, loss in zip(sizes, losses, strict=True)]
    if sum(int(size[at]) for size, at in zip(sizes, best, strict=True)) <= budget:
        return _result(sizes, losses, best, bound=-math.inf, exact=True)
    price, greedy = _greedy(sizes, losses, budget)
    charged = [loss + price * size for size, loss in zip(sizes, losses, strict=True)]
    floors = [float(value.min()) for value in charged]
    bound = math.fsum(floors) - price * budget
    found, exact = _search(sizes, losses, charged, floors, budget, price, greedy)
    return _result(sizes, losses, found, bound=bound, exact=exact)


def _result(
    sizes: Sequence[Integers], losses: Sequence[Floats], chosen: Sequence[int], *, bound: float, exact: bool
) -> Allocation:
    loss = math.fsum(float(group[at]) for group, at in zip(losses, chosen, strict=True))
    parameters = sum(int(group[at]) for group, at in zip(sizes, chosen, strict=True))
    return Allocation(tuple(chosen), loss, parameters, loss if exact else min(bound, loss), exact)


def _greedy(sizes: Sequence[Integers], losses: Sequence[Floats], budget: int) -> tuple[float, list[int]]:
    """The price at which the hulls' choices just exceed the budget, and a good allocation within it."""
    hulls = [_hull(size, loss) for size, loss in zip(sizes, losses, strict=True)]
    steps = sorted(
        (
            (float(losses[group][a] - losses[group][b]) / int(sizes[group][b] - sizes[group][a]), group, place + 1)
            for group, hull in enumerate(hulls)
            for place, (a, b) in enumerate(pairwise(hull))
        ),
        key=lambda step: (-step[0], step[1], step[2]),
    )
    places = [0] * len(hulls)
    left = budget - sum(int(sizes[group][hull[0]]) for group, hull in enumerate(hulls))
    price = 0.0
    for slope, group, place in steps:
        hull = hulls[group]
        cost = int(sizes[group][hull[place]] - sizes[group][hull[place - 1]])
        if places[group] == place - 1 and cost <= left:
            places[group], left = place, left - cost
        elif not price:
            price = slope  # the first step that does not fit
    chosen = [hull[place] for hull, place in zip(hulls, places, strict=True)]
    for group, (size, loss) in enumerate(zip(sizes, losses, strict=True)):  # options beside the hull that still fit
        fitting = np.flatnonzero(size - size[chosen[group]] <= left)
        better = int(fitting[np.lexsort((size[fitting], loss[fitting]))[0]])
        left -= int(size[better] - size[chosen[group]])
        chosen[group] = better
    return price, chosen


def _hull(size: Integers, loss: Floats) -> list[int]:
    """Indices on the lower convex hull, by increasing size and decreasing loss."""
    hull: list[int] = []
    for index in np.lexsort((loss, size)).tolist():
        if hull and loss[index] >= loss[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (loss[a] - loss[b]) * (size[index] - size[a]) > (loss[a] - loss[index]) * (size[b] - size[a]):
                break
            hull.pop()
        hull.append(index)
    return hull


def _search(
    sizes: Sequence[Integers],
    losses: Sequence[Floats],
    charged: Sequence[Floats],
    floors: Sequence[float],
    budget: int,
    price: float,
    greedy: list[int],
) -> tuple[list[int], bool]:
    """The best allocation, and whether that is proven: states (parameters, loss) group by group, none of which is
    worse than another in both, and none of which must end above the greedy allocation."""
    goal = math.fsum(float(loss[at]) for loss, at in zip(losses, greedy, strict=True))
    room = goal - (math.fsum(floors) - price * budget)  # what is charged above the floors may not reach this
    rounding = 1e-12 * (abs(goal) + price * budget)
    useful = [np.flatnonzero(value - floor <= room + rounding) for value, floor in zip(charged, floors, strict=True)]
    rest_least = np.cumsum([int(size[use].min()) for size, use in zip(sizes, useful, strict=True)][::-1])[::-1]
    rest_most = np.cumsum([int(size[use].max()) for size, use in zip(sizes, useful, strict=True)][::-1])[::-1]
    rest_least, rest_most = np.append(rest_least, 0), np.append(rest_most, 0)
    taken, above, exact = np.zeros(1, np.int64), np.zeros(1), True
    trail: list[tuple[Integers, Integers]] = []
    for group, use in enumerate(useful):
        most = max(1, min(_MOST_STATES, _MOST_PAIRS // len(use)))
        if len(taken) > most:
            keep = np.sort(np.argsort(above, kind="stable")[:most])
            taken, above, exact = taken[keep], above[keep], False
            parents, picks = trail[-1]
            trail[-1] = parents[keep], picks[keep]
        total = (taken[:, None] + sizes[group][use]).ravel()
        extra = (above[:, None] + (charged[group][use] - floors[group])).ravel()
        idle = np.maximum(budget - total - rest_most[group + 1], 0)
        fits = (total + rest_least[group + 1] <= budget) & (extra + price * idle <= room + rounding)
        where = np.flatnonzero(fits)
        total, extra = total[where], extra[where]
        order = np.lexsort((extra, total))
        loss = (extra - price * total)[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = loss[1:] < np.minimum.accumulate(loss)[:-1]
        kept = order[first]
        taken, above, where = total[kept], extra[kept], where[kept]
        trail.append((where // len(use), use[where % len(use)]))
    if not len(taken):  # only where states were given up
        return greedy, False
    state = int(np.argmin(above - price * taken))
    chosen = []
    for parents, picks in reversed(trail):
        chosen.append(int(picks[state]))
        state = int(parents[state])
    chosen.reverse()
    found = math.fsum(float(loss[at]) for loss, at in zip(losses, chosen, strict=True))
    return (chosen, exact) if found <= goal else (greedy, exact)
