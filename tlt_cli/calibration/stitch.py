"""Glue that starts as what a text shows: each part's activations as all parts predict them, by least squares.

At a site M_ij = A_i^+ A_j maps what part i reads there to what part j reads (model stitching, arXiv:2106.07682). Part j
then reads (1 - s) x_j + s mean_i x_i M_ij, so s = 0 is the ensemble. Which s is best is measured on windows that the
maps were not fitted to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlt_cli.calibration.moments import outer
from tlt_cli.errors import TltError
from tlt_cli.families.glue import BLOCKS, LEFT, LOWRANK, RIGHT, WHOLE
from tlt_cli.model.grouped import Grouped
from tlt_cli.model.perplexity import summed_loss
from tlt_cli.surgery.glue import Starts

SHARES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # the values of s that are tried
_DAMPING = 1e-4  # of the mean square, for directions that the text hardly shows
_WIDEST = 16384  # entries of all parts together whose second moments are held
_BATCH = 8
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Stitched:
    """What glue starts as; None where the identity was best. The chosen s, and the loss in nats by s, 0 first."""

    starts: Starts | None
    share: float
    losses: dict[float, float]

    def data(self) -> dict[str, Any]:
        """JSON-able."""
        return {"share": self.share, "losses": {str(share): loss for share, loss in self.losses.items()}}


@torch.no_grad()
def stitch(decoder: Grouped, ids: Tensor, *, progress: Progress | None = None) -> Stitched:
    """Maps from windows ids [N, T], of which the last quarter measures them. The decoder's glue must be the identity,
    and holds what was found afterwards.

    Raises TltError for fewer than four windows, and where second moments would be too large to hold.
    """
    if len(ids) < 4:
        raise TltError(f"the calibration text makes {len(ids)} windows; --glue-init fit needs 4, so take a longer one")
    held = len(ids) // 4
    glue, stored = decoder.description["groups"]["glue"], decoder.stored
    found = {}
    for module, moment in _moments(decoder, ids[:-held], progress).items():
        found[module] = _tensors(_difference(moment, decoder.count), moment, glue, decoder.count)
    losses = {0.0: _loss(decoder, ids[-held:])}

    def put(share: float) -> None:
        for module, tensors in found.items():
            for kind, value in tensors.items():
                stored[f"{module}.{kind}.weight"].copy_(value if kind == RIGHT else share * value)

    for share in SHARES:
        put(share)
        losses[share] = _loss(decoder, ids[-held:])
    best = min(losses, key=lambda share: losses[share])
    put(best)
    if best == 0.0:
        return Stitched(None, best, losses)
    starts = {
        module: {kind: value if kind == RIGHT else best * value for kind, value in tensors.items()}
        for module, tensors in found.items()
    }
    return Stitched(starts, best, losses)


def _moments(decoder: Grouped, ids: Tensor, progress: Progress | None) -> dict[str, Tensor]:
    """E[x xT] [K in, K in] of what every site reads, by its module."""
    spots, sites = decoder.description["roles"], decoder.description["groups"]["glue"]["sites"]
    head, sums, seen = next((site for site in sites if "{layer}" not in site), None), dict[str, Tensor](), set[str]()

    def add(module: str, x: Tensor) -> None:
        if x.shape[-1] > _WIDEST:
            raise TltError(
                f"{module} reads {x.shape[-1]} entries of all parts, and --glue-init fit holds their second moments up "
                f"to {_WIDEST}; start from the identity"
            )
        if module not in seen:  # fused linears read the same
            seen.add(module)
            sums[module] = sums.get(module, torch.zeros(())) + outer(x.flatten(0, -2))

    def observe(role: str, layer: int, x: Tensor) -> None:
        if spots[role]["name"] in sites:
            add(spots[role]["name"].format(layer=layer), x)

    def read(x: Tensor) -> None:
        if head is not None:
            add(head, decoder.normalize(x, "final_norm"))

    decoder.observe = observe
    try:
        for first in range(0, len(ids), _BATCH):
            seen.clear()
            decoder(ids[first : first + _BATCH].to(decoder.device), read=read)
            if progress is not None:
                progress(min(first + _BATCH, len(ids)), len(ids))
    finally:
        decoder.observe = None
    return {module: total / ids.numel() for module, total in sums.items()}


def _difference(moment: Tensor, count: int) -> Tensor:
    """G - I at s = 1: block (j, i) is E[x_j x_iT] E[x_i x_iT]^-1 / K, less the identity on the diagonal."""
    width = len(moment) // count
    found = torch.zeros_like(moment)
    for part in range(count):
        own = slice(part * width, (part + 1) * width)
        within = moment[own, own]
        ridge = _DAMPING * float(within.diagonal().mean()) or 1.0
        damped = within + ridge * torch.eye(width, dtype=moment.dtype, device=moment.device)
        found[:, own] = torch.linalg.solve(damped, moment[own]).T / count
        found[own, own] = torch.eye(width, dtype=moment.dtype, device=moment.device) / count
    return found - torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _tensors(difference: Tensor, moment: Tensor, glue: dict[str, Any], count: int) -> dict[str, Tensor]:
    """As it is stored, at s = 1: cut to the rank that loses least of what is read, or to a number per pair of parts."""
    if glue["kind"] == LOWRANK:
        values, vectors = torch.linalg.eigh(moment)
        root = vectors * values.clamp(min=0).sqrt()
        left = torch.linalg.svd(difference @ root, full_matrices=False)[0][:, : glue["rank"]]
        return {LEFT: left, RIGHT: left.T @ difference}
    if glue["kind"] == BLOCKS:
        blocks = difference.reshape(count, len(difference) // count, count, -1)
        return {WHOLE: torch.einsum("jnkn->jk", blocks) / blocks.shape[1]}
    return {WHOLE: difference}


def _loss(decoder: Grouped, ids: Tensor) -> float:
    total = sum(summed_loss(decoder, some) for some in torch.split(ids, _BATCH))
    return total / (ids.shape[0] * (ids.shape[1] - 1))
