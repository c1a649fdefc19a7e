"""One leaf of a tree as a LoRA: what stands on the way from the root down to it, one below the other."""

from __future__ import annotations

import torch

from tlt_cli.model.decoder import Decoder
from tlt_cli.model.lora import Lora, LowRankUpdate
from tlt_cli.model.tree import Tree
from tlt_cli.model.tree_routes import path_nodes


@torch.no_grad()
def leaf_lora(decoder: Decoder, tree: Tree, leaf: int, *, dtype: torch.dtype = torch.float32) -> Lora:
    """The LoRA of rank `shape.active` that computes what the tree does when it is locked to `leaf`, of 0 to L - 1.

    Raises UsageError for a leaf that is not there, and TltError where each layer has routers of its own.
    """
    shape = tree.shape
    shape.check_leaf(leaf)
    nodes = list(path_nodes(leaf, shape.depth)) if shape.form == "path" else [leaf]
    update = LowRankUpdate(rank=shape.active, alpha=shape.scale * shape.active)
    lora = Lora(decoder, {site.module: update for site in tree.sites}, dtype=dtype)
    for site, a, b in tree.matrices():
        lora.set(site.module, a[nodes].flatten(0, 1), b[:, nodes].flatten(1, 2))
    return lora
