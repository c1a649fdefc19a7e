"""A model run one block at a time on calibration windows, so that memory holds one block and the streams between them.

Shapes: N windows of T tokens; the residual stream H wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tlt_cli.checkpoint.planned import Tensors
from tlt_cli.errors import TltError
from tlt_cli.families import Fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.describe import describe
from tlt_cli.model.perplexity import windows

Tap = Callable[[str, int, Tensor, Tensor], None]


class Blocks:
    """A decoder whose tensors are read when first used and kept until `release`; `replaced` ones come from there.
    With `keeps=False` each is read whenever it is used, for running all blocks in a row.

    `replaced` maps stored tensor names to functions that give the tensor to use instead: a product of factors, say.
    """

    def __init__(self, values: Tensors, fitted: Fit, *, dtype: torch.dtype = torch.float32, keeps: bool = True) -> None:
        self._values, self._keeps = values, keeps
        self._held: dict[str, Tensor] = {}
        self.replaced: dict[str, Callable[[], Tensor]] = {}
        self.decoder = Decoder.stream(describe(fitted), self._fetch, self._rows, dtype=dtype)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        layers: int = self.decoder.description["layers"]
        return layers

    def release(self) -> None:
        """Drop what was read."""
        self._held.clear()

    def original(self, name: str) -> Tensor:
        """A stored tensor, whatever it is replaced with."""
        if name in self._held:
            return self._held[name]
        value = self._values.read(name).to(self.decoder._like)
        if self._keeps:
            self._held[name] = value
        return value

    def embed(self, ids: Tensor) -> Tensor:
        """ids [N, T] -> the stream in front of the first block [N, T, H]."""
        step = self.decoder.begin(ids.shape[1])
        with torch.no_grad():
            found = torch.cat([self.decoder.embed(some, step) for some in torch.split(ids, 16)])
        self.release()
        return found

    def run(self, layer: int, stream: Tensor) -> Tensor:
        """One block on some windows of the stream."""
        return self.decoder.block(stream, layer, self.decoder.begin(stream.shape[1]))

    def _fetch(self, name: str) -> Tensor:
        return self.replaced[name]() if name in self.replaced else self.original(name)

    def _rows(self, name: str, ids: Tensor) -> Tensor:
        return self._fetch(name)[ids]


@contextmanager
def tapped(decoder: Decoder, tap: Tap) -> Iterator[None]:
    """While inside, `tap(role, layer, input, output)` sees every linear of a block."""
    plain = decoder.linear

    def linear(x: Tensor, role: str, layer: int, *more: Any) -> Tensor:
        y = plain(x, role, layer, *more)
        tap(role, layer, x, y)
        return y

    decoder.linear = linear  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del decoder.linear


def calibration_windows(ids: Tensor, context: int, most: int | None = None) -> Tensor:
    """ids [N] -> windows [n, context], at most `most` of them, evenly spaced over the text."""
    found = windows(ids, context)
    if most is None or len(found) <= most:
        return found
    return found[torch.linspace(0, len(found) - 1, most).round().long()]


def check_finite(value: Tensor, layer: int) -> None:
    """TltError naming the block whose output is not finite: silently skipped batches are how calibrations go wrong."""
    if not bool(torch.isfinite(value).all()):
        raise TltError(
            f"calibration: block {layer} gives values that are not finite; are its weights broken, or too large for "
            "the dtype it runs in?"
        )
