"""Prefixes of the stream: which lengths, and the logits that the first entries of it alone make.

The rows that logits are made with are the head's, which where both are tied are the embedding's too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tlt_cli.errors import TltError, UsageError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.nested import NESTED, PREFIXES
from tlt_cli.training.world import whole

_SHARES = (8, 4, 2)
_SHORTEST = 2  # entries that have a direction
_SHORTEST_HALF = 8


def usual_prefixes(width: int) -> tuple[int, ...]:
    """An eighth, a quarter and a half of the width, as far as they hold two entries.

    >>> usual_prefixes(64)
    (8, 16, 32)
    """
    return tuple(sorted({width // share for share in _SHARES if width // share >= _SHORTEST}))


def parsed_prefixes(text: str) -> tuple[int, ...]:
    """--prefixes, ascending. Raises UsageError for what is no list of lengths.

    >>> parsed_prefixes("32,8")
    (8, 32)
    """
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise UsageError(f"--prefixes {text}: expected whole numbers between commas, such as 8,16,32")
    found = sorted(int(part) for part in parts)
    if found[0] < _SHORTEST or len(set(found)) < len(found):
        raise UsageError(f"--prefixes {text}: expected lengths of at least {_SHORTEST}, each once")
    return tuple(found)


def stated_prefixes(config: Mapping[str, Any], width: int) -> tuple[int, ...]:
    """The lengths below the width that config.json says a model was trained with, as prefixes or as nested sizes."""
    listed, nested = config.get(PREFIXES), config.get(NESTED)
    if not isinstance(listed, list):
        levels = nested.get("levels") if isinstance(nested, dict) else None
        listed = [level.get("dim") for level in levels if isinstance(level, dict)] if isinstance(levels, list) else []
    return tuple(sorted({size for size in listed if type(size) is int and _SHORTEST <= size < width}))


def shown_prefixes(config: Mapping[str, Any], width: int) -> tuple[int, ...]:
    """The lengths that config.json states, or halves of the width down to 8; the width itself comes last."""
    halves = [width >> halvings for halvings in range(width.bit_length(), 0, -1)]
    return (*(stated_prefixes(config, width) or (size for size in halves if size >= _SHORTEST_HALF)), width)


def head_role(decoder: Decoder) -> str:
    """The role whose rows logits are made with. Raises TltError where these are stored as factors."""
    role = "embedding" if decoder.description["tied"] else "head"
    name = decoder.description["roles"][role]["name"]
    if f"{name}.weight" not in decoder.stored:
        raise TltError(f"{name} is stored as factors, which have no prefixes to train; fold them first: `tlt fold`")
    return role


def head_rows(decoder: Decoder) -> Tensor:
    """The rows that logits are made with, [V, H], put together where they are split: for every rank to call."""
    spot = decoder.description["roles"][head_role(decoder)]
    rows = whole(decoder.weight(f"{spot['name']}.weight").detach())
    return rows.T if spot["transposed"] else rows


def _first_entries(decoder: Decoder, prefix: int) -> Tensor:
    spot = decoder.description["roles"][head_role(decoder)]
    weight = decoder.weight(f"{spot['name']}.weight")
    return weight[:prefix].T if spot["transposed"] else weight[:, :prefix]


def prefix_logits(decoder: Decoder, x: Tensor, prefix: int) -> Tensor:
    """What the head makes of the first entries of the normalized stream x [..., H] alone -> [..., V].

    The nested head of Matryoshka representations that ties its matrices, W_m = W[:, :m] (MRL-E, arXiv:2205.13147).
    """
    spot = decoder.description["roles"][head_role(decoder)]
    bias = decoder.weight(f"{spot['name']}.bias") if spot["bias"] else None
    logits = functional.linear(x[..., :prefix], _first_entries(decoder, prefix), bias)
    cap = decoder.description["final_softcap"]
    return logits if cap is None else torch.tanh(logits / cap) * cap


def prefix_cosines(decoder: Decoder, x: Tensor, prefix: int) -> Tensor:
    """sqrt(m) times the cosine between the first m entries of x [..., H] and those of every row -> [..., V].

    Either is put on the sphere of its own m entries: lengths, and what stands behind the prefix, do not matter.
    """
    unit = functional.normalize(x[..., :prefix], dim=-1)
    rows = functional.normalize(_first_entries(decoder, prefix), dim=-1)
    return functional.linear(unit, rows) * math.sqrt(prefix)
