"""Blocks inside a model that share its batch out: the whole sees every row, and in each level every row has one model.

Level l has n = split^l models side by side. A row lies at p in [0, 1): the rows of stream s, of S, evenly over
[s/S, (s + 1)/S). Model k of n is given those with k - 1 <= p n < k, so that streams go to models of their own as far as
there are enough, what a model sees is what the models inside it see, and one stream is dealt out in equal shares.
(Gains of a norm over each head's entries belong to all heads, so that models side by side have them in common.)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tlt_cli.errors import UsageError
from tlt_cli.families import Fit
from tlt_cli.model.nested import splits
from tlt_cli.training.windows import Batch

_BITS = 32  # of a row's place in its stream


def assigned(batch: Batch, streams: int, models: int) -> Tensor:
    """Which of a level's models is given each row, from 0: [B] int64.

    Depends on the row's stream and its number alone, so neither on micro-batches nor on ranks.
    """
    place = (batch.streams.numpy() << _BITS) + _spread(batch.numbers.numpy())
    return torch.from_numpy(place * models // (streams << _BITS))


def seen(block: int, blocks: int, streams: int) -> list[float]:
    """The share of each stream's rows that block `block`, from 1, of `blocks` is given.

    >>> seen(1, 4, 2), seen(3, 4, 2)
    ([0.5, 0.0], [0.0, 0.5])
    """
    low, high = (block - 1) * streams / blocks, block * streams / blocks
    return [max(0.0, min(stream + 1, high) - max(stream, low)) for stream in range(streams)]


def check_splits(fit: Fit, levels: int, split: int) -> None:
    """UsageError, with what would work, for a fractal whose blocks would not come out whole."""
    if _whole(fit, levels, split):
        return
    others = [str(other) for other in range(2, fit.sizes["hidden"] + 1) if _whole(fit, levels, other)]
    depths = [depth for depth in range(2, levels) if _whole(fit, depth, split)]
    works = [*([f"--split {', '.join(others)}"] if others else []), *([f"--fractal {depths[-1]}"] if depths else [])]
    raise UsageError(
        f"--fractal {levels} --split {split}: dim {fit.sizes['hidden']}, ffn {fit.sizes['ffn']} and {fit.kv_heads} "
        f"key/value heads of {fit.head_dim} entries do not all split into {split ** (levels - 1)} blocks; these work: "
        f"{' or '.join(works) or 'none'}"
    )


def _whole(fit: Fit, levels: int, split: int) -> bool:
    return split ** (levels - 1) <= fit.sizes["hidden"] and all(splits(fit, split**at) for at in range(1, levels))


def _spread(numbers: np.ndarray) -> np.ndarray:
    """Numbers as places in [0, 2^32), any that follow each other spread evenly: their bits the other way round.

    (The van der Corput sequence in base 2.)
    """
    found = np.zeros_like(numbers)
    for bit in range(_BITS):
        found |= (numbers >> bit & 1) << (_BITS - 1 - bit)
    return found
