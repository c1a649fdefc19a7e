"""A compressed block tuned to the original block's output: a few hundred steps in which no gradient leaves the block.

The block reads the compressed model's own stream and is held to what the original wrote from its own (anchored).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tlt_cli.calibration.blocks import Blocks


def refine_block(
    made: Blocks, layer: int, leaves: Sequence[Tensor], before: Tensor, target: Tensor, *,
    steps: int, windows: int = 8, rate: float = 4e-3, seed: int = 0, distribution: bool = False,
) -> list[float]:  # fmt: skip
    """Move `leaves` by Adam so that block(before) comes close to `target` [N, T, H]; returns the losses.

    The loss is the mean squared error over the target's variance; with `distribution`, for the last block, whose output
    the head reads at once, the KL divergence of the next token's distribution from the original's.
    """
    generator = torch.Generator().manual_seed(seed)
    unique = list({id(leaf): leaf for leaf in leaves}.values())
    for leaf in unique:
        leaf.requires_grad_(True)
    optimizer = torch.optim.Adam(unique, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    scale = float(target.var())
    losses = []
    for _ in range(steps):
        chosen = torch.randint(0, len(before), (windows,), generator=generator)
        out = made.run(layer, before[chosen])
        if not distribution:
            loss = functional.mse_loss(out, target[chosen]) / scale
        else:
            with torch.no_grad():
                wanted = made.decoder.logits(target[chosen]).log_softmax(-1)
            loss = functional.kl_div(
                made.decoder.logits(out).log_softmax(-1).flatten(0, 1), wanted.flatten(0, 1), log_target=True,
                reduction="batchmean",
            )  # fmt: skip
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    for leaf in unique:
        leaf.requires_grad_(False)
    return losses
