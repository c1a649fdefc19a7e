"""Which groups of a linear's inputs can go when the weights of the others are refit: backward greedy.

With H = E[x xT] and K = WT W the loss of zeroing the inputs B, all others refit by least squares, is

    tr( K_BB ([H^-1]_BB)^-1 )

(optimal brain surgeon, Hassibi and Stork 1993, for blocks). Heads are such groups; neurons and channels are groups of
one, for which calibration/neurons.py has the same in a metric of the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tlt_cli.model.cut import Index

_DAMPING = 1e-6  # of H's mean diagonal
_STEPS = 1024  # at most: where more groups go than that, several go at once


@dataclass(frozen=True, eq=False)
class Removed:
    """`kept` are the groups that stay, in the order of what each would cost then, the dearest first. `loss` is what the
    others cost, those that stay being refit: E||W x - W' x'||^2 / E||W x||^2."""

    kept: Index
    loss: float


def removed(
    gram: Tensor, inputs: Tensor, groups: Index, keep: int, *, owners: Sequence[int] | None = None, each: int = 0
) -> Removed:
    """Keep `keep` of the `groups` [count, size] of inputs, by K [n, n] and H [n, n].

    With `owners` every owner of groups keeps `each` of its own, and they stay together, in the order of the owners.
    """
    count, where = len(groups), torch.from_numpy(groups)
    ridge = _DAMPING * float(inputs.diagonal().mean()) or 1e-30
    inverse = torch.linalg.inv(inputs.double() + ridge * torch.eye(len(inputs), dtype=torch.float64))
    gram = gram.double().clone()
    total, lost = float((gram * inputs).sum()), 0.0
    stays = np.ones(count, dtype=bool)
    at_once = 1 if owners is not None else max(1, -(-(count - keep) // _STEPS))
    while stays.sum() > keep:
        free = stays if owners is None else stays & (_left(owners, stays) > each)
        costs = _costs(gram, inverse, where).masked_fill(~torch.from_numpy(free), torch.inf)
        chosen = costs.argsort(stable=True)[: min(at_once, int(stays.sum()) - keep)]
        entries = where[chosen].flatten()
        inner = torch.linalg.inv(inverse[entries][:, entries])
        lost += float((gram[entries][:, entries] * inner).sum())
        taken = inner @ inverse[entries]  # the others take over: W - W_B taken
        inverse.addmm_(inverse[:, entries], taken, alpha=-1)
        gram.addmm_(gram[:, entries], taken, alpha=-1)
        gram.addmm_(taken.T, gram[entries], alpha=-1)
        for matrix in (inverse, gram):
            matrix[entries], matrix[:, entries] = 0.0, 0.0
        inverse[entries, entries] = 1.0
        stays[chosen.numpy()] = False
    kept = np.flatnonzero(stays)
    order = largest(_costs(gram, inverse, where)[torch.from_numpy(kept)], keep)
    kept = kept[order]
    if owners is not None:
        kept = np.array([group for owner in dict.fromkeys(owners) for group in kept.tolist() if owners[group] == owner])
    return Removed(kept, lost / total if total else 0.0)


def largest(scores: Tensor, keep: int, *, owners: Sequence[int] | None = None, each: int = 0) -> Index:
    """The `keep` largest of the scores [count], largest first and the first one where some are equal; with `owners` the
    `each` largest of every owner, in the order of the owners."""
    order: Index = scores.argsort(descending=True, stable=True).numpy()
    if owners is None:
        return order[:keep]
    return np.concatenate(
        [np.array([at for at in order.tolist() if owners[at] == owner][:each]) for owner in dict.fromkeys(owners)]
    )


def _left(owners: Sequence[int], stays: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Index:
    """How many groups the owner of each still has."""
    held = np.array(owners)
    found: Index = (held[:, None] == held[None]) @ stays.astype(np.int64)
    return found


def _costs(gram: Tensor, inverse: Tensor, groups: Tensor) -> Tensor:
    """The loss of every group on its own [count]; nothing for one that is gone."""
    if groups.shape[1] == 1:
        return gram.diagonal()[groups[:, 0]] / inverse.diagonal()[groups[:, 0]]
    rows, columns = groups[:, :, None], groups[:, None, :]
    costs: Tensor = (gram[rows, columns] * torch.linalg.inv(inverse[rows, columns])).sum((1, 2))
    return costs
