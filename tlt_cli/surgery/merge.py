"""Merging models side by side: the direct sum of all axes, as a Plan.

Every arrow becomes block-diagonal, every norm sees the entries of one model, and the logits are the weighted mean of
all: the product of the models' distributions, renormalized (reference: slice and merge, section 3.2). Only the blocks
are stored, as slices [K, ...] of the family's own tensors. The weights stand in config.json and not in the head, so
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
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, Place, fit
from tlt_cli.families.factors import refuse_factored, stock_of
from tlt_cli.families.groups import KEY, Groups, Part, check_weights, differences, refuse_joint
from tlt_cli.families.sizes import edit_config
from tlt_cli.model.describe import OF_ONE_PART, describe
from tlt_cli.model.modeling import shipped
from tlt_cli.surgery.plan import Plan

# Sizes, and what is said elsewhere: of these models may differ, and of OF_ONE_PART.
_FREE = (*OF_ONE_PART, "ffn", "roles", "groups", "lowrank", "window", "rotary")
_VOCAB = "vocab"
_WHAT_WORKS = {
    "vocab": "merge models of one tokenizer",
    "tied": "untie the one that is tied: save it with tie_word_embeddings=false and a head of its own",
}


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint that is merged: its fit, its stored dtypes by tensor, what it is called, its digest.

    Its tensors are read under their names behind the number of the checkpoint (`checkpoint.together`). `tokens` are
    rows of its own for each id of the merged model [V], -1 where it has none: the mean of its rows stands there. None
    where its ids are those of the merged model.
    """

    fit: Fit
    dtypes: Mapping[str, str]
    name: str
    sha256: str
    tokens: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Model:
    """One of the models side by side: where it comes from, and which slice it is there if there are several."""

    number: int
    source: Source
    slice: int | None
    fit: Fit
    weight: float
    name: str
    sha256: str

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return self.name if self.slice is None else f"part {self.slice + 1} of {self.source.name}"


def models(sources: Sequence[Source], weights: Sequence[float]) -> list[Model]:
    """All models of all sources in order: of one that is merged already each of its parts, its weights multiplied."""
    found = []
    for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        groups = source.fit.groups
        refuse_joint(groups, f"merging {source.name}")
        for at, fitted in enumerate(source.fit.parts):
            own = _speaking(fitted, source.tokens)
            if groups is None:
                found.append(Model(number, source, None, own, weight, source.name, source.sha256))
            else:
                part = groups.parts[at]
                found.append(Model(number, source, at, own, weight * part.weight, part.name, part.sha256))
    return found


def counted(sources: Sequence[Source], weights: Sequence[float] | None) -> list[Model]:
    """`models`, checked: that they can be merged at all, and the weights."""
    if len(sources) < 2:
        raise TltError(f"{len(sources)} checkpoint given; merging takes two or more")
    shares = [1 / len(sources)] * len(sources) if weights is None else list(weights)
    check_weights(shares, len(sources))
    found = models(sources, shares)
    for model in found:
        _check_alone(model)
    for model in found[1:]:
        _check_pair(found[0], model)
    return found


def _speaking(fitted: Fit, tokens: Sequence[int] | None) -> Fit:
    """The fit with a vocabulary of another size."""
    if tokens is None:
        return fitted
    sizes = {**fitted.sizes, _VOCAB: len(tokens)}
    return replace(fitted, sizes=sizes, config=edit_config(fitted.family, fitted.config, sizes))


def merge(sources: Sequence[Source], weights: Sequence[float] | None = None) -> Plan:
    """The Plan of the merged checkpoint, for values that `checkpoint.together` reads.

    `weights` are each source's share of the logits, 1/K where none are given. Raises TltError naming the first thing
    that two models do not have in common, UsageError for weights that are not those of a mean.
    """
    found = counted(sources, weights)
    base = max(found, key=lambda model: (model.fit.sizes["layer"], -found.index(model)))  # config lists every layer
    sizes = {axis: max(model.fit.sizes[axis] for model in found) for axis in base.fit.sizes}
    kinds = [places_of(model.fit) for model in found]
    planned = [
        _side_by_side(place, base, found, [places.get(place_key(place)) for places in kinds], sizes)
        for place in base.fit.places.values()
    ]
    config = {**base.fit.config, KEY: _groups(found, base, sizes).data()}
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


def _groups(found: Sequence[Model], base: Model, sizes: Mapping[str, int]) -> Groups:
    config = base.fit.config
    parts = [Part(model.name, model.sha256, model.weight, *differences(config, model.fit.config)) for model in found]
    return Groups(tuple(parts), None if sizes == base.fit.sizes else sizes, stock_of(config))


# --- what models must have in common ---------------------------------------------------------------------------


