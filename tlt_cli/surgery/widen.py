"""One tensor through its maps: `W' = P_out W P_in+ + R (I - P_in P_in+)`, block of rows by block of rows.

R never reaches the function, because what `in` carries lies in the image of P_in; it is what makes the new
coordinates trainable (noise.py draws it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tlt_cli.checkpoint.planned import Tensors
from tlt_cli.surgery.maps import COPY, FREE, MEAN, AxisMap
from tlt_cli.surgery.noise import Spread, add_null_noise, generator_for, spread_of, uniform
from tlt_cli.surgery.spectrum import DenseMap, null_basis, spectral_fill

BLOCK_ELEMENTS = 1 << 20  # of float32: 4 MB, enough work per step for several jobs not to wait for each other
_SAMPLE_ELEMENTS = 1 << 18


@dataclass(frozen=True, eq=False)
class Side:
    """What happens to one stored dim: its map, and whether the tensor reads it (an input) or writes it."""

    map: AxisMap | DenseMap
    reads: bool = False


@dataclass(frozen=True, eq=False)
class Widening:
    """How one tensor of the grown model comes from one tensor of the small one.

    `sides` are in storage order, at most one of them reads. `offset` is added before and taken off after the maps
    (gains stored as 1 + w). `gain` names a norm's gain that is folded into the columns that read it, `shift` its bias,
    whose effect they then read along the spare direction of a dense map. `double` asks for float64.
    """

    name: str
    source: str
    old_shape: tuple[int, ...]
    sides: tuple[Side, ...]
    fill: str = "zero"
    noise: float = 0.0
    seed: int = 0
    offset: float = 0.0
    gain: str | None = None
    gain_offset: float = 0.0
    shift: str | None = None
    double: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The new stored shape."""
        return tuple(side.map.new for side in self.sides)

    @cached_property
    def transposed(self) -> bool:
        """Whether inputs are stored first, so that the work is done on the transpose."""
        return len(self.sides) == 2 and self.sides[0].reads

    @cached_property
    def whole(self) -> bool:
        """Whether the tensor cannot be computed in blocks of rows."""
        dense = any(isinstance(side.map, DenseMap) for side in self.sides)
        return len(self.sides) == 1 or self.transposed or dense or (self.fill == "spectral" and self._has_null)

    @cached_property
    def _has_null(self) -> bool:
        return any(side.reads and len(side.map.null_entries) > 0 for side in self.sides)

    @cached_property
    def noise_size(self) -> float:
        """Deviation of the noise, in deviations of the source: less where there are more inputs."""
        inputs = [side.map for side in self.sides if side.reads]
        return self.noise * math.sqrt(math.prod(mapped.old / mapped.new for mapped in inputs))

    @property
    def work(self) -> int:
        """Peak bytes of memory that computing takes, roughly."""
        size = 8 if self.double else 4
        if self.whole:
            return size * (2 * math.prod(self.old_shape) + 3 * math.prod(self.shape))
        return size * 5 * max(BLOCK_ELEMENTS, self.shape[-1])

    def __call__(self, tensors: Tensors) -> Iterator[Tensor]:
        """Consecutive blocks of the new rows, in float32 or float64."""
        dtype = torch.float64 if self.double else torch.float32
        if len(self.sides) == 1:
            # in float64, for a gain stored as 1 + w must come back from its sum with 1
            yield self._vector(tensors.read(self.source).double())
            return
        rows, columns = self.sides[::-1] if self.transposed else self.sides
        gain = None
        if self.gain is not None:
            gain = tensors.read(self.gain).to(dtype) + self.gain_offset
        mean = self._mean_row(tensors, dtype) if _has_mean(rows) and not self.whole else None
        if self.whole:
            weight = tensors.read(self.source).to(dtype)
            weight = weight.T if self.transposed else weight
            spread = spread_of(weight) if self.noise else Spread(0.0)
            shifted = None if self.shift is None else weight @ tensors.read(self.shift).to(dtype)
            weight = weight if gain is None else weight * gain
            block = self._block(weight, 0, rows, columns, 0, rows.map.new, spread, weight.mean(0))
            if shifted is not None:
                block += self._along_extra(shifted, rows, columns)
            yield (block.T if self.transposed else block).contiguous()
            return
        assert isinstance(rows.map, AxisMap)
        spread = self._sampled_spread(tensors) if self.noise else Spread(0.0)
        step = max(1, BLOCK_ELEMENTS // max(1, columns.map.new))
        for start in range(0, rows.map.new, step):
            stop = min(rows.map.new, start + step)
            sources = rows.map.source[start:stop]
            sources = sources[sources >= 0]
            low, high = (int(sources.min()), int(sources.max()) + 1) if len(sources) else (0, 1)
            weight = tensors.read_rows(self.source, low, high).to(dtype)
            weight = weight if gain is None else weight * gain
            yield self._block(weight, low, rows, columns, start, stop, spread, mean)

    def _vector(self, value: Tensor) -> Tensor:
        mapped = self.sides[0].map
        if isinstance(mapped, DenseMap):
            return mapped.write(value + self.offset) - self.offset
        value = value + self.offset
        return _columns(value[None], self.sides[0], value.mean())[0] - self.offset

    def _block(
        self,
        weight: Tensor,
        low: int,
        rows: Side,
        columns: Side,
        start: int,
        stop: int,
        spread: Spread,
        mean: Tensor | None,
    ) -> Tensor:
        """New rows start to stop, from old rows of which `weight` holds those from `low` on."""
        kind = np.full(stop - start, COPY) if isinstance(rows.map, DenseMap) else rows.map.kind[start:stop]
        out = _rows(weight, rows, low, start, stop, mean)
        out = _columns(out, columns, None)
        generator = generator_for(self.seed, self.name, start)
        if self.fill == "spectral" and columns.reads and self._has_null and self.noise:
            basis = null_basis(columns.map, self.seed).to(out.dtype)
            grown = math.sqrt(rows.map.new / rows.map.old * columns.map.old / columns.map.new)
            out += self.noise * grown * spectral_fill(weight, rows.map.new, basis, generator)
        elif self.fill != "zero" and self.noise and columns.reads:
            add_null_noise(out, columns.map, spread, self.noise_size, generator)
        free = np.flatnonzero(kind == FREE)
        if len(free):
            value = torch.zeros(len(free), out.shape[1], dtype=out.dtype)
            if self.fill != "zero" and self.noise:
                value = uniform(generator, value.shape, spread.whole * self.noise_size).to(out.dtype)
            out[torch.from_numpy(free)] = value
        return out

    def _along_extra(self, shifted: Tensor, rows: Side, columns: Side) -> Tensor:
        """What the readers of a norm added for its bias, [rows], now read from the spare direction [new rows, new]."""
        assert isinstance(columns.map, DenseMap) and columns.map.extra is not None
        column = _rows(shifted[:, None], rows, 0, 0, rows.map.new, shifted.mean()[None])
        return column * columns.map.extra.to(column.dtype)

    def _sampled_spread(self, tensors: Tensors) -> Spread:
        """The source's spread, from evenly spaced rows where it is large."""
        count, width = self.old_shape
        if count * width <= _SAMPLE_ELEMENTS:
            return spread_of(tensors.read(self.source))
        pieces = min(64, count)
        height = max(1, _SAMPLE_ELEMENTS // (pieces * width))
        starts = [piece * (count - height) // max(1, pieces - 1) for piece in range(pieces)]
        return spread_of(torch.cat([tensors.read_rows(self.source, start, start + height) for start in starts]))

    def _mean_row(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        count, width = self.old_shape
        step = max(1, BLOCK_ELEMENTS // width)
        total = torch.zeros(width, dtype=torch.float64)
        for start in range(0, count, step):
            total += tensors.read_rows(self.source, start, min(count, start + step)).double().sum(0)
        return (total / count).to(dtype)


def narrow(work: Widening, grown: Tensor) -> Tensor:
    """The small tensor back from the grown one: P_out+ W' P_in, which takes every null-space term off again."""
    dtype, grown = grown.dtype, grown.double() + work.offset
    for position, side in enumerate(work.sides):
        moved = grown.movedim(position, -1)
        if isinstance(side.map, DenseMap):
            back = side.map.narrow(moved, reads=side.reads)
        else:
            copied = torch.from_numpy(np.flatnonzero(side.map.kind == COPY))
            weights = torch.from_numpy(side.map.write if side.reads else side.map.read).to(moved.dtype)
            source = torch.from_numpy(side.map.source)[copied]
            back = moved.new_zeros(*moved.shape[:-1], side.map.old)
            back.index_add_(-1, source, moved[..., copied] * weights[copied])
        grown = back.movedim(-1, position)
    return (grown - work.offset).to(dtype)


def _has_mean(side: Side) -> bool:
    return isinstance(side.map, AxisMap) and bool((side.map.kind == MEAN).any())


def _rows(weight: Tensor, side: Side, low: int, start: int, stop: int, mean: Tensor | None) -> Tensor:
    """New rows start to stop of a map, from old rows of which `weight` holds those from `low` on; fresh rows are zero,
    or the weighted `mean` where they are written as means."""
    if isinstance(side.map, DenseMap):
        return side.map.write(weight.T).T
    source, kind = side.map.source[start:stop], side.map.kind[start:stop]
    weights = (side.map.read if side.reads else side.map.write)[start:stop]
    scale = np.where(source >= 0, weights, 0.0)
    if np.all(scale == 1) and np.all(np.diff(source) == 1):
        return weight[source[0] - low : source[-1] - low + 1]  # the rows themselves, to be copied by the next step
    out = weight.index_select(0, torch.from_numpy(np.where(source >= 0, source - low, 0)))
    if not np.all(scale == 1):
        out.mul_(torch.from_numpy(scale).to(out.dtype)[:, None])
    if mean is not None and (kind == MEAN).any():
        where = torch.from_numpy(np.flatnonzero(kind == MEAN))
        out[where] = mean * torch.from_numpy(weights[kind == MEAN]).to(out.dtype)[:, None]
    return out


def _columns(base: Tensor, side: Side, mean: Tensor | None) -> Tensor:
    """Map the columns of `base`; fresh columns are zero, or the weighted mean where they are written as means."""
    if isinstance(side.map, DenseMap):
        return side.map.read(base) if side.reads else side.map.write(base)
    mapped = side.map
    if mapped.plain:
        return base.clone()  # what follows adds noise in place
    weights = mapped.read if side.reads else mapped.write
    out = (base.new_empty if mapped.copies.sum() == mapped.new else base.new_zeros)(base.shape[0], mapped.new)
    for run in mapped.runs:
        start, stop = run.start, run.start + run.length
        piece = base[:, run.source : run.source + run.length]
        scale = weights[start:stop]
        if np.all(scale == scale[0]):
            torch.mul(piece, float(scale[0]), out=out[:, start:stop])
        else:
            torch.mul(piece, torch.from_numpy(scale).to(base.dtype), out=out[:, start:stop])
    means = np.flatnonzero(mapped.kind == MEAN)
    if len(means) and not side.reads:
        mean = base.mean(1, keepdim=True) if mean is None else mean
        out[:, torch.from_numpy(means)] = mean * torch.from_numpy(weights[means]).to(base.dtype)
    return out
