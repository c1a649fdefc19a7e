"""Folding glue: every linear behind a glue becomes one matrix across all parts, W' = W G, as a Plan.

W is block-diagonal, so the rows of part k are W_k times the rows of G that belong to part k. The head becomes
[a_k W_k] G, with the weights a_k in it; a head that was the embedding becomes a matrix of its own, for the embedding is
looked up without glue. Products are computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tlt_cli.axes import shape
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, Place, fit
from tlt_cli.families.glue import PART, at_layer, dense_arrow
from tlt_cli.families.groups import KEY
from tlt_cli.families.place import match, roles_of
from tlt_cli.model.describe import describe
from tlt_cli.model.modeling import shipped
from tlt_cli.surgery.glue import difference, spread
from tlt_cli.surgery.plan import Plan

_TIE = "tie_word_embeddings"
_WORDS = 4096  # of the vocabulary that are multiplied at a time


def fold_glue(fitted: Fit, dtypes: Mapping[str, str]) -> Plan:
    """The Plan of the folded checkpoint: no glue, and dense linears. `dtypes` are the stored dtypes by tensor name.

    Raises TltError where there is no glue.
    """
    groups = fitted.groups
    if groups is None or groups.glue is None:
        raise TltError("nothing to fold: there is no glue between the models of this checkpoint")
    if groups.factored:
        raise TltError(
            "glue folds into plain matrices, and models of this checkpoint hold factors; `tlt fold SRC` first"
        )
    sites, planned, folded = groups.glue.sites, list[PlannedTensor](), 0
    for name, place in fitted.places.items():
        module = name.removesuffix(".weight")
        if spread(place):
            continue
        if place.kind == "weight" and module in at_layer(sites, place.layer):
            planned.append(_Product(fitted, module, place, name).planned(dtypes[name]))
            folded += 1
        else:
            planned.append(
                PlannedTensor(name, (len(groups.parts), *shape(place.arrow, fitted.sizes)), dtypes[name], name)
            )
    config, notes = dict(fitted.config), tuple[str, ...]()
    head = next(iter(at_layer(sites, None)), None)
    if head is not None and fitted.tied:
        name, place = next((name, place) for name, place in fitted.places.items() if "embedding" in place.roles)
        row = match(fitted.family, f"{head}.weight")
        assert row is not None
        own = Place(f"{head}.weight", row[0], fitted.family.rows[row[0]], None, ("head",), "weight")
        planned.append(_Product(fitted, head, own, name).planned(dtypes[name]))
        config[_TIE], folded = False, folded + 1
        notes = ("the head is a matrix of its own now: the glue was in front of it and not behind the embedding",)
    config[KEY] = replace(groups, glue=None, dense=sites).data()
    written = fit({tensor.name: tensor.shape for tensor in planned}, config, family=fitted.family)
    return Plan(
        operation="fold",
        tensors=tuple(planned),
        config=shipped(config, describe(written)),
        exact=True,
        details={"family": fitted.family.name, "folded": folded, "glue": groups.glue.data()},
        notes=notes,
    )


@dataclass(frozen=True)
class _Product:
    """One module's matrix W' = W G across all parts. `stored` is the tensor [K, ...] that W is read from."""

    fitted: Fit
    module: str
    place: Place
    stored: str

    def planned(self, dtype: str) -> PlannedTensor:
        arrow = dense_arrow(self.fitted.family, self.place)
        size = shape(arrow, {**self.fitted.sizes, PART: self.count})
        compute = self._head if self.place.roles == ("head",) else self._linear
        return PlannedTensor(f"{self.module}.weight", size, dtype, self.stored, compute, 24 * math.prod(size))

    @property
    def count(self) -> int:
        """K."""
        assert self.fitted.groups is not None
        return len(self.fitted.groups.parts)

    @property
    def _transposed(self) -> bool:
        return self.place.arrow.sign == "->"

    def _glue(self, values: Tensors, width: int) -> tuple[Tensor, ...]:
        assert self.fitted.groups is not None and self.fitted.groups.glue is not None
        return difference(values.read, self.fitted.groups.glue.kind, self.module, self.count, width)

    def _linear(self, values: Tensors) -> Iterator[Tensor]:
        """A linear of a block: of fused ones each across all parts, one behind the other."""
        stored = values.read(self.stored).double()
        stored = stored.mT if self._transposed else stored  # [K, out, in]
        fused = len(roles_of(self.fitted.family, self.place.pattern))
        inputs = stored.shape[-1]
        times = _times(self._glue(values, self.count * inputs))
        blocks = (
            times(block, slice(part * inputs, (part + 1) * inputs))
            for pieces in zip(*(block.chunk(fused) for block in stored), strict=True)
            for part, block in enumerate(pieces)
        )
        if self._transposed:
            yield torch.cat(list(blocks)).T.contiguous()
        else:
            yield from blocks

    def _head(self, values: Tensors) -> Iterator[Tensor]:
        """The head: some words of all parts at a time."""
        assert self.fitted.groups is not None
        stored, weights = values.read(self.stored), self.fitted.groups.weights
        stored = stored.mT if self._transposed else stored
        times = _times(self._glue(values, self.count * stored.shape[-1]))
        whole = (
            times(torch.cat([weight * part.double() for weight, part in zip(weights, some, strict=True)], dim=1), None)
            for some in torch.split(stored, _WORDS, dim=1)
        )
        if self._transposed:
            yield torch.cat(list(whole)).T.contiguous()
        else:
            yield from whole


def _times(glue: tuple[Tensor, ...]) -> Callable[[Tensor, slice | None], Tensor]:
    """W [n, in] times the rows of G that it meets: those of the slice, or all where there is none -> [n, K in]."""
    width = glue[-1].shape[-1]

    def times(block: Tensor, met: slice | None) -> Tensor:
        rows = slice(0, width) if met is None else met
        y = block @ glue[0][rows]
        y = y if len(glue) == 1 else y @ glue[1]
        y[:, rows] += block
        return y

    return times
