"""What can be done with each group of a block's matrices, and what each choice costs and loses to second order.

Query, key and value may share one right factor, and so may gate and up; neurons of the feed-forward may go, with `down`
refit; every matrix may stay whole or be cut to any rank. A group's choices are those that some price per parameter
would pick; one allocation then chooses for all groups of all blocks (surgery/allocate.py).

A menu holds numbers alone, so that those of all blocks fit into memory; what was chosen is made from the block's
weights and moments once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlt_cli.calibration.moments import Moments
from tlt_cli.calibration.neurons import refit_kept, removal_order
from tlt_cli.calibration.pieces import Dense, Piece, low
from tlt_cli.surgery.decompose import DAMPING, Decomposition, decompose

_PRICES = 256
_LEAST = 1e-9  # of the largest mean diagonal of a group: damping where a matrix has no gradients at all
_REMOVALS = 24  # numbers of neurons tried, evenly up to 15/16 of them
_MOST_NEURONS = 4096  # the greedy order takes f^3 steps: beyond this no neurons are removed

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Menu:
    """The choices of one group, cheapest first: what each costs in parameters [n] and loses to second order [n].

    `ranks` [n, roles] are those of the roles, 0 for a matrix that stays whole; where `shares` [n] the first ones, all
    but `down`, have one right factor. `gone` [n] counts the neurons that go, the first ones in the `order` of all.
    """

    roles: tuple[str, ...]
    costs: Integers
    losses: Floats
    ranks: Integers
    shares: NDArray[np.bool_]
    gone: Integers
    order: Tensor

    def kept(self, index: int) -> Tensor | None:
        """The neurons that stay at a choice, ascending; None where all do."""
        return _stay(self.order, int(self.gone[index])) if self.gone[index] else None

    def make(self, index: int, weights: Mapping[str, Tensor], moments: Moments, layer: int) -> dict[str, Piece]:
        """The pieces of a choice by role, from the block's `weights` [out, in] and moments."""
        block = _Block(weights, moments, layer).without(self.order, int(self.gone[index]))
        chosen = dict(zip(self.roles, self.ranks[index].tolist(), strict=True))
        together = [role for role in self.roles if role != "down"] if self.shares[index] else []
        pieces: dict[str, Piece] = {}
        if together:
            made = block.curve(together).pieces(chosen[together[0]])
            pieces.update(zip(together, made, strict=True))
        for role in self.roles:
            if role not in pieces:
                whole = [Dense(block.weights[role].float().contiguous())]
                pieces[role] = (block.curve([role]).pieces(chosen[role]) if chosen[role] else whole)[0]
        return pieces


@dataclass(frozen=True, eq=False)
class Curve:
    """Several matrices cut with one right factor, or one matrix: cost and loss of every rank, the last one whole."""

    rows: tuple[int, ...]
    decomposition: Decomposition
    ranks: Integers  # 0 for the whole
    costs: Floats
    losses: Floats

    def best(self, prices: Floats) -> Integers:
        """The cheapest index at each price per parameter."""
        found: Integers = (self.losses + prices[:, None] * self.costs).argmin(1)
        return found

    def pieces(self, rank: int) -> list[Piece]:
        """Factors of this rank that share a."""
        a, b = self.decomposition.factors(rank)
        return [*low(a, torch.split(b, list(self.rows)))]


def curve(weights: Sequence[Tensor], inputs: Tensor, outputs: Sequence[Tensor | None], *, align: int = 1) -> Curve:
    """The curve of matrices [m_i, n] that read the same input, in K-FAC's metric (input's own without gradients), at
    ranks that are multiples of `align`.

    A factored one is counted with pivots: r (sum of m + n) - r^2, which is less than the whole for every r below it.
    """
    stacked = torch.cat([weight.double() for weight in weights])
    given = [each for each in outputs if each is not None]
    least = _LEAST * max((float(each.diagonal().mean()) for each in given), default=0.0)
    felt = [damped(each, least) for each in given]
    metric: Tensor | None = torch.block_diag(*felt) if felt else None  # type: ignore[no-untyped-call]
    found = decompose(stacked, inputs=inputs, outputs=metric, damping=0.0 if metric is not None else DAMPING)
    rows, columns = stacked.shape
    ranks = np.arange(align, min(rows, columns), align)
    costs = np.append(ranks * (rows + columns) - ranks**2, rows * columns).astype(np.float64)
    losses = np.array([found.error(int(rank)) ** 2 for rank in ranks] + [0.0])
    return Curve(tuple(len(weight) for weight in weights), found, np.append(ranks, 0), costs, losses)


