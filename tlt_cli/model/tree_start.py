"""Where routers start: cutting a text that the tree is to learn in halves, and the halves again.

Routers that start at random cut across the kinds of text there are, and may be hard before they have found them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tlt_cli.model.decoder import Decoder
from tlt_cli.model.tree import Tree
from tlt_cli.model.tree_routes import unit, wide

SHARPNESS = 2.0  # standard deviations of a router's logits over the tokens that reach it


@torch.no_grad()
def aim(tree: Tree, decoder: Decoder, ids: Tensor, documents: Tensor | None = None) -> None:
    """Set every router by a text: at the median of the main direction in which the tokens that reach it differ.

    ids [B, T]; `documents` as the decoder takes them. The same text gives the same routers. What the tree computes does
    not change where its B are still zero; it runs the decoder once, without what the tree adds.
    """
    read: list[Tensor] = []
    before, observe = decoder.adapter, decoder.observe
    decoder.adapter = None
    if tree.shape.route == "token":
        decoder.observe = lambda role, layer, x: read.append(unit(wide(x))) if role == "query" else None
        decoder(ids, documents=documents, read=lambda stream: None)
    else:
        step = decoder.begin(ids.shape[1], documents=documents)
        read.append(tree.mean(decoder.embed(ids, step), step))
    decoder.adapter, decoder.observe = before, observe
    for router, source in enumerate(read):
        reached = {0: source.flatten(0, 1).double().cpu()}
        for node in range(tree.shape.leaves - 1):
            rows = reached.pop(node)
            if len(rows) < 2:  # nothing to cut: the router stays as it was drawn
                reached[2 * node + 1] = reached[2 * node + 2] = rows
                continue
            weight, bias = _cut(rows)
            tree.router[router, node] = weight.to(tree.router)
            tree.bias[router, node] = bias.to(tree.bias)
            right = rows @ weight + bias >= 0
            reached[2 * node + 1], reached[2 * node + 2] = rows[~right], rows[right]


def _cut(rows: Tensor) -> tuple[Tensor, Tensor]:
    """weight [H] and bias of the plane through the median of rows [n, H] across their first principal axis."""
    centre = rows.mean(0)
    _, directions = torch.linalg.eigh((rows - centre).T @ (rows - centre))
    axis = directions[:, -1]
    axis = axis * axis[axis.abs().argmax()].sign()  # either sign is an axis; this one is always the same
    along = rows @ axis
    weight = axis * (SHARPNESS / along.std().clamp(min=1e-6))
    return weight, -(rows @ weight).median()
