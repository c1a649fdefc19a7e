"""The way down a binary tree: what a router reads, how likely each node is reached, and which way is taken.

Nodes are numbered as in a heap: below node n stand 2n + 1, taken where the router says no, and 2n + 2. Leaves are
numbered from left to right. B sequences of T tokens, streams H wide, a tree of depth D with L = 2^D leaves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tlt_cli.model.step import Step

_SUM, _COUNT = "tree.sum", "tree.count"


def wide(x: Tensor) -> Tensor:
    """float64 as it is, all else in float32: sums over a text and logarithms need it."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """x [..., H] with unit root-mean-square: the mean of k embeddings shrinks as 1 / sqrt(k)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12)


def causal_mean(x: Tensor, step: Step, longest: int | None = None) -> Tensor:
    """The mean of a row's tokens up to each of them, [B, T, H], scaled to unit size; x is the stream [B, T, H].

    Documents of a packed row begin anew, padding is not counted, and a cache goes on where it was. With `longest` only
    so many tokens count from the start of a sequence or document: behind them the mean stays. Nothing looks ahead.
    """
    values = wide(x.detach())
    counted = torch.ones(x.shape[:2], dtype=values.dtype, device=x.device)
    if step.present is not None:
        counted = counted * step.present[:, step.start :]
    if longest is not None:
        counted = counted * (step.positions < longest)
    sums = (values * counted[..., None]).cumsum(1)
    counts = counted.cumsum(1)
    if step.documents is not None:
        place = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        first = torch.ones_like(step.documents, dtype=torch.bool)
        first[:, 1:] = step.documents[:, 1:] != step.documents[:, :-1]
        start = torch.where(first, place, 0).cummax(-1).values
        sums = sums - functional.pad(sums, (0, 0, 1, 0)).gather(1, start[..., None].expand_as(sums))
        counts = counts - functional.pad(counts, (1, 0)).gather(1, start)
    if step.cache is not None:
        notes = step.cache.notes
        if _SUM in notes:
            sums, counts = sums + notes[_SUM][:, None], counts + notes[_COUNT][:, None]
        notes[_SUM], notes[_COUNT] = sums[:, -1], counts[:, -1]
    return unit(sums / counts.clamp(min=1)[..., None])


def log_reach(logits: Tensor) -> list[Tensor]:
    """The logarithm of the chance that each node is reached, level by level: [..., 1], [..., 2], ... [..., L].

    `logits` [..., L - 1] are the routers', in heap order: at each the right child is taken with their sigmoid.
    """
    levels = [torch.zeros_like(logits[..., :1])]
    while levels[-1].shape[-1] <= logits.shape[-1]:
        width = levels[-1].shape[-1]
        own = logits[..., width - 1 : 2 * width - 1]
        pair = torch.stack([levels[-1] + functional.logsigmoid(-own), levels[-1] + functional.logsigmoid(own)], -1)
        levels.append(pair.flatten(-2))
    return levels


def greedy(logits: Tensor) -> list[Tensor]:
    """1.0 at the nodes on the way down that follows every router's sign, 0.0 elsewhere; level by level as `log_reach`.

    It is not always the way to the likeliest leaf; it is what a model that computes one leaf can follow.
    """
    levels = [torch.ones_like(logits[..., :1])]
    while levels[-1].shape[-1] <= logits.shape[-1]:
        width = levels[-1].shape[-1]
        right = (logits[..., width - 1 : 2 * width - 1] >= 0).to(logits.dtype)
        levels.append(torch.stack([levels[-1] * (1 - right), levels[-1] * right], -1).flatten(-2))
    return levels


def one_path(leaf: int, depth: int, like: Tensor) -> list[Tensor]:
    """The nodes above one leaf, and the leaf: as `greedy` would say it, [1], [2], ... [L]."""
    levels = []
    for level in range(depth + 1):
        place = torch.tensor(leaf >> (depth - level), device=like.device)
        levels.append(functional.one_hot(place, 1 << level).to(like.dtype))
    return levels


def path_nodes(leaf: int, depth: int) -> tuple[int, ...]:
    """The nodes from the root down to a leaf, by their numbers in the heap.

    >>> path_nodes(2, 2)
    (0, 2, 5)
    """
    return tuple((1 << level) - 1 + (leaf >> (depth - level)) for level in range(depth + 1))


def entropy(log_chances: Tensor) -> Tensor:
    """Of distributions [..., L] given by their logarithms: [...], as a share of the most that it can be, log L."""
    return -(log_chances.exp() * log_chances).sum(-1) / math.log(log_chances.shape[-1])


def spread(chances: Tensor) -> Tensor:
    """The entropy of a distribution [L] as a share of log L: 1 where all are as likely, 0 where one takes all."""
    return -(chances * chances.clamp(min=1e-30).log()).sum(-1) / math.log(chances.shape[-1])
