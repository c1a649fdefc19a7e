"""A model that does not exist yet, from its config.json: the tensors that its family needs, at start values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tlt_cli.axes import shape
from tlt_cli.families import Fit, fit
from tlt_cli.families.choose import choose
from tlt_cli.families.place import roles_of
from tlt_cli.families.sizes import read_sizes
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.describe import describe


def blank(config: Mapping[str, Any]) -> Fit:
    """The family of config.json fitted to the tensors that it asks for, as if a file held them.

    Raises TltError for an architecture that no table knows and for sizes that the family cannot have.
    """
    table, _ = choose({}, config, None)
    sizes = read_sizes(table, config)

    def setting(key: str) -> Any:
        return config[key] if key in config else table.defaults.get(key)

    off = {role for switch, roles in table.biases.items() if not setting(switch) for role in roles}
    tied = bool(table.tied) and bool(setting("tie_word_embeddings"))
    shapes = {}
    for pattern, arrow in table.rows.items():
        roles = roles_of(table, pattern)
        if not roles or (pattern.endswith(".bias") and off & set(roles)) or (tied and "head" in roles):
            continue
        for layer in range(sizes["layer"]) if "{layer}" in pattern else (0,):
            shapes[pattern.replace("{layer}", str(layer))] = shape(arrow, sizes)
    return fit(shapes, config, family=table)


def new_decoder(fitted: Fit, *, seed: int = 0) -> Decoder:
    """The model of a fit in float32 at start values drawn with `seed`, ready to be trained."""
    decoder = Decoder(describe(fitted))
    decoder.initialize(generator=torch.Generator().manual_seed(seed))
    return decoder
