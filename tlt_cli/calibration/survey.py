"""What a text shows of each block of a model, for choosing what stays of it: one pass, one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tlt_cli.calibration.blocks import Blocks, tapped
from tlt_cli.calibration.moments import Moments, Progress, Sums, outer, streams
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.step import Step

STREAM_NORMS = ("attention_norm", "ffn_norm", "final_norm")  # what every reader of the stream reads through


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen of one block, or, where `layer` is None, of the norm behind all blocks.

    `moments` of what output and down read; `influence` 1 - E cos(stream in front, behind); `turned` E||q_p||^2
    E||k_p||^2 of every entry of a head, or pair of entries, over all heads; by norm of the stream, u being what it
    makes without its gain, `unit` E[u uT] [H, H] and `absolute` E|u| [H].
    """

    layer: int | None
    moments: Moments
    influence: float
    turned: Tensor
    unit: Mapping[str, Tensor]
    absolute: Mapping[str, Tensor]


def look(blocks: Blocks, ids: Tensor, *, stream: bool, progress: Progress | None = None) -> Iterator[Look]:
    """Run the model on windows ids [N, T]; with `stream` what its norms see is counted too, and the last of them comes
    behind all blocks."""
    seen, before = _Seen(blocks.decoder, stream), torch.zeros(())
    taps = (
        tapped(blocks.decoder, seen.linear), normed(blocks.decoder, seen.norm), turned(blocks.decoder, seen.turn),
    )  # fmt: skip
    with taps[0], taps[1], taps[2]:
        for layer, after in streams(blocks, ids, progress=progress):
            if layer:
                influence = 1 - float(functional.cosine_similarity(before, after, dim=-1).double().mean())
                yield seen.look(layer - 1, ids.numel(), influence)
            before = after
        if stream:
            with torch.no_grad():
                for some in torch.split(before, 16):
                    blocks.decoder.normalize(some, "final_norm")
            yield seen.look(None, ids.numel(), 0.0)
    blocks.release()


class _Seen:
    """Sums over tokens of what the linears, norms and rotations of one block saw."""

    def __init__(self, decoder: Decoder, stream: bool) -> None:
        data = decoder.description
        self._layer_norm, self._epsilon = data["norm"] == "layer", data["epsilon"]
        self._halves, self._stream = 2 if data["ropes"] else 1, stream
        self._empty()

    def _empty(self) -> None:
        self._sums = Sums()
        self._unit: dict[str, Tensor] = {}
        self._absolute: dict[str, Tensor] = {}
        self._strength: dict[str, Tensor] = {}

    def linear(self, role: str, layer: int, x: Tensor, y: Tensor) -> None:
        """Count what a matrix reads that writes the stream: by these neurons and heads are chosen."""
        if role in ("output", "down"):
            self._sums.tap(role, layer, x, y)

    def norm(self, role: str, layer: int, x: Tensor) -> None:
        """Count what a norm of the stream reads."""
        if not self._stream or role not in STREAM_NORMS:
            return
        flat = unit(x, layer_norm=self._layer_norm, epsilon=self._epsilon).flatten(0, -2)
        for sums, value in ((self._unit, outer(flat)), (self._absolute, flat.abs().sum(0).double())):
            sums[role] = sums[role] + value if role in sums else value

    def turn(self, query: Tensor, key: Tensor, layer: int) -> None:
        """Count queries and keys [B, heads, T, D]."""
        for name, x in (("query", query), ("key", key)):
            strength = x.double().square().sum((0, 1, 2)).reshape(self._halves, -1).sum(0)
            self._strength[name] = strength + self._strength.get(name, torch.zeros(()))

    def look(self, layer: int | None, tokens: int, influence: float) -> Look:
        """What it all comes to; the sums are gone then."""
        both = [self._strength.get(name, torch.zeros(())) for name in ("query", "key")]
        unit, absolute = (
            {role: value / tokens for role, value in sums.items()} for sums in (self._unit, self._absolute)
        )
        found = Look(layer, self._sums.means(tokens), influence, both[0] * both[1], unit, absolute)
        self._empty()
        return found


def unit(x: Tensor, *, layer_norm: bool, epsilon: float) -> Tensor:
    """x [..., n] as norms see it, without gain and bias: [..., n]."""
    x = x - x.mean(-1, keepdim=True) if layer_norm else x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


@contextmanager
def normed(decoder: Decoder, tap: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """While inside, `tap(role, layer, x)` sees what every norm reads."""
    plain = decoder.normalize

    def normalize(x: Tensor, role: str, layer: int = 0) -> Tensor:
        tap(role, layer, x)
        return plain(x, role, layer)

    decoder.normalize = normalize  # type: ignore[method-assign]
    try:
        yield
    finally:
        del decoder.normalize


@contextmanager
def turned(decoder: Decoder, tap: Callable[[Tensor, Tensor, int], None]) -> Iterator[None]:
    """While inside, `tap(query, key, layer)` sees queries and keys [B, heads, T, D] where positions turn them."""
    plain = decoder.turn

    def turn(query: Tensor, key: Tensor, layer: int, step: Step) -> tuple[Tensor, Tensor]:
        tap(query, key, layer)
        return plain(query, key, layer, step)

    decoder.turn = turn  # type: ignore[method-assign]
    try:
        yield
    finally:
        del decoder.turn