def damped(outputs: Tensor, least: float = 0.0) -> Tensor:
    """G with its own share of damping, and no less than `least`: stacked matrices must not be damped by each other's,
    and one that no gradient reached must not be singular among them."""
    share = max(DAMPING * float(outputs.diagonal().mean()), least)
    return outputs + share * torch.eye(len(outputs), dtype=outputs.dtype)


def menus(weights: Mapping[str, Tensor], moments: Moments, layer: int, *, align: int = 1) -> Iterator[Menu]:
    """The choices of every group of one block: {query, key, value}, {output}, {gate, up, down}, as far as `weights`
    [out, in] has them by role. Neurons can go only where the whole feed-forward is there. Ranks are multiples of
    `align`, and so is the number of neurons where some go."""
    block = _Block(weights, moments, layer, align)
    attention = [role for role in ("query", "key", "value") if role in weights]
    inner = [role for role in ("gate", "up") if role in weights]
    groups = [attention] if attention else []
    groups += [["output"]] if "output" in weights else []
    whole = "down" in weights and "up" in inner
    if not whole:
        groups += [[role] for role in [*inner, "down"] if role in weights]
    yield from (_sharing(roles, block) for roles in groups)
    if whole:
        yield _feed_forward(inner, block)


@dataclass(frozen=True, eq=False)
class _Block:
    """The matrices of a block by role, and what a text says of them."""

    weights: Mapping[str, Tensor]
    moments: Moments
    layer: int
    align: int = 1
    kept: Tensor | None = None

    def inputs(self, role: str) -> Tensor:
        found = self.moments.inputs(self.layer, role)
        return found if self.kept is None or role != "down" else found[self.kept][:, self.kept]

    def outputs(self, role: str) -> Tensor | None:
        found = self.moments.outputs(self.layer, role)
        return found if found is None or self.kept is None or role == "down" else found[self.kept][:, self.kept]

    def curve(self, roles: Sequence[str]) -> Curve:
        weights, felt = [self.weights[role] for role in roles], [self.outputs(role) for role in roles]
        return curve(weights, self.inputs(roles[0]), felt, align=self.align)

    def without(self, order: Tensor, count: int) -> _Block:
        """Fewer neurons in the feed-forward, `down` refit on the others."""
        if not count:
            return self
        stays = _stay(order, count)
        fewer = {role: self.weights[role][stays] for role in ("gate", "up") if role in self.weights}
        fewer["down"] = refit_kept(self.weights["down"], self.moments.inputs(self.layer, "down"), stays)
        return _Block({**self.weights, **fewer}, self.moments, self.layer, self.align, stays)


def _stay(order: Tensor, count: int) -> Tensor:
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[order[:count].long()] = False
    return kept.nonzero().flatten()


