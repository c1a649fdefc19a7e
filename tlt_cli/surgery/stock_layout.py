"""Merging models into one dense model of a stock architecture, as a Plan: the direct sum with its zeros written out.

The widths add up, and so do the heads. What a stock model cannot hold is a norm for each of the models: its norms see
the whole stream, so that block k of their output is r_k = rms_k / sqrt(mean_j rms_j^2) times what its model computes
(reference: slice and merge, section 3.2). No constant makes up for a factor that differs by token; gains of a norm
times exp(E log(1 / r_k)) do on average (`calibration.stock_gains`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlt_cli.axes import Arrow, shape, split
from tlt_cli.checkpoint.planned import PlannedTensor, Rows, Tensors
from tlt_cli.checkpoint.together import numbered
from tlt_cli.errors import TltError
from tlt_cli.families import Place
from tlt_cli.families.factors import refuse_factored
from tlt_cli.families.sizes import edit_config
from tlt_cli.model.describe import OF_ONE_PART, describe
from tlt_cli.surgery.merge import Slice, place_key, places_of, widest
from tlt_cli.surgery.mergeable import Model, Source, counted, models
from tlt_cli.surgery.plan import Plan

ADDED = ("hidden", "kv", "ffn")  # the axes that add up
HEAD_NORMS = ("query_norm", "key_norm")
_ROWS = 1 << 22  # entries of a table of embeddings that are held at a time
Gains = Mapping[tuple[str, int], Sequence[float]]  # log of what a norm's gains are multiplied with, by role and layer


def stock_layout(sources: Sequence[Source], weights: Sequence[float] | None = None, gains: Gains | None = None) -> Plan:
    """The Plan of the dense model, for values that `checkpoint.together` reads; approximate.

    Raises TltError naming the first thing that a stock model has once for all of its width and the models have each
    for itself.
    """
    found = counted(sources, weights)
    _check(found)
    first = found[0]
    sizes = {axis: size * (len(found) if axis in ADDED else 1) for axis, size in first.fit.sizes.items()}
    config = edit_config(first.fit.family, first.fit.config, sizes)
    kinds, description = [places_of(model.fit) for model in found], describe(first.fit)
    planned = tuple(
        _dense(place, [Slice(model, own[place_key(place)]) for model, own in zip(found, kinds, strict=True)], sizes,
               _factors(place, found, description, gains or {}))
        for place in first.fit.places.values()
    )  # fmt: skip
    return Plan(
        operation="merge",
        tensors=planned,
        config=config,
        exact=False,
        details={
            "family": first.fit.family.name,
            "layout": "stock",
            "models": [{"name": model.name, "weight": model.weight, "sizes": dict(model.fit.sizes)} for model in found],
            "sizes": sizes,
        },
    )


def head_norms(sources: Sequence[Source]) -> list[list[Rows]]:
    """The gains of norms of heads that must agree, those of all models for each layer and role: a stock model has one
    set for all its heads."""
    found = models(sources, [1.0] * len(sources))
    kinds = [places_of(model.fit) for model in found]
    return [
        [Slice(model, own[key]).rows for model, own in zip(found, kinds, strict=True)]
        for key, place in kinds[0].items()
        if set(place.roles) & set(HEAD_NORMS)
    ]


def check_head_norms(sources: Sequence[Source], values: Tensors) -> None:
    """TltError where the gains of a norm of heads differ."""
    for rows in head_norms(sources):
        each = [values.read_rows(one.source, one.start, one.stop).flatten().float() for one in rows]
        if any(not torch.equal(own, each[0]) for own in each[1:]):
            raise TltError(
                f"{rows[0].source.partition(':')[2]} differs between the models: a stock model has one for all its "
                "heads; --layout grouped keeps each its own"
            )


def _check(found: Sequence[Model]) -> None:
    for model in found:
        refuse_factored(model.fit.lowrank, f"--layout stock, of {model.label},")
    first, one = found[0], describe(found[0].fit)
    if one["norm"] != "rms":
        raise TltError(
            f"the {first.fit.family.name} family has LayerNorm, whose mean over the whole width mixes the models; "
            "--layout stock takes families with RMSNorm"
        )
    if one["final_softcap"] is not None:
        raise TltError(
            f"{first.label} caps its logits at {one['final_softcap']}: a stock model would cap their mean, which is "
            "another function; --layout grouped caps each by itself"
        )
    for model in found[1:]:
        other = describe(model.fit)
        for key in ("ffn", *OF_ONE_PART):
            if one[key] != other[key]:
                raise TltError(
                    f"{first.label} has {key}={one[key]} and {model.label} {key}={other[key]}: a stock model has one "
                    "for all; --layout grouped keeps each its own"
                )


@dataclass(frozen=True)
class _Factors:
    """What a tensor of each model is multiplied with; `offset` is what is added to stored gains before."""

    each: tuple[float, ...]
    offset: float = 0.0

    def times(self, number: int, block: Tensor) -> Tensor:
        factor = self.each[number]
        return block if factor == 1.0 else (block + self.offset) * factor - self.offset


def _factors(place: Place, found: Sequence[Model], description: Mapping[str, Any], gains: Gains) -> _Factors:
    """The head takes the models' shares, or where it is tied the final norm; embeddings are scaled by the width."""
    count, scaled, tied = len(found), description["embedding_scale"] is not None, description["tied"]
    role = place.roles[0]
    factors = [math.exp(gain) for gain in gains.get((role, place.layer or 0), [0.0] * count)]
    if role == "embedding" and scaled:
        factors = [factor / math.sqrt(count) for factor in factors]
    if role == "head" or (role == "final_norm" and tied):
        factors = [factor * model.weight for factor, model in zip(factors, found, strict=True)]
    if role == "final_norm" and tied and scaled:  # the head is the embedding
        factors = [factor * math.sqrt(count) for factor in factors]
    norm = role.endswith("norm")
    return _Factors(tuple(factors), description["gain_offset"] if norm and place.kind == "weight" else 0.0)


