"""What can be done with each group of a block's matrices, and what each choice costs and loses to second order.

Query, key and value may share one right factor, and so may gate and up; neurons of the feed-forward may go, with `down`
refit; every matrix may stay whole or be cut to any rank. A group's choices are those that some price per parameter
would pick; one allocation then chooses for all groups of all blocks (surgery/allocate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlt_cli.calibration.moments import Moments
from tlt_cli.calibration.neurons import refit_kept, removal_order
from tlt_cli.calibration.pieces import Dense, Piece, low
from tlt_cli.surgery.allocate import Choice
from tlt_cli.surgery.decompose import DAMPING, Decomposition, decompose

_PRICES = 256
_REMOVALS = 24  # numbers of neurons tried, evenly up to 15/16 of them
_MOST_NEURONS = 4096  # the greedy order takes f^3 steps: beyond this no neurons are removed


@dataclass(frozen=True, eq=False)
class Option:
    """One way to store a group: parameters, second-order loss, and the pieces it makes by role. `kept` lists the
    neurons that stay (None: all)."""

    parameters: int
    loss: float
    make: Callable[[], dict[str, Piece]]
    kept: Tensor | None = None

    @property
    def choice(self) -> Choice:
        """As the allocation sees it."""
        return Choice(None, self.parameters, self.loss)


@dataclass(frozen=True, eq=False)
class Curve:
    """Several matrices cut with one right factor, or one matrix: cost and loss of every rank, the last one whole."""

    weights: tuple[Tensor, ...]
    decomposition: Decomposition
    costs: NDArray[np.float64]
    losses: NDArray[np.float64]

    def best(self, prices: NDArray[np.float64]) -> NDArray[np.int64]:
        """The cheapest index at each price per parameter."""
        found: NDArray[np.int64] = (self.losses + prices[:, None] * self.costs).argmin(1)
        return found

    def pieces(self, index: int) -> list[Piece]:
        """What index stands for: factors of rank index + 1 that share a, or the matrices themselves."""
        if index == len(self.costs) - 1:
            return [Dense(weight.float().contiguous()) for weight in self.weights]
        a, b = self.decomposition.factors(index + 1)
        return [*low(a, torch.split(b, [len(weight) for weight in self.weights]))]


def curve(weights: Sequence[Tensor], inputs: Tensor, outputs: Sequence[Tensor | None]) -> Curve:
    """The curve of matrices [m_i, n] that read the same input, in K-FAC's metric (input's own without gradients).

    A factored one is counted with pivots: r (sum of m + n) - r^2, which is less than the whole for every r below it.
    """
    stacked = torch.cat([weight.double() for weight in weights])
    felt = [_damped(each) for each in outputs if each is not None]
    metric: Tensor | None = torch.block_diag(*felt) if felt else None  # type: ignore[no-untyped-call]
    found = decompose(stacked, inputs=inputs, outputs=metric, damping=0.0 if metric is not None else DAMPING)
    rows, columns = stacked.shape
    ranks = np.arange(1, min(rows, columns))
    costs = np.append(ranks * (rows + columns) - ranks**2, rows * columns).astype(np.float64)
    losses = np.array([found.error(int(rank)) ** 2 for rank in ranks] + [0.0])
    return Curve(tuple(weights), found, costs, losses)


def _damped(outputs: Tensor) -> Tensor:
    """G with its own share of damping: stacked matrices must not be damped by each other's."""
    return outputs + DAMPING * outputs.diagonal().mean() * torch.eye(len(outputs), dtype=outputs.dtype)


def group_options(weights: dict[str, Tensor], moments: Moments, layer: int) -> list[list[Option]]:
    """The choices of every group of one block: {query, key, value}, {output}, {gate, up, down}, as far as `weights`
    [out, in] has them by role. Neurons can go only where the whole feed-forward is there."""
    read = {role: moments.inputs(layer, role) for role in weights}
    felt = {role: moments.outputs(layer, role) for role in weights}
    groups = []
    attention: list[str] = [role for role in ("query", "key", "value") if role in weights]
    if attention:
        groups.append(_sharing(attention, weights, read[attention[0]], felt))
    if "output" in weights:
        groups.append(_sharing(["output"], weights, read["output"], felt))
    inner: list[str] = [role for role in ("gate", "up") if role in weights]
    if "down" in weights and "up" in inner:
        groups.append(_feed_forward(inner, weights, read, felt))
    else:
        for role in [*inner, *(["down"] if "down" in weights else [])]:
            groups.append(_sharing([role], weights, read[role], felt))
    return groups


