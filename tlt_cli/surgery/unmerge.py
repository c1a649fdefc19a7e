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
from tlt_cli.families.groups import refuse_joint
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.glue import spread
from tlt_cli.surgery.merge import cut, slice_of
from tlt_cli.surgery.plan import Plan


def block(fitted: Fit, dtypes: Mapping[str, str], number: int, *, idle: bool = False) -> Plan:
    """The Plan of part `number`, counted from 0, of a merged checkpoint: a stock model with its own config.json.

    `dtypes` are the stored dtypes by tensor name. What filled the part up is cut off; its weight was never in its
    tensors. `idle` says that all glue is still the identity. Raises TltError where there is no such part, or where it
    is no model by itself any more. The code that the merged checkpoint ships is not wanted beside the output
    (`model.modeling.MODELING`).
    """
    if fitted.groups is None:
        raise TltError("this checkpoint is one model: there is no part to take out; cut it by its sizes instead")
    count = len(fitted.groups.parts)
    if not 0 <= number < count:
        raise TltError(f"part {number + 1} of {count} was asked for; wanted one from 1 to {count}")
    if not idle:
        refuse_joint(fitted.groups, "taking one out")
    own, part = fitted.part(number), fitted.groups.parts[number]
    return Plan(
        operation="slice",
        tensors=tuple(_taken_out(place, fitted, own, number, dtypes[name]) for name, place in own.places.items()),
        config=own.config,
        exact=True,
        details={
            "family": own.family.name, "block": f"{number + 1}/{count}", "name": part.name, "sha256": part.sha256,
            "weight": part.weight, "sizes": dict(own.sizes),
        },
    )  # fmt: skip


def _taken_out(place: Place, fitted: Fit, own: Fit, number: int, dtype: str) -> PlannedTensor:
    whole, narrow = shape(place.arrow, fitted.sizes), shape(place.arrow, own.sizes)
    rows = Rows(place.name, number, number + 1)

    def compute(values: Tensors) -> Iterator[Tensor]:
        taken = cut(slice_of(values, rows), place.arrow, fitted.sizes, own.sizes)
        yield taken.to(torch.float64 if dtype == "F64" else torch.float32).contiguous()

    return PlannedTensor(
        place.name, narrow, dtype, place.name, compute, 8 * math.prod(whole), copies=(rows,) if whole == narrow else ()
    )


@dataclass(frozen=True)
class PartValues:
    """The tensors of part `number` as if they were a checkpoint by themselves, whose fit is `own`: none is held."""

    values: Checkpoint
    fitted: Fit
    own: Fit
    number: int

    def read(self, name: str) -> Tensor:
        """The whole tensor, without what fills it up."""
        stored = slice_of(self.values, Rows(name, self.number, self.number + 1))
        return cut(stored, self.own.places[name].arrow, self.fitted.sizes, self.own.sizes)

    def read_vectors(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a table of embeddings; no others are read."""
        arrow = self.own.places[name].arrow
        (rows, _), (_, width) = shape(arrow, self.fitted.sizes), shape(arrow, self.own.sizes)
        first = self.number * rows
        return self.values.read_vectors(name, first + start, first + stop)[:, :width]


def alone(
    values: Checkpoint, fitted: Fit, number: int, dtype: torch.dtype, device: torch.device, *, stream: bool = False
) -> Decoder:
    """Part `number` of a merged checkpoint run by itself, without glue; memory holds that part, or with `stream` one
    tensor of it at a time."""
    own = fitted.part(number)
    return load_checkpoint(PartValues(values, fitted, own, number), own, stream=stream, dtype=dtype, device=device)


def without_glue(fitted: Fit) -> Fit:
    """The same models side by side, as if there were no glue between them."""
    assert fitted.groups is not None
    places = {name: place for name, place in fitted.places.items() if not spread(place)}
    return replace(fitted, places=places, groups=replace(fitted.groups, glue=None))
