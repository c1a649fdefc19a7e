"""Which neurons of a feed-forward layer can go, with the weights of the rest moved so that its output stays close.

Backward greedy (optimal brain surgeon, Hassibi and Stork 1993): with H = E[h hT] of what `down` reads and G of what it
writes, removing neuron j and refitting the others by least squares costs (w_jT G w_j) / (H^-1)_jj.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPING = 1e-6  # of H's mean diagonal


@dataclass(frozen=True)
class Removal:
    """`order` lists neurons in the order they go; `loss[k]` is the metric's error once k of them are gone."""

    order: Tensor
    loss: Tensor


def removal_order(down: Tensor, inputs: Tensor, outputs: Tensor | None, *, most: int) -> Removal:
    """The first `most` neurons to remove from `down` [m, f], with H [f, f] and G [m, m], and the loss after each.

    The loss is tr(G dW H dWT), exact for the set removed.
    """
    weight = down.double().clone()
    metric = weight if outputs is None else outputs.double() @ weight
    size = len(inputs)
    inverse = torch.linalg.inv(inputs.double() + _ridge(inputs) * torch.eye(size))
    energy = (weight * metric).sum(0)  # w_jT G w_j of every column
    gone = torch.zeros(size, dtype=torch.bool)
    order, losses = [], [0.0]
    for _ in range(most):
        cost = torch.where(gone, torch.inf, energy / inverse.diagonal())
        index = int(cost.argmin())
        order.append(index)
        losses.append(losses[-1] + float(cost[index]))
        pivot = inverse[index, index]
        row = inverse[index] / pivot
        weight -= torch.outer(weight[:, index], row)
        inverse -= torch.outer(inverse[:, index], row)
        gone[index] = True
        inverse[index], inverse[:, index], inverse[index, index] = 0.0, 0.0, 1.0
        weight[:, index] = 0.0
        energy = (weight * (weight if outputs is None else outputs.double() @ weight)).sum(0)
    return Removal(torch.tensor(order, dtype=torch.long), torch.tensor(losses, dtype=torch.float64))


def refit_kept(down: Tensor, inputs: Tensor, kept: Tensor) -> Tensor:
    """`down` [m, f] on the kept neurons [k] only, by least squares on what it read: [m, k]."""
    wide = inputs.double()
    inside = wide[kept][:, kept]
    damped = inside + _ridge(wide) * torch.eye(len(kept))
    found: Tensor = torch.linalg.solve(damped, (down.double() @ wide[:, kept]).T).T
    return found


def _ridge(inputs: Tensor) -> float:
    """What makes H invertible: next to nothing where no input is ever anything but zero."""
    return _DAMPING * float(inputs.diagonal().mean()) or 1e-30