def _feed_forward(inner: Sequence[str], block: _Block) -> Menu:
    down = block.weights["down"]
    size = down.shape[1]
    order, losses, counts = torch.arange(size, dtype=torch.int32), torch.zeros(1, dtype=torch.float64), [0]
    if size <= _MOST_NEURONS:
        most = size * 15 // 16
        outputs = block.outputs("down")
        removal = removal_order(down, block.inputs("down"), None if outputs is None else damped(outputs), most=most)
        losses = removal.loss
        rest = torch.ones(size, dtype=torch.bool)
        rest[removal.order] = False
        order = torch.cat([removal.order, rest.nonzero().flatten()]).int()
        tried = {size - round(step * most / _REMOVALS) for step in range(1, _REMOVALS + 1)}
        aligned = {size - -(-stay // block.align) * block.align for stay in tried}
        counts = [0, *sorted(count for count in aligned if count > 0)]
    found = []
    for count in counts:
        fewer = block.without(order, count)
        upper, lower = _sharing(inner, fewer), _sharing(["down"], fewer)
        found.append(_sums(upper, lower, float(losses[count]), count, order))
    return _useful(_joined(found))


def _sums(upper: Menu, lower: Menu, loss: float, count: int, order: Tensor) -> Menu:
    """Choices of two groups together, those alone that some price would pick."""
    prices = _prices(upper, lower)
    first, second = ((menu.losses + prices[:, None] * menu.costs).argmin(1) for menu in (upper, lower))
    pairs = np.array(list(dict.fromkeys(zip(first.tolist(), second.tolist(), strict=True))), dtype=np.int64)
    i, j = pairs[:, 0], pairs[:, 1]
    return Menu(
        (*upper.roles, *lower.roles),
        upper.costs[i] + lower.costs[j],
        upper.losses[i] + lower.losses[j] + loss,
        np.concatenate([upper.ranks[i], lower.ranks[j]], axis=1),
        upper.shares[i],
        np.full(len(pairs), count, dtype=np.int64),
        order,
    )


def _prices(*menus: Menu) -> Floats:
    """Prices from one that keeps everything to one that keeps nothing."""
    highest = max(float(menu.losses.max()) for menu in menus) + 1e-300
    smallest = max(1, min(int(menu.costs.min()) for menu in menus))
    return np.geomspace(highest / smallest * 1e-9, highest / smallest * 10, _PRICES)


def _sharing(roles: Sequence[str], block: _Block) -> Menu:
    """Each matrix by itself, or all of them with one right factor."""
    single = [block.curve([role]) for role in roles]
    highest = sum(float(each.losses.max()) for each in single) + 1e-300
    prices = np.geomspace(highest * 1e-12, highest, _PRICES)
    picked = np.array(sorted(set(zip(*(each.best(prices).tolist() for each in single), strict=True))), dtype=np.int64)
    costs, losses, ranks = np.zeros(len(picked)), np.zeros(len(picked)), np.empty_like(picked)
    for at, each in enumerate(single):
        costs, losses = costs + each.costs[picked[:, at]], losses + each.losses[picked[:, at]]
        ranks[:, at] = each.ranks[picked[:, at]]
    found = [_menu(roles, costs, losses, ranks, shares=False)]
    if len(roles) > 1:
        joint = block.curve(roles)
        below = np.arange(len(joint.costs) - 1)
        same = np.repeat(joint.ranks[below][:, None], len(roles), axis=1)
        found.append(_menu(roles, joint.costs[below], joint.losses[below], same, shares=True))
    return _useful(_joined(found))


def _menu(roles: Sequence[str], costs: Floats, losses: Floats, ranks: Integers, *, shares: bool) -> Menu:
    count, none = len(costs), torch.zeros(0, dtype=torch.int32)
    gone = np.zeros(count, dtype=np.int64)
    return Menu(tuple(roles), costs.astype(np.int64), losses, ranks, np.full(count, shares), gone, none)


def _joined(found: Sequence[Menu]) -> Menu:
    first = found[0]
    return Menu(
        first.roles,
        np.concatenate([menu.costs for menu in found]),
        np.concatenate([menu.losses for menu in found]),
        np.concatenate([menu.ranks for menu in found]),
        np.concatenate([menu.shares for menu in found]),
        np.concatenate([menu.gone for menu in found]),
        first.order,
    )


def _useful(menu: Menu) -> Menu:
    """Without the choices that another one beats in both, cheapest first."""
    order = np.lexsort((menu.losses, menu.costs))
    losses = menu.losses[order]
    better = np.ones(len(order), dtype=bool)
    better[1:] = losses[1:] < np.minimum.accumulate(losses)[:-1]
    at = order[better]
    return Menu(menu.roles, menu.costs[at], menu.losses[at], menu.ranks[at], menu.shares[at], menu.gone[at], menu.order)
