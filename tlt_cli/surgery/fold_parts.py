"""Folding the factors of models that lie side by side: each is folded by itself, and all are merged again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tlt_cli.axes import shape
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.families import Fit, fit
from tlt_cli.families.groups import KEY
from tlt_cli.model.describe import describe
from tlt_cli.model.modeling import shipped
from tlt_cli.surgery.fold import fold
from tlt_cli.surgery.glue import spread
from tlt_cli.surgery.merge import side_by_side
from tlt_cli.surgery.mergeable import Source, models
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.unmerge import PartValues


def fold_parts(fitted: Fit, dtypes: Mapping[str, str]) -> Plan:
    """The Plan of the merged checkpoint whose parts are all plain; glue stays. `dtypes` are the stored dtypes by tensor
    name.

    Products are computed in float64 and rounded once.
    """
    groups = fitted.groups
    assert groups is not None and groups.factored
    plans = [_folded(own, dtypes) for own in fitted.parts]
    sources = [
        Source(
            fit(plan.shapes, plan.config, family=fitted.family), {tensor.name: tensor.dtype for tensor in plan.tensors},
            part.name, part.sha256,
        )
        for plan, part in zip(plans, groups.parts, strict=True)
    ]  # fmt: skip
    merged = side_by_side(models(sources, groups.weights))
    made = _Made(fitted, [{tensor.name: tensor for tensor in plan.tensors} for plan in plans])
    tensors = [made.planned(tensor) for tensor in merged.tensors]
    for name, place in fitted.places.items():
        if spread(place):
            tensors.append(PlannedTensor(name, shape(place.arrow, fitted.sizes_of(place)), dtypes[name], name))
    config = dict(merged.config)
    if groups.glue is not None:
        config[KEY] = {**config[KEY], "glue": groups.glue.data()}
    written = fit({tensor.name: tensor.shape for tensor in tensors}, config, family=fitted.family)
    notes = [
        f"{part.name}: {note}" for part, plan in zip(groups.parts, plans, strict=True) for note in plan.notes
    ]  # fmt: skip
    if groups.glue is not None:
        notes.append("the glue between the models stays; fold the output once more to fold that too")
    return Plan(
        operation="fold",
        tensors=tuple(tensors),
        config=shipped(config, describe(written)),
        exact=True,
        details={"family": fitted.family.name, "folded": sum(plan.details.get("folded", 0) for plan in plans)},
        notes=tuple(notes),
    )


def _folded(own: Fit, dtypes: Mapping[str, str]) -> Plan:
    """One part as a plain model."""
    if own.lowrank is not None:
        return fold(own, dtypes)
    plain = [
        PlannedTensor(name, shape(place.arrow, own.sizes), dtypes[name], name) for name, place in own.places.items()
    ]
    return Plan("fold", tuple(plain), own.config, exact=True, details={})


@dataclass(frozen=True)
class _Made:
    """What the plans of all parts make, by their numbers and names, as tensors of checkpoints that lie together."""

    fitted: Fit
    tensors: Sequence[Mapping[str, PlannedTensor]]

    def planned(self, stack: PlannedTensor) -> PlannedTensor:
        """A stack of what the plans make, as one that is made of the merged checkpoint."""
        before = self.fitted.places.get(stack.name)
        parts = [own[stack.name] for own in self.tensors if stack.name in own]  # some may lack the layer
        if before is not None and all(part.compute is None for part in parts):
            stored = len(self.fitted.holders[stack.name]), *shape(before.arrow, self.fitted.sizes_of(before))
            if stored == stack.shape:
                return PlannedTensor(stack.name, stack.shape, stack.dtype, stack.name)
        compute, work = stack.compute, stack.work + max(part.work for part in parts)
        assert compute is not None

        def made(values: Tensors) -> Iterator[Tensor]:
            yield from compute(_Reading(self, values))

        return replace(stack, source=self._find(stack.source)[1].source, compute=made, work=work, copies=())

    def _find(self, numbered: str) -> tuple[int, PlannedTensor]:
        number, _, name = numbered.partition(":")
        return int(number) - 1, self.tensors[int(number) - 1][name]

    def read(self, numbered: str, values: Tensors) -> Tensor:
        """What a plan makes of the merged checkpoint's `values`."""
        number, tensor = self._find(numbered)
        part = PartValues(values, self.fitted, self.fitted.part(number), number)
        return part.read(tensor.source) if tensor.compute is None else torch.cat([*tensor.compute(part)])


@dataclass(frozen=True)
class _Reading:
    """Tensors that are made when they are read."""

    made: _Made
    values: Tensors

    def read(self, name: str) -> Tensor:
        return self.made.read(name, self.values)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]
