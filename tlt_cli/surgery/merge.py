"""Merging models side by side: the direct sum of all axes, as a Plan.

Every arrow becomes block-diagonal, every norm sees the entries of one model, and the logits are the weighted mean of
all: the product of the models' distributions, renormalized (reference: slice and merge, section 3.2). Only the blocks
are stored, as slices [K, ...] of the family's own tensors, or of the factors that models have in the place of some
(`families.stacked`). The weights stand in config.json and not in the head, so
that all slices are copies of what they come from, whatever the weights are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tlt_cli.axes import Arrow, shape, split
from tlt_cli.checkpoint.planned import PlannedTensor, Rows, Tensors
from tlt_cli.checkpoint.together import numbered
from tlt_cli.families import Fit, Place, fit
from tlt_cli.families.factors import LEFT, find_slot, stock_of
from tlt_cli.families.groups import KEY, Groups, Part, differences
from tlt_cli.families.stacked import REST, renamed
from tlt_cli.model.describe import describe
from tlt_cli.model.modeling import shipped
from tlt_cli.surgery.mergeable import VOCAB, Model, Source, counted
from tlt_cli.surgery.plan import Plan

__all__ = ["COMPUTED", "Slice", "Source", "counted", "cut", "merge", "side_by_side", "slice_of", "widest"]

COMPUTED = {"F64": torch.float64, "I8": torch.int8, "I64": torch.int64}  # what blocks are computed in; else float32


def merge(sources: Sequence[Source], weights: Sequence[float] | None = None) -> Plan:
    """The Plan of the merged checkpoint, for values that `checkpoint.together` reads.

    `weights` are each source's share of the logits, 1/K where none are given. Raises TltError naming the first thing
    that two models do not have in common, UsageError for weights that are not those of a mean.
    """
    return side_by_side(counted(sources, weights))


def side_by_side(found: Sequence[Model]) -> Plan:
    """As `merge`, of models that are known to go together."""
    base = max(found, key=lambda model: (model.fit.sizes["layer"], -found.index(model)))  # config lists every layer
    sizes = {axis: max(model.fit.sizes[axis] for model in found) for axis in base.fit.sizes}
    called = [_called(model.fit, base.fit) for model in found]
    parts = []
    for model, own in zip(found, called, strict=True):
        slots = {place.slot or "": new.slot or "" for new, place in own.values()}
        lowrank = None if model.fit.lowrank is None else renamed(model.fit.lowrank, slots)
        different = differences(base.fit.config, model.fit.config)
        parts.append(Part(model.name, model.sha256, model.weight, *different, lowrank))
    groups = Groups(tuple(parts), None if sizes == base.fit.sizes else sizes, stock_of(base.fit.config))
    config = {**base.fit.config, KEY: groups.data()}
    places: dict[str, Place] = {}
    for own in (called[found.index(base)], *called):
        for name, (new, _) in own.items():
            if name not in places or REST in new.arrow.axes:
                places[name] = new
    whole = replace(base.fit, config=config, sizes=sizes, places=places, dropped=(), lowrank=None, groups=groups)
    first = called[found.index(base)]
    beside = {(role, place.layer): name for name, place in base.fit.places.items() for role in place.roles}
    planned = []
    for name, place in places.items():
        holding = [(found[number], called[number].get(name)) for number in whole.holders[name]]
        source = first[name][1].name if name in first else beside[place.roles[0], place.layer]  # whose file it goes to
        slices = [None if own is None else Slice(model, own[1]) for model, own in holding]
        planned.append(_stack(whole, place, slices, numbered(base.number, source)))
    written = fit({tensor.name: tensor.shape for tensor in planned}, config, family=base.fit.family)
    return Plan(
        operation="merge",
        tensors=tuple(planned),
        config=shipped(config, describe(written)),
        exact=True,
        details={
            "family": base.fit.family.name,
            "models": [{"name": model.name, "weight": model.weight, "sizes": dict(model.fit.sizes)} for model in found],
            "sizes": sizes,
        },
        notes=tuple(_notes(found, sizes, planned)),
    )


def _called(own: Fit, base: Fit) -> dict[str, tuple[Place, Place]]:
    """A model's places by the names that the base gives them: as they are there, and in its own file. Names of files
    have a prefix or none, and a tied matrix has one of two."""
    plain = {place_key(place): name for name, place in base.places.items() if place.slot is None}
    modules = {
        (role, place.layer): name.rpartition(".")[0]
        if place.slot is None
        else find_slot(base.family, place.slot).module
        for name, place in base.places.items()
        if place.kind in ("weight", LEFT)
        for role in place.roles
    }
    found = {}
    for place in own.places.values():
        module = modules[place.roles[0], place.layer]
        slot = None if place.slot is None else module if place.part is None else f"{module}.{place.part}"
        if slot is None:
            name = plain.get(place_key(place), f"{module}.weight")
        else:
            name = slot + place.name.removeprefix(place.slot or "")
        found[name] = replace(place, name=name, slot=slot), place
    return found


def _notes(found: Sequence[Model], sizes: Mapping[str, int], planned: Sequence[PlannedTensor]) -> Iterator[str]:
    for model in found:
        smaller = [f"{axis} {size} of {sizes[axis]}" for axis, size in model.fit.sizes.items() if size < sizes[axis]]
        if smaller:
            yield f"{model.label} is filled up with zeros, which nothing reads: {', '.join(smaller)}"
    numbers = sum(
        math.prod(shape(own.arrow, model.fit.sizes_of(own))) for model in found for own in model.fit.places.values()
    )
    stored = sum(tensor.parameters for tensor in planned)
    if any(model.fit.lowrank is not None for model in found) and stored > numbers:
        yield (
            f"sizes or ranks differ between the models: {stored - numbers:,} of {stored:,} numbers are zeros that fill "
            "up smaller tensors"
        )
    dtypes = sorted({model.source.dtypes[name] for model in found for name in model.fit.places})
    wide = sorted({tensor.dtype for tensor in planned})
    if len(dtypes) > len(wide):
        yield f"models are stored as {' and '.join(dtypes)}: the merged one is {' and '.join(wide)}"
    longest = sorted({int(model.fit.config.get("max_position_embeddings") or 0) for model in found} - {0})
    if len(longest) > 1:
        yield f"models were made for {longest[0]} to {longest[-1]} positions; all together for {longest[0]}"


# --- one tensor ------------------------------------------------------------------------------------------------


def place_key(place: Place) -> tuple[tuple[str, ...], str, int | None]:
    """What a tensor is, whatever a file calls it: names have a prefix or none, a tied matrix one of two names."""
    return place.roles, place.kind, place.layer


def places_of(fitted: Fit) -> dict[tuple[tuple[str, ...], str, int | None], Place]:
    """The tensors of a model by what they are."""
    return {place_key(place): place for place in fitted.places.values()}


def _stack(whole: Fit, place: Place, slices: Sequence[Slice | None], source: str) -> PlannedTensor:
    """The slices of all models that store it so, smaller ones filled up with zeros; zeros alone where it is None, of a
    model that lacks the layer."""
    sizes = whole.sizes_of(place)
    size = shape(place.arrow, sizes)
    stored = [one for one in slices if one is not None]
    dtype = widest({one.dtype for one in stored})
    copies = [one.rows for one in stored if one.shape == size and not one.translated]
    kind = COMPUTED.get(dtype, torch.float32)

    def compute(values: Tensors) -> Iterator[Tensor]:
        for one in slices:
            if one is None:
                yield torch.zeros((1, *size), dtype=kind)
            else:
                own = one.model.fit.sizes_of(one.place)
                yield padded(one.read(values).to(kind), place.arrow, own, sizes)[None]

    return PlannedTensor(
        place.name, (len(slices), *size), dtype, source, compute, 16 * math.prod(size),
        copies=tuple(copies) if len(copies) == len(slices) else (),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Slice:
    """One model's tensor where it is stored."""

    model: Model
    place: Place

    @property
    def arrow(self) -> Arrow:
        """As it is stored."""
        return self.model.source.fit.places[self.place.name].arrow

    @property
    def sizes(self) -> dict[str, int]:
        """The axes' sizes as it is stored, with what fills it up there."""
        source = self.model.source.fit
        return source.sizes_of(source.places[self.place.name])

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored, with the zeros that fill it up there."""
        return shape(self.arrow, self.sizes)

    @property
    def dtype(self) -> str:
        """As it is stored."""
        return self.model.source.dtypes[self.place.name]

    @property
    def rows(self) -> Rows:
        """Where it lies among the tensors of all checkpoints."""
        name, part = numbered(self.model.number, self.place.name), self.model.slice
        if part is None:
            return Rows(name, 0, self.shape[0])
        at = self.model.source.fit.holders[self.place.name].index(part)
        return Rows(name, at, at + 1)

    def read(self, values: Tensors) -> Tensor:
        """The model's own tensor, without what fills it up."""
        stored = values.read(self.rows.source) if self.model.slice is None else slice_of(values, self.rows)
        whole, own = self.sizes, self.model.fit.sizes_of(self.place)
        found = cut(stored, self.arrow, whole, {**own, VOCAB: whole[VOCAB]})
        return found if not self.translated else translated(found, self.model.source.tokens or ())

    def reader(self, values: Tensors) -> Callable[[int, int], Tensor]:
        """What gives rows from..to of what `read` gives: no others are held where the file has the tensor as it is."""
        if self.plain:
            return partial(values.read_rows, self.rows.source)
        whole = self.read(values)
        return lambda start, stop: whole[start:stop]

    @property
    def plain(self) -> bool:
        """Whether it is stored by itself and as it is."""
        return self.model.slice is None and not self.translated

    @property
    def translated(self) -> bool:
        """Whether its rows are another model's tokens."""
        return self.model.source.tokens is not None and VOCAB in self.place.arrow.axes


