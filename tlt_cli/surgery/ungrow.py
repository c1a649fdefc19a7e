"""Undoing a growth: its maps made again from the record that the checkpoint carries, and every tensor taken back.

W = P_out+ W' P_in takes off whatever the growth added where nothing reads, and gives the small model's own weights
back, bit for bit where the maps' scales are powers of two and no noise was rounded into them. A rotation folded gains
into the matrices behind them, so that they come back folded: unit gains, and a head of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tlt_cli.axes import shape
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, Place
from tlt_cli.families.place import named, renamed
from tlt_cli.families.sizes import read_sizes
from tlt_cli.model.decoder import HEAD_NORMS
from tlt_cli.surgery.grow import READS_NORM, Growth, Recipe, grown_places, prepare, widening
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.targets import Sizes, current
from tlt_cli.surgery.widen import Widening, narrow

_TIE = "tie_word_embeddings"
_WHOLE = {"from", "to", "was", "added", "config"}  # what a record must say


@dataclass(frozen=True)
class Record:
    """The last growth that was not undone: what the lineage says of it, and whether weights were trained since."""

    details: Mapping[str, Any]
    trained: bool

    @property
    def before(self) -> dict[str, int]:
        """The sizes that it grew from."""
        return dict(self.details["from"])


def last_growth(lineage: Mapping[str, Any] | None, fit: Fit) -> Record | None:
    """The growth that made this checkpoint, if nothing but training came after it and its record is whole."""
    steps: Sequence[Mapping[str, Any]] = [*((lineage or {}).get("history") or ()), *([lineage] if lineage else [])]
    grown: list[Record] = []
    for step in steps:
        operation, details = step.get("operation"), step.get("details") or {}
        parts = details.get("parts")  # of models side by side, what was done to every one of them
        each = parts if isinstance(parts, list) and parts else [details]
        if operation == "grow" and all(one.keys() >= _WHOLE for one in each):
            grown.append(Record(details, trained=False))
        elif operation == "train" and grown:
            grown[-1] = replace(grown[-1], trained=True)
        elif operation == "slice" and grown and all(one.get("undoes") == "grow" for one in each):
            trained = grown.pop().trained
            grown[-1:] = [replace(one, trained=one.trained or trained) for one in grown[-1:]]
        elif operation != "slice" or not {"block", "weight"} <= details.keys():
            grown.clear()
        if details.get("block"):  # one of them taken out: what was done to it
            grown = [of_it for one in grown if (of_it := _of_part(one, details["block"])) is not None]
    return grown[-1] if grown and dict(grown[-1].details.get("to", {})) == current(fit) else None


def _of_part(record: Record, block: str) -> Record | None:
    """What a growth of several models side by side did to the one that --block named; None where it was of one."""
    parts, number = record.details.get("parts") or (), int(block.partition("/")[0])
    return replace(record, details=parts[number - 1]) if number <= len(parts) else None


def ungrown(fit: Fit, dtypes: Mapping[str, str], record: Record) -> tuple[Fit, Plan]:
    """The small model's fit and Plan. `dtypes` are the stored ones of the grown tensors, by name; they are kept.

    Raises TltError where the record does not fit the checkpoint.
    """
    growth = _rebuilt(fit, record)
    exact = not record.trained and record.details["depth"] == "identity"
    planned = dict[str, PlannedTensor]()
    for name, place, layer in grown_places(growth):
        silent = layer is not None and growth.layers.silent[layer]
        if silent or place.name in planned:  # a copy, which added nothing yet or is not the first of its kind
            continue
        planned[place.name] = _taken_back(fit, growth, name, place, layer, dtypes[name])
    small = replace(growth.fit, places={name: place for name, place in growth.fit.places.items() if name in planned})
    old, new = current(fit), record.before
    notes = ["the growth is undone by its own maps, from the record in the checkpoint"]
    if record.trained:
        notes.append("it was trained since: what training put where nothing read before is lost")
    if growth.rotates:
        notes.append("a rotation folded the gains of norms into the matrices behind them; they come back folded")
    plan = Plan(
        operation="slice",
        tensors=tuple(planned.values()),
        config=small.config,
        exact=exact,
        details={
            "family": fit.family.name, "from": old, "to": new, "undoes": "grow", "method": record.details["method"],
            "trained": record.trained,
            "config": {key: value for key, value in small.config.items() if fit.config.get(key) != value},
        },
        notes=tuple(notes),
    )  # fmt: skip
    return small, plan


def _rebuilt(fit: Fit, record: Record) -> Growth:
    """The growth with its maps, as it was prepared from the small model."""
    details, kept = record.details, {field.name for field in fields(Recipe)}
    recipe = Recipe(**{key: value for key, value in details.items() if key in kept})
    config = {key: value for key, value in fit.config.items() if key not in details["added"]} | dict(details["was"])
    source = details["layers"]
    places: dict[str, Place] = {}
    for place in fit.places.values():
        if place.layer is None:
            places[place.name] = place
        elif place.layer == source.index(source[place.layer]):  # the first of its copies, which is not silent
            name = renamed(place, source[place.layer])
            places[name] = replace(place, name=name, layer=source[place.layer])
    small = replace(fit, config=config, sizes=read_sizes(fit.family, config), places=places, dropped=())
    small = replace(small, tied=bool(fit.family.tied) and bool(small.setting(_TIE)))
    growth = prepare(small, Sizes(**details["to"]), recipe)
    if growth.targets.sizes != fit.sizes or list(growth.layers.source) != source:
        raise TltError("the checkpoint's record of its growth does not give its sizes; slice it by --level or a size")
    if growth.rotates and small.tied:  # folded, the head is another matrix than the embedding
        growth = replace(growth, fit=replace(small, config={**config, _TIE: False}, tied=False))
    return growth


def _taken_back(grown: Fit, growth: Growth, name: str, place: Place, layer: int | None, dtype: str) -> PlannedTensor:
    """One tensor of the small model, from its grown one."""
    new_shape = shape(place.arrow, growth.fit.sizes)
    work = 3 * 8 * max(1, torch.Size(shape(place.arrow, grown.sizes)).numel())
    role = place.roles[0]
    if growth.rotates and role.endswith("_norm") and role not in HEAD_NORMS:
        return _norm_taken_back(grown, growth, place, layer, new_shape, dtype)
    wide = widening(growth, name, place, layer)
    if all(side.map.plain for side in wide.sides):
        return PlannedTensor(place.name, new_shape, dtype, name)
    gain = None
    if growth.rotates and place.kind == "weight":
        gain = named(grown.places, READS_NORM.get(role, ""), "weight", layer)

    def compute(tensors: Tensors) -> Iterator[Tensor]:
        yield narrow(wide, _folded(tensors, wide, name, gain, growth))

    return PlannedTensor(place.name, new_shape, dtype, name, compute, work)


def _folded(tensors: Tensors, wide: Widening, name: str, gain: str | None, growth: Growth) -> Tensor:
    """The grown tensor, with the gain in front of it in its columns where a rotation cannot carry gains back."""
    stored = tensors.read(name)
    stored = stored if stored.dtype == torch.float64 else stored.float()
    if gain is None:
        return stored
    factors = tensors.read(gain).to(stored.dtype) + float(growth.fit.family.rules.get("gain_offset", 0.0))
    return stored * (factors[:, None] if wide.transposed else factors)


def _norm_taken_back(
    grown: Fit, growth: Growth, place: Place, layer: int | None, new_shape: tuple[int, ...], dtype: str
) -> PlannedTensor:
    """A norm behind which gains are folded: its gain is one, its bias what its reader's spare direction tells."""
    if place.kind == "weight":
        value = 1.0 - float(growth.fit.family.rules.get("gain_offset", 0.0))

        def ones(_: Tensors) -> Iterator[Tensor]:
            yield torch.full(new_shape, value)

        return PlannedTensor(place.name, new_shape, dtype, place.name, ones, 8 * new_shape[0])
    name, reader = _reader(growth, place.roles[0], layer)
    wide = widening(growth, name, reader, layer)
    gain, shift = (named(grown.places, place.roles[0], kind, layer) for kind in ("weight", "bias"))
    assert shift is not None

    def solved(tensors: Tensors) -> Iterator[Tensor]:
        """W b = W' b': what the readers made of the bias, as a vector that they read."""
        matrix = tensors.read(name).double()
        folded = _folded(tensors, wide, name, gain, growth).double()
        told = (matrix.T if wide.transposed else matrix) @ tensors.read(shift).double()
        small = narrow(wide, folded)
        small = small.T if wide.transposed else small
        rows = _rows_only(wide, told[:, None])
        yield torch.linalg.lstsq(small, rows).solution[:, 0]

    return PlannedTensor(place.name, new_shape, dtype, place.name, solved, 8 * 4 * wide.work)


def _rows_only(wide: Widening, value: Tensor) -> Tensor:
    """What a matrix [new rows, 1] writes, over the old rows."""
    side = wide.sides[1 if wide.transposed else 0]
    return narrow(replace(wide, sides=(side,)), value[:, 0])[:, None]


def _reader(growth: Growth, norm: str, layer: int | None) -> tuple[str, Place]:
    """A matrix that reads a norm: its grown name and its place."""
    for name, place, at in grown_places(growth):
        if at == layer and place.kind == "weight" and READS_NORM.get(place.roles[0]) == norm:
            return name, place
    raise TltError(f"no matrix reads {norm}, so its bias cannot come back from a rotation")
