"""One model back out of several that lie side by side, bit for bit, as a Plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tlt_cli.axes import shape
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import PlannedTensor, Rows, Tensors
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, Place
from tlt_cli.families.factors import KEY as LOWRANK
from tlt_cli.families.groups import refuse_joint
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.describe import describe
from tlt_cli.model.modeling import shipped
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.glue import spread
from tlt_cli.surgery.merge import COMPUTED, cut, slice_of
from tlt_cli.surgery.plan import Plan


def block(fitted: Fit, dtypes: Mapping[str, str], number: int, *, idle: bool = False) -> Plan:
    """The Plan of part `number`, counted from 0, of a merged checkpoint: a model as it was, with its own config.json.

    `dtypes` are the stored dtypes by tensor name. What filled the part up is cut off; its weight was never in its
    tensors. `idle` says that all glue is still the identity. Raises TltError where there is no such part, or where it
    is no model by itself any more. The code that the merged checkpoint ships is not wanted beside the output
    (`model.modeling.MODELING`), unless that holds factors.
    """
    if fitted.groups is None:
        raise TltError("this checkpoint is one model: there is no part to take out; cut it by its sizes instead")
    count = len(fitted.groups.parts)
    if not 0 <= number < count:
        raise TltError(f"part {number + 1} of {count} was asked for; wanted one from 1 to {count}")
    if not idle:
        refuse_joint(fitted.groups, "taking one out")
    own, part = fitted.part(number), fitted.groups.parts[number]
    config = own.config
    if own.lowrank is not None:
        config = shipped({**config, LOWRANK: own.lowrank.data()}, describe(own))
    return Plan(
        operation="slice",
        tensors=tuple(_taken_out(place, fitted, own, number, dtypes[name]) for name, place in own.places.items()),
        config=config,
        exact=True,
        details={
            "family": own.family.name, "block": f"{number + 1}/{count}", "name": part.name, "sha256": part.sha256,
            "weight": part.weight, "sizes": dict(own.sizes),
        },
    )  # fmt: skip


def _taken_out(place: Place, fitted: Fit, own: Fit, number: int, dtype: str) -> PlannedTensor:
    stored, narrow = fitted.places[place.name], shape(place.arrow, own.sizes_of(place))
    whole, rows = shape(stored.arrow, fitted.sizes_of(stored)), slice_rows(fitted, place.name, number)

    def compute(values: Tensors) -> Iterator[Tensor]:
        taken = cut(slice_of(values, rows), stored.arrow, fitted.sizes_of(stored), own.sizes_of(place))
        yield taken.to(COMPUTED.get(dtype, torch.float32)).contiguous()

    return PlannedTensor(
        place.name, narrow, dtype, place.name, compute, 8 * math.prod(whole), copies=(rows,) if whole == narrow else ()
    )


def slice_rows(fitted: Fit, name: str, number: int) -> Rows:
    """Where the slice of part `number` lies in the stack of a tensor."""
    at = fitted.holders[name].index(number)
    return Rows(name, at, at + 1)


@dataclass(frozen=True)
class PartValues:
    """The tensors of part `number` as if they were a checkpoint by themselves, whose fit is `own`: none is held."""

    values: Tensors
    fitted: Fit
    own: Fit
    number: int

    def read(self, name: str) -> Tensor:
        """The whole tensor, without what fills it up."""
        stored, place = self.fitted.places[name], self.own.places[name]
        found = slice_of(self.values, slice_rows(self.fitted, name, self.number))
        return cut(found, stored.arrow, self.fitted.sizes_of(stored), self.own.sizes_of(place))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of it."""
        return self.read(name)[start:stop]


@dataclass(frozen=True)
class PartCheckpoint(PartValues):
    """The same, of a checkpoint of which rows are read by themselves."""

    values: Checkpoint

    def read_vectors(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a matrix; no others are read."""
        stored, place = self.fitted.places[name], self.own.places[name]
        rows, _ = shape(stored.arrow, self.fitted.sizes_of(stored))
        _, width = shape(place.arrow, self.own.sizes_of(place))
        first = slice_rows(self.fitted, name, self.number).start * rows
        return self.values.read_vectors(name, first + start, first + stop)[:, :width]


def alone(
    values: Checkpoint, fitted: Fit, number: int, dtype: torch.dtype, device: torch.device, *, stream: bool = False
) -> Decoder:
    """Part `number` of a merged checkpoint run by itself, without glue; memory holds that part, or with `stream` one
    tensor of it at a time."""
    own = fitted.part(number)
    return load_checkpoint(PartCheckpoint(values, fitted, own, number), own, stream=stream, dtype=dtype, device=device)


def without_glue(fitted: Fit) -> Fit:
    """The same models side by side, as if there were no glue between them."""
    assert fitted.groups is not None
    places = {name: place for name, place in fitted.places.items() if not spread(place)}
    return replace(fitted, places=places, groups=replace(fitted.groups, glue=None))
