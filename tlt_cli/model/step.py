"""What all layers of one forward pass share: positions and their rotations, masks, and the tokens seen before.

The shapes that the docstrings use are those of `decoder`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Cache:
    """Keys and values of the tokens seen so far, per layer [B, kv heads, S, D]: the next token needs only itself.

    In `notes` an adapter keeps what it must remember of them.
    """

    def __init__(self, layers: int) -> None:
        self.length = 0
        self.notes: dict[str, Tensor] = {}
        self._seen: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append this step's keys and values, [B, kv heads, T, D] each; returns all of them, S = old + T long."""
        seen = self._seen[layer]
        if seen is not None:
            key, value = torch.cat([seen[0], key], dim=2), torch.cat([seen[1], value], dim=2)
        self._seen[layer] = (key, value)
        return key, value


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share: positions, rotations, masks, the cache.

    `present` [B, S] is False where a row is padded and None where none is; `documents` [B, T] numbers the text that
    each token of a packed row belongs to. `positions` are [T], or [B, T] with either.
    """

    start: int
    length: int
    positions: Tensor
    rotations: dict[str, tuple[Tensor, Tensor]]
    cache: Cache | None = None
    present: Tensor | None = None
    documents: Tensor | None = None
    masks: dict[tuple[int | None, bool], Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, device: torch.device, always: bool) -> Tensor | None:
        """[T, S], True where a query may look: backwards, and no further than the window, itself included.

        [B, 1, T, S] where rows are padded or packed: no query looks at padding, but for a padded one at itself, nor
        into another document.
        None where the kernel's own causal rule says the same, unless `always` asks for the mask itself.
        """
        total = self.start + self.length
        window = None if window is None or window >= total else window
        if (window, always) not in self.masks:
            rows_agree = self.present is None and self.documents is None
            plain = window is None and rows_agree and (self.start == 0 or self.length == 1)
            if plain and not always:
                self.masks[window, always] = None
            else:
                query = torch.arange(self.start, total, device=device)[:, None]
                key = torch.arange(total, device=device)[None, :]
                seen = key <= query
                seen = seen if window is None else seen & (key > query - window)
                if self.present is not None:
                    seen = (seen & self.present[:, None, None, :]) | (key == query)
                if self.documents is not None:
                    seen = seen & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
                self.masks[window, always] = seen
        return self.masks[window, always]


def frequencies(rope: dict[str, Any], head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Angle per position of each pair, [D / 2]: theta^(-2i / D) (RoPE, arXiv:2104.09864), scaled as the set says.

    "linear" divides all by a factor (arXiv:2306.15595); "llama3" divides long waves only, with a ramp between.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(device, dtype) / head_dim
    plain: Tensor = 1.0 / (rope["theta"] ** exponent)
    if rope["type"] == "default":
        return plain
    slow: Tensor = plain / rope["factor"]
    if rope["type"] == "linear":
        return slow
    if rope["type"] != "llama3":
        raise ValueError(f"rotary scaling of the type {rope['type']!r} is not known here")
    turns = rope["original_positions"] * plain / (2 * math.pi)  # full turns within the context first trained on
    low, high = rope["low_turns"], rope["high_turns"]
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    mixed: Tensor = plain * kept + slow * (1.0 - kept)
    return mixed


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn entry i against entry i + D/2 by its position's angle.

    x [B, heads, T, D], cosines and sines [T, D/2] or [B, 1, T, D/2].
    """
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
