"""Gains for a merged model of a stock architecture, whose norms see the streams of all its models at once.

Block k of such a norm's output is r_k(t) = rms_k / sqrt(mean_j rms_j^2) times what its own model would compute. The
norm's gains there, times exp(E_t log(1 / r_k)), make up for its geometric mean over a text's tokens t (reference:
slice and merge, section 3.2). Each norm is measured behind those that are corrected already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tlt_cli.model.decoder import Decoder
from tlt_cli.surgery.stock_layout import HEAD_NORMS


@torch.no_grad()
def stock_gains(decoder: Decoder, ids: Tensor, count: int) -> dict[tuple[str, int], tuple[float, ...]]:
    """The log of each model's factor by (role, layer) of the norms, on ids [N, T]; `decoder` is the uncorrected model.

    All windows run at once, so that a block is measured as a whole before the next one: N T tokens of the stream are
    held, and one tensor of a streamed decoder.
    """
    found: dict[tuple[str, int], tuple[float, ...]] = {}
    plain = decoder.normalize

    def normalize(x: Tensor, role: str, layer: int = 0) -> Tensor:
        normal = plain(x, role, layer)
        if role in HEAD_NORMS:
            return normal
        squares = torch.unflatten(x.double(), -1, (count, -1)).pow(2).mean(-1) + decoder.description["epsilon"]
        logs = 0.5 * (squares.mean(-1, keepdim=True).log() - squares.log()).flatten(0, -2).mean(0)
        found[role, layer] = tuple(logs.tolist())
        factors: Tensor = logs.exp().to(normal.dtype).repeat_interleave(x.shape[-1] // count)
        return normal * factors

    decoder.normalize = normalize  # type: ignore[method-assign]
    try:
        decoder(ids, read=lambda x: decoder.normalize(x, "final_norm"))
    finally:
        del decoder.normalize
    return found