def slice_of(values: Tensors, rows: Rows) -> Tensor:
    """One slice [...] of a tensor [K, ...]."""
    return values.read_rows(rows.source, rows.start, rows.stop)[0]


def translated(table: Tensor, tokens: Sequence[int]) -> Tensor:
    """Rows of a table [V', ...] in the order of `tokens` [V]; the mean of all its rows where that says -1."""
    wide = table if table.dtype == torch.float64 else table.float()
    mean = wide.mean(0, keepdim=True, dtype=torch.float64).to(wide.dtype)
    return torch.cat([wide, mean])[torch.tensor(tokens)]


def padded(block: Tensor, arrow: Arrow, own: Mapping[str, int], sizes: Mapping[str, int]) -> Tensor:
    """A tensor at larger sizes of its axes: it comes first in each factor of its dims, and zeros fill the rest."""
    whole = shape(arrow, sizes)
    if tuple(block.shape) == whole:
        return block
    wide, narrow = split(arrow, sizes), split(arrow, own)
    out = block.new_zeros(wide)
    out[tuple(slice(size) for size in narrow)] = block.reshape(narrow)
    return out.reshape(whole)


def cut(block: Tensor, arrow: Arrow, sizes: Mapping[str, int], own: Mapping[str, int]) -> Tensor:
    """The inverse of `padded`."""
    narrow = shape(arrow, own)
    if tuple(block.shape) == narrow:
        return block
    factors = block.reshape(split(arrow, sizes))
    return factors[tuple(slice(size) for size in split(arrow, own))].reshape(narrow)


def widest(dtypes: set[str]) -> str:
    """A float dtype that holds all of them without rounding."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "F64" if "F64" in dtypes else "F32"