def _feed_forward(
    inner: Sequence[str], weights: dict[str, Tensor], read: dict[str, Tensor], felt: dict[str, Tensor | None]
) -> list[Option]:
    size = weights["down"].shape[1]
    everything = torch.arange(size)
    gone, losses, counts = everything[:0], torch.zeros(1, dtype=torch.float64), [0]
    if size <= _MOST_NEURONS:
        most = size * 15 // 16
        outputs = felt["down"]
        removal = removal_order(weights["down"], read["down"], None if outputs is None else _damped(outputs), most=most)
        gone, losses = removal.order, removal.loss
        counts = sorted({round(step * most / _REMOVALS) for step in range(_REMOVALS + 1)})
    options: list[Option] = []
    for count in counts:
        kept = torch.ones(size, dtype=torch.bool)
        kept[gone[:count]] = False
        stays = everything[kept]
        fewer = {role: weights[role][stays] for role in inner}
        fewer["down"] = refit_kept(weights["down"], read["down"], stays) if count else weights["down"]
        felt_here = {role: None if (g := felt[role]) is None else g[stays][:, stays] for role in inner}
        upper = _sharing(inner, fewer, read["up"], felt_here)
        inputs = read["down"][stays][:, stays]
        lower = _sharing(["down"], fewer, inputs, {"down": felt["down"]})
        options += _sums(upper, lower, float(losses[count]), stays if count else None)
    return _useful(options)


def _sums(upper: list[Option], lower: list[Option], loss: float, kept: Tensor | None) -> list[Option]:
    """Choices of two groups together, those alone that some price would pick."""
    combined: dict[tuple[int, int], None] = {}
    for price in _prices(upper + lower):
        first = min(range(len(upper)), key=lambda i: upper[i].loss + price * upper[i].parameters)
        second = min(range(len(lower)), key=lambda i: lower[i].loss + price * lower[i].parameters)
        combined[first, second] = None
    return [
        Option(
            upper[i].parameters + lower[j].parameters,
            upper[i].loss + lower[j].loss + loss,
            lambda i=i, j=j: {**upper[i].make(), **lower[j].make()},  # type: ignore[misc]
            kept,
        )
        for i, j in combined
    ]


def _prices(options: Sequence[Option]) -> NDArray[np.float64]:
    """Prices from one that keeps everything to one that keeps nothing."""
    highest = max(option.loss for option in options) + 1e-300
    smallest = max(1, min(option.parameters for option in options))
    return np.geomspace(highest / smallest * 1e-9, highest / smallest * 10, _PRICES)


def _sharing(
    roles: Sequence[str],
    weights: dict[str, Tensor],
    inputs: Tensor,
    felt: dict[str, Tensor | None],
) -> list[Option]:
    """Each matrix by itself, or all of them with one right factor."""
    single = [curve([weights[role]], inputs, [felt[role]]) for role in roles]
    joint = [curve([weights[role] for role in roles], inputs, [felt[role] for role in roles])] if len(roles) > 1 else []
    highest = sum(float(each.losses.max()) for each in single) + 1e-300
    prices = np.geomspace(highest * 1e-12, highest, _PRICES)
    options = []
    for picked in sorted(set(zip(*(each.best(prices).tolist() for each in single), strict=True))):
        options.append(
            Option(
                int(sum(each.costs[index] for each, index in zip(single, picked, strict=True))),
                float(sum(each.losses[index] for each, index in zip(single, picked, strict=True))),
                lambda picked=picked: {  # type: ignore[misc]
                    role: each.pieces(index)[0] for role, each, index in zip(roles, single, picked, strict=True)
                },
            )
        )
    for each in joint:
        for index in range(len(each.costs) - 1):
            options.append(
                Option(
                    int(each.costs[index]),
                    float(each.losses[index]),
                    lambda each=each, index=index: dict(zip(roles, each.pieces(index), strict=True)),  # type: ignore[misc]
                )
            )
    return _useful(options)


def _useful(options: Sequence[Option]) -> list[Option]:
    """Without those that another one beats in both, cheapest first."""
    found: list[Option] = []
    for option in sorted(options, key=lambda option: (option.parameters, option.loss)):
        if not found or option.loss < found[-1].loss:
            found.append(option)
    return found