def _dense(place: Place, slices: Sequence[Slice], sizes: Mapping[str, int], factors: _Factors) -> PlannedTensor:
    """All models' blocks on the diagonal of the axes that add up."""
    arrow, first = place.arrow, slices[0].model
    own = first.fit.sizes
    dtype = widest({one.dtype for one in slices})
    kind = torch.float64 if dtype == "F64" else torch.float32
    source, whole = numbered(first.number, place.name), shape(arrow, sizes)
    if not arrow.axes & {*ADDED}:  # a norm of heads, the same in all
        return PlannedTensor(place.name, whole, dtype, source, lambda values: [slices[0].read(values).to(kind)])

    def blocks(values: Tensors) -> Iterator[Tensor]:
        for number, one in enumerate(slices):
            block = factors.times(number, one.read(values).to(kind))
            yield beside(block, arrow, own, sizes, number)

    def rows(values: Tensors) -> Iterator[Tensor]:
        readers = [one.reader(values) for one in slices]
        for start in range(0, whole[0], step):
            each = [read(start, min(start + step, whole[0])).to(kind) for read in readers]
            yield torch.cat([factors.times(number, block) for number, block in enumerate(each)], dim=1)

    stacked, step = arrow.dims[0][0] in ADDED, max(1, _ROWS // math.prod(whole[1:]))
    held = math.prod(whole) // (len(slices) if stacked else 1)
    if not stacked and all(one.plain for one in slices):
        held = min(held, step * math.prod(whole[1:]))
    assert stacked or (len(arrow.dims) == 2 and arrow.dims[1] == ("hidden",)), str(arrow)
    return PlannedTensor(place.name, whole, dtype, source, blocks if stacked else rows, 16 * held)


def beside(block: Tensor, arrow: Arrow, own: Mapping[str, int], sizes: Mapping[str, int], number: int) -> Tensor:
    """Rows of model `number` in the dense matrix, whose first dim counts an axis that adds up: its own columns at their
    place in each other such axis, zeros elsewhere."""
    factors = [factor for dim in arrow.dims for factor in dim]
    narrow = split(arrow, own)
    wide = [narrow[0], *split(arrow, sizes)[1:]]
    place = [
        slice(number * size, (number + 1) * size) if at and factor in ADDED else slice(None)
        for at, (factor, size) in enumerate(zip(factors, narrow, strict=True))
    ]
    out = block.new_zeros(wide)
    out[tuple(place)] = block.reshape(narrow)
    return out.reshape(-1, *shape(arrow, sizes)[1:])