def _check_alone(model: Model) -> None:
    refuse_factored(model.fit.lowrank, f"merging {model.label}")
    bare = [place.name for place in model.fit.places.values() if not place.roles]
    if bare or not model.fit.family.roles:
        raise TltError(
            f"{model.label}: the {model.fit.family.name} table does not say what {bare[0] if bare else 'its tensors'} "
            "does in the model; merge needs it: name it in [wiring]"
        )


def _check_pair(first: Model, other: Model) -> None:
    """TltError naming the first thing in which two models differ and may not."""
    names = [model.fit.family.name for model in (first, other)]
    if first.fit.family != other.fit.family:
        raise TltError(
            f"{first.label} is a {names[0]} and {other.label} a {names[1]}: models of one family are merged; for "
            "others take the mean of what they say, outside of a file"
        )
    one, two = describe(first.fit), describe(other.fit)
    for key, value in one.items():
        if key not in _FREE and value != two[key]:
            works = _WHAT_WORKS.get(key, "such models cannot lie side by side; merge those that agree in it")
            raise TltError(f"{first.label} has {key}={value} and {other.label} {key}={two[key]}: {works}")
    for key in ("window", "rotary"):
        for layer, (value, own) in enumerate(zip(one[key], two[key], strict=False)):
            if value != own:
                raise TltError(
                    f"layer {layer} of {first.label} has {key}={value} and of {other.label} {key}={own}: one layer "
                    "looks back alike in all models that lie side by side"
                )
    missing = sorted(one["roles"].keys() ^ two["roles"].keys())
    for role, spot in one["roles"].items():
        if not missing and spot["bias"] != two["roles"][role]["bias"]:
            has, lacks = (first, other) if spot["bias"] else (other, first)
            raise TltError(
                f"{has.label} has a bias at {role} and {lacks.label} has none; give {lacks.label} one of zeros and set "
                "the switch in its config.json"
            )
    if missing:
        raise TltError(f"only one of {first.label} and {other.label} has a {missing[0]}; merge models that agree in it")


def _notes(found: Sequence[Model], sizes: Mapping[str, int], planned: Sequence[PlannedTensor]) -> Iterator[str]:
    for model in found:
        smaller = [f"{axis} {size} of {sizes[axis]}" for axis, size in model.fit.sizes.items() if size < sizes[axis]]
        if smaller:
            yield f"{model.label} is filled up with zeros, which nothing reads: {', '.join(smaller)}"
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


def _side_by_side(
    place: Place, base: Model, found: Sequence[Model], places: Sequence[Place | None], sizes: Mapping[str, int]
) -> PlannedTensor:
    """The slices of all models, smaller ones filled up with zeros, in the file that the base's is in."""
    whole = shape(place.arrow, sizes)
    slices = [None if own is None else Slice(model, own) for model, own in zip(found, places, strict=True)]
    stored = [one for one in slices if one is not None]
    dtype = widest({one.dtype for one in stored})
    copies = [one.rows for one in stored if one.shape == whole and not one.translated]

    def compute(values: Tensors) -> Iterator[Tensor]:
        for one in slices:
            block = None if one is None else one.read(values)
            kind = torch.float64 if dtype == "F64" else torch.float32
            block = torch.zeros(whole, dtype=kind) if block is None else block.to(kind)
            yield padded(block, place.arrow, {} if one is None else one.model.fit.sizes, sizes)[None]

    return PlannedTensor(
        place.name, (len(found), *whole), dtype, numbered(base.number, place.name), compute, 16 * math.prod(whole),
        copies=tuple(copies) if len(copies) == len(found) else (),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Slice:
    """One model's tensor where it is stored."""

    model: Model
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored, with the zeros that fill it up there."""
        return shape(self.place.arrow, self.model.source.fit.sizes)

    @property
    def dtype(self) -> str:
        """As it is stored."""
        return self.model.source.dtypes[self.place.name]

    @property
    def rows(self) -> Rows:
        """Where it lies among the tensors of all checkpoints."""
        name, at = numbered(self.model.number, self.place.name), self.model.slice
        return Rows(name, 0, self.shape[0]) if at is None else Rows(name, at, at + 1)

    def read(self, values: Tensors) -> Tensor:
        """The model's own tensor, without what fills it up."""
        stored = values.read(self.rows.source) if self.model.slice is None else slice_of(values, self.rows)
        whole = self.model.source.fit.sizes
        own = cut(stored, self.place.arrow, whole, {**self.model.fit.sizes, _VOCAB: whole[_VOCAB]})
        return own if not self.translated else translated(own, self.model.source.tokens or ())

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
        return self.model.source.tokens is not None and _VOCAB in self.place.arrow.axes


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
