"""Glue that starts as what a text shows: each part's activations as all parts predict them, by least squares.

At a site M_ij = A_i^+ A_j maps what part i reads there to what part j reads (model stitching, arXiv:2106.07682). Part j
then reads (1 - s) x_j + s mean_i x_i M_ij, so s = 0 is the ensemble. Which s is best is measured on windows that the
maps were not fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlt_cli.calibration.moments import SAME_INPUT, outer
from tlt_cli.errors import TltError
from tlt_cli.families.glue import BLOCKS, LEFT, LOWRANK, RIGHT, WHOLE
from tlt_cli.model.grouped import Grouped
from tlt_cli.model.perplexity import perplexity
from tlt_cli.surgery.glue import Starts

SHARES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # the values of s that are tried
_DAMPING = 1e-4  # of the mean square, for directions that the text hardly shows
_MOST_BYTES = 1 << 33  # of second moments, all of which are held
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
    found = [
        (modules, _tensors(_difference(moment, decoder.count), moment, glue, decoder.count))
        for modules, moment in _moments(decoder, ids[:-held], progress)
    ]

    def put(share: float) -> Starts:
        starts = {}
        for modules, tensors in found:
            scaled = {kind: value if kind == RIGHT else share * value for kind, value in tensors.items()}
            for module in modules:
                starts[module] = scaled
                for kind, value in scaled.items():
                    stored[f"{module}.{kind}.weight"].copy_(value)
        return starts

    losses = {}
    for share in (0.0, *SHARES):
        put(share)
        losses[share] = float(perplexity(decoder, ids[-held:].flatten(), ids.shape[1], _BATCH)["nll"])
    best = min(losses, key=lambda share: losses[share])
    starts = put(best)
    return Stitched(None if best == 0.0 else starts, best, losses)


def _moments(decoder: Grouped, ids: Tensor, progress: Progress | None) -> Iterator[tuple[list[str], Tensor]]:
    """(modules, E[x xT] [K in, K in] of what they read), once for sites that read the same; their glue is the identity.

    Raises TltError where all together would be too large to hold.
    """
    spots, sites = decoder.description["roles"], decoder.description["groups"]["glue"]["sites"]
    head = next((site for site in sites if "{layer}" not in site), None)
    readers = {(0, "head"): [head]} if head is not None else {}
    for layer in range(decoder.description["layers"]):
        for role, first in SAME_INPUT.items():
            if role in spots and spots[role]["name"] in sites:
                module = spots[role]["name"].format(layer=layer)
                together = readers.setdefault((layer, first), [])
                together += [module] if module not in together else []  # fused linears are one
    widths = {spot: decoder.sizes(spot[0])[spot[1]][1] for spot in readers}
    needed = sum(8 * width**2 for width in widths.values())
    if needed > _MOST_BYTES:
        raise TltError(
            f"--glue-init fit holds second moments of what all parts read, {needed / 2**30:.3g} GiB of them, and "
            f"{_MOST_BYTES / 2**30:g} are allowed; start from the identity"
        )
    sums = {
        spot: torch.zeros(width, width, dtype=torch.float64, device=decoder.device) for spot, width in widths.items()
    }

    def observe(role: str, layer: int, x: Tensor) -> None:
        if (layer, role) in sums:
            sums[layer, role] += outer(x.flatten(0, -2))

    decoder.observe = observe
    try:
        for start in range(0, len(ids), _BATCH):
            decoder(
                ids[start : start + _BATCH].to(decoder.device),
                read=lambda x: observe("head", 0, decoder.normalize(x, "final_norm")),
            )
            if progress is not None:
                progress(min(start + _BATCH, len(ids)), len(ids))
    finally:
        decoder.observe = None
    for spot, modules in readers.items():
        yield modules, sums.pop(spot) / ids.numel()


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
