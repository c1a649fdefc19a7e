"""Folding low-rank factors: every product b @ a becomes one plain matrix again, in the family's own storage.

Layers with a narrower feed-forward get neurons of zeros, which add nothing; where all layers are narrower the model is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlt_cli.axes import shape
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, Place
from tlt_cli.families.factors import LEFT, RIGHT, ROWS, SCALE, LowRank, Slot, dense_config, find_slot, slot_shape
from tlt_cli.families.place import roles_of
from tlt_cli.families.sizes import edit_config
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.quantize import read_factor

_BLOCK = 1 << 22  # entries that are multiplied out at a time


def fold(fitted: Fit, dtypes: Mapping[str, str]) -> Plan:
    """The Plan of the plain checkpoint. `dtypes` are the stored dtypes by tensor name.

    Products are computed in float64 and rounded once. Raises TltError where there is nothing to fold.
    """
    lowrank, table = fitted.lowrank, fitted.family
    if lowrank is None:
        raise TltError("nothing to fold: this checkpoint holds no low-rank factors")
    config, sizes = _plain(fitted, lowrank)
    planned: list[PlannedTensor] = []
    done = set[str]()
    for name, place in fitted.places.items():
        if place.slot is None:
            planned.append(_padded(name, place, fitted, sizes, dtypes[name]))
            continue
        slot = find_slot(table, place.slot)
        if slot.module in done:
            continue
        done.add(slot.module)
        left = next(one for one in fitted.places.values() if one.slot == place.slot and one.kind in (LEFT, "weight"))
        coded = lowrank.bits is not None and left.kind == LEFT
        dtype = dtypes[f"{place.slot}.{LEFT}.{SCALE}" if coded else left.name]
        planned.append(_multiplied(fitted, lowrank, slot, sizes, left.name, dtype))
    narrow = sorted(lowrank.ffn)
    notes = []
    if narrow and sizes["ffn"] > min(lowrank.ffn.values()):
        notes.append(f"{len(narrow)} layer(s) had fewer neurons: they are filled up to {sizes['ffn']} with zeros")
    return Plan(
        operation="fold",
        tensors=tuple(planned),
        config=config,
        exact=True,
        details={"family": table.name, "folded": len(lowrank.ranks)},
        notes=tuple(notes),
    )


def product(values: Tensors, fitted: Fit, slot: str) -> Tensor:
    """The matrix of a factored slot [out, in], multiplied out in float64 from what `values` hold."""
    assert fitted.lowrank is not None
    part = _part(fitted, fitted.lowrank, find_slot(fitted.family, slot), fitted.sizes)
    a, b = part.factors(values)
    assert a is not None, f"{slot} is not factored"
    return b @ a


def _plain(fitted: Fit, lowrank: LowRank) -> tuple[dict[str, Any], dict[str, int]]:
    """config.json of the dense model, and its sizes."""
    config = dense_config(fitted.config, lowrank.stock)
    widest = max(lowrank.ffn.get(layer, fitted.sizes["ffn"]) for layer in range(fitted.sizes["layer"]))
    sizes = {**fitted.sizes, "ffn": widest}
    try:
        return edit_config(fitted.family, config, sizes), sizes
    except TltError:  # a size that this family's config cannot say
        return config, dict(fitted.sizes)


def _padded(name: str, place: Place, fitted: Fit, sizes: Mapping[str, int], dtype: str) -> PlannedTensor:
    """A tensor that is no factor, with zeros for the neurons that its layer lacks."""
    wanted = shape(place.arrow, sizes)
    if wanted == shape(place.arrow, fitted.sizes_of(place)):
        return PlannedTensor(name, wanted, dtype, name)

    def compute(values: Tensors) -> Iterable[Tensor]:
        stored = values.read(name)
        wide = stored.new_zeros(wanted)
        wide[tuple(slice(size) for size in stored.shape)] = stored
        yield wide

    return PlannedTensor(name, wanted, dtype, name, compute, 8 * math.prod(wanted))


@dataclass(frozen=True)
class _Part:
    """One matrix of a stored tensor: where its values are, its size, and the size that it gets."""

    slot: str
    owner: str
    rank: int | None
    span: tuple[int, int] | None
    size: tuple[int, int]
    wanted: tuple[int, int]
    bits: int | None

    def factors(self, values: Tensors) -> tuple[Tensor | None, Tensor]:
        """(a, b) in float64, b with all its rows; (None, the matrix) where it is dense."""
        if self.rank is None:
            return None, values.read(f"{self.slot}.weight").double()
        a = read_factor(values, self.owner, RIGHT, self.bits)
        b = read_factor(values, self.slot, LEFT, self.bits)
        if self.span is not None:
            rows, (start, stop) = values.read(f"{self.slot}.{ROWS}"), self.span
            others = torch.ones(self.size[0], dtype=torch.bool)
            others[rows] = False
            whole = b.new_zeros(self.size[0], self.rank)
            whole[others] = b
            whole[rows, torch.arange(start, stop)] = 1.0
            b = whole
        return a, b


def _part(fitted: Fit, lowrank: LowRank, slot: Slot, sizes: Mapping[str, int]) -> _Part:
    return _Part(
        slot.name,
        lowrank.shared.get(slot.name, slot.name),
        lowrank.ranks.get(slot.name),
        lowrank.pivoted.get(slot.name),
        slot_shape(fitted.sizes, fitted.family, lowrank, slot),
        slot_shape(sizes, fitted.family, LowRank({}), slot),
        lowrank.bits,
    )


def _multiplied(
    fitted: Fit, lowrank: LowRank, slot: Slot, sizes: Mapping[str, int], source: str, dtype: str
) -> PlannedTensor:
    """The stored tensor that a slot belongs to: all its parts multiplied out, one behind the other."""
    table = fitted.family
    count = len(roles_of(table, slot.pattern))
    names = [slot.name] if slot.part is None else [f"{slot.module}.{part}" for part in range(count)]
    parts = [_part(fitted, lowrank, find_slot(table, name), sizes) for name in names]
    arrow = table.rows[slot.pattern]
    transposed = arrow.sign == "->" and slot.role not in ("embedding", "positions")
    rows, columns = sum(part.wanted[0] for part in parts), parts[0].wanted[1]
    stored = (columns, rows) if transposed else (rows, columns)
    work = 8 * 3 * sum(math.prod(part.size) for part in parts)
    return PlannedTensor(f"{slot.module}.weight", stored, dtype, source, _computed(parts, transposed, dtype), work)


def _computed(parts: list[_Part], transposed: bool, dtype: str) -> Callable[[Tensors], Iterator[Tensor]]:
    kind = torch.float64 if dtype == "F64" else torch.float32

    def compute(values: Tensors) -> Iterator[Tensor]:
        if transposed:  # rows of the file are inputs, and the parts lie side by side
            factors = [part.factors(values) for part in parts]
            inputs = parts[0].wanted[1]
            height = max(1, _BLOCK // sum(part.wanted[0] for part in parts))
            for start in range(0, inputs, height):
                stop = min(start + height, inputs)
                pieces = [
                    _block(part, a, b, slice(0, part.wanted[0]), slice(start, stop))
                    for part, (a, b) in zip(parts, factors, strict=True)
                ]
                yield torch.cat(pieces).T.contiguous().to(kind)
            return
        for part in parts:
            a, b = part.factors(values)
            height = max(1, _BLOCK // max(1, part.wanted[1]))
            for start in range(0, part.wanted[0], height):
                stop = min(start + height, part.wanted[0])
                yield _block(part, a, b, slice(start, stop), slice(0, part.wanted[1])).to(kind)

    return compute


def _block(part: _Part, a: Tensor | None, b: Tensor, outputs: slice, inputs: slice) -> Tensor:
    """Some outputs and inputs of one matrix, with zeros where it gets larger than it is."""
    block = b[outputs, inputs] if a is None else b[outputs] @ a[:, inputs]
    wanted = (outputs.stop - outputs.start, inputs.stop - inputs.start)
    if block.shape == wanted:
        return block
    wide = block.new_zeros(wanted)
    wide[: block.shape[0], : block.shape[1]] = block
    return wide
