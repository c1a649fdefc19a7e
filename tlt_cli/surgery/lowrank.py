"""What a factored checkpoint is made of: a Plan with two factors in the place of every chosen matrix.

`<slot>.lowrank_a.weight` [r, in] and `<slot>.lowrank_b.weight` [out, r], their product the matrix, whatever its storage
was; biases stay where they are. A fused tensor of which some part is factored is stored as its parts. With `bits` the
factors are int8 codes, with `.scale` beside each `.weight`. How the files and config.json say all this is told in
`families.factors`, which reads it back.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tlt_cli.axes import dim_size
from tlt_cli.checkpoint.cast import torch_dtype
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, Place, fit
from tlt_cli.families.factors import (
    LEFT,
    RIGHT,
    ROWS,
    SCALE,
    LowRank,
    find_slot,
    refuse_factored,
    slot_shape,
    stock_of,
)
from tlt_cli.families.groups import refuse_grouped
from tlt_cli.model.describe import describe
from tlt_cli.model.modeling import shipped
from tlt_cli.surgery.fold import fold
from tlt_cli.surgery.matrices import Matrix, read_matrix
from tlt_cli.surgery.pivots import Pivoted, pivot
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.quantize import quantized

Factors = Callable[[str], tuple[Tensor, Tensor]]
Values = Callable[[], Tensor]
Metric = Callable[[str], Tensor | None]


def _alike(_: str) -> None:
    """The metric in which all inputs count alike."""


@dataclass(frozen=True)
class Factored:
    """One matrix as two factors. With `shared_with` its right factor is that of another slot, of the same rank.

    `pivoted`: r of its rows become the right factor and the left one lacks them, r(m + n) - r^2 numbers. Where several
    slots of one right factor are pivoted, r rows of all of them together do.
    """

    matrix: Matrix
    rank: int
    shared_with: str | None = None
    pivoted: bool = False


def factored_plan(
    fitted: Fit,
    dtypes: Mapping[str, str],
    factored: Sequence[Factored],
    factors: Factors,
    *,
    ffn: Mapping[int, Sequence[int] | Tensor] = {},
    changed: Mapping[str, Values] = {},
    operation: str = "factor",
    exact: bool = False,
    details: Mapping[str, Any] = {},
    notes: Sequence[str] = (),
    bits: int | None = None,
    metric: Metric = _alike,
) -> Plan:
    """The Plan of `--format lowrank`. `dtypes` are the stored dtypes by tensor; factors get those of their matrix.

    `factors(slot)` is (a [r, in], b [out, r]), asked for when the tensors are written; of slots that share a right
    factor all answer with the same a. `ffn` lists by layer the neurons that are kept: tensors that nobody changed are
    cut to them, while factors and changed tensors have the final shape. `changed` has the values of tensors that are
    neither copies nor factors, by the name and in the layout in which the output stores them: a fused tensor's parts,
    where stored one by one, as "<slot>.weight" [out, in].

    With `bits` factors are codes and scales, their product as close as they come in `metric(slot)`, the second moment
    of what the matrix reads: [in, in] or its diagonal [in], None for the identity.

    Where several slots of one right factor are pivoted, how many rows each of them gives depends on the values: those
    factors are asked for at once. Raises TltError for what cannot be stored so.
    """
    refuse_factored(fitted.lowrank, "factoring")
    refuse_grouped(fitted.groups, "factoring")
    table = fitted.family
    kept = {layer: torch.as_tensor(neurons, dtype=torch.long) for layer, neurons in ffn.items()}
    lowrank = LowRank(
        ranks={one.matrix.name: one.rank for one in factored},
        shared={one.matrix.name: one.shared_with for one in factored if one.shared_with is not None},
        ffn={layer: len(neurons) for layer, neurons in kept.items()},
        stock=stock_of(fitted.config),
        bits=bits,
    )
    store = _Store(lowrank, factored, factors, metric, dtypes)
    lowrank = replace(lowrank, pivoted=store.spans)
    by_tensor: dict[str, dict[int | None, Factored]] = defaultdict(dict)
    for one in factored:
        by_tensor[one.matrix.tensor][one.matrix.part] = one
    planned: list[PlannedTensor] = []
    for name, place in fitted.places.items():
        neurons = None if place.layer is None else kept.get(place.layer)
        if name not in by_tensor:
            planned.append(_dense(name, place, fitted, dtypes[name], neurons, changed))
            continue
        parts = by_tensor[name]
        whole = next(iter(parts.values())).matrix
        for part in range(whole.parts or 1):
            chosen = parts.get(None if whole.parts is None else part)
            if chosen is None:
                planned.append(_apart(whole, part, dtypes[name], changed))
            else:
                planned += _factors(chosen, lowrank, fitted, store, dtypes[name])
    _check_changed(changed, planned)
    config = {**fitted.config, "lowrank": lowrank.data()}
    shapes = {tensor.name: tensor.shape for tensor in planned}
    written = fit(shapes, config, family=table)
    return Plan(
        operation=operation,
        tensors=tuple(planned),
        config=shipped(config, describe(written)),
        exact=exact,
        details={"family": table.name, "format": "lowrank", **details},
        notes=tuple(notes),
    )


def dense_plan(
    fitted: Fit,
    dtypes: Mapping[str, str],
    factored: Sequence[Factored],
    factors: Factors,
    *,
    ffn: Mapping[int, Sequence[int] | Tensor] = {},
    changed: Mapping[str, Values] = {},
    operation: str = "factor",
    details: Mapping[str, Any] = {},
    notes: Sequence[str] = (),
) -> Plan:
    """The Plan of `--format dense`: what folding the factored checkpoint gives, with no rounding of factors between.

    Arguments as for `factored_plan`; the output is one that stock transformers loads.
    """
    factored = [replace(one, pivoted=False) for one in factored]
    between = factored_plan(fitted, dtypes, factored, factors, ffn=ffn, changed=changed)
    made = fit(between.shapes, between.config, family=fitted.family)
    folded = fold(made, {tensor.name: tensor.dtype for tensor in between.tensors})
    by_name = {tensor.name: tensor for tensor in between.tensors}
    tensors = tuple(_through(tensor, by_name) for tensor in folded.tensors)
    return Plan(
        operation=operation,
        tensors=tensors,
        config=folded.config,
        exact=False,
        details={"family": fitted.family.name, "format": "dense", **details},
        notes=(*notes, *folded.notes),
    )


# --- one tensor each -------------------------------------------------------------------------------------------


def _dense(
    name: str, place: Place, fitted: Fit, dtype: str, neurons: Tensor | None, changed: Mapping[str, Values]
) -> PlannedTensor:
    """A tensor that is no factor: as it was, changed, or cut to the neurons that are kept."""
    sizes = fitted.sizes_of(place)
    cut = [index for index, dim in enumerate(place.arrow.dims) if "ffn" in dim] if neurons is not None else []
    shape = [dim_size(dim, sizes) for dim in place.arrow.dims]
    for index in cut:
        if place.arrow.dims[index] != ("ffn",):
            raise TltError(f"{name} fuses several parts of a feed-forward: its neurons cannot be removed one by one")
        assert neurons is not None
        shape[index] = len(neurons)
    if name in changed:
        return PlannedTensor(
            name, tuple(shape), dtype, name, _given(changed[name], tuple(shape), name), 8 * _work(shape)
        )
    if not cut:
        return PlannedTensor(name, tuple(shape), dtype, name)

    def compute(values: Tensors) -> Iterable[Tensor]:
        tensor = values.read(name)
        for index in cut:
            assert neurons is not None
            tensor = tensor.index_select(index, neurons)
        yield tensor

    whole = math.prod(dim_size(dim, sizes) for dim in place.arrow.dims)
    return PlannedTensor(name, tuple(shape), dtype, name, compute, 16 * whole)


def _apart(whole: Matrix, part: int, dtype: str, changed: Mapping[str, Values]) -> PlannedTensor:
    """A dense part of a fused tensor, stored by itself [out, in]."""
    slot = f"{whole.name.rpartition('.')[0]}.{part}"
    name, shape = f"{slot}.weight", (whole.rows, whole.columns)
    if name in changed:
        return PlannedTensor(name, shape, dtype, whole.tensor, _given(changed[name], shape, name), 8 * _work(shape))
    matrix = replace(whole, name=slot, part=part)

    def compute(values: Tensors) -> Iterable[Tensor]:
        yield read_matrix(values, matrix, torch.float64 if dtype == "F64" else torch.float32)

    return PlannedTensor(name, shape, dtype, whole.tensor, compute, 8 * math.prod(whole.stored))


def _factors(one: Factored, lowrank: LowRank, fitted: Fit, store: _Store, dtype: str) -> Iterator[PlannedTensor]:
    matrix, rank = one.matrix, one.rank
    rows, columns = slot_shape(fitted.sizes, fitted.family, lowrank, find_slot(fitted.family, matrix.name))
    start, stop = lowrank.pivoted.get(matrix.name, (0, 0))
    double, coded = dtype == "F64", lowrank.bits is not None
    shapes = {LEFT: (rows - (stop - start), rank)}
    if one.shared_with is None:
        shapes = {RIGHT: (rank, columns), **shapes}
    for kind, shape in shapes.items():
        name = f"{matrix.name}.{kind}.weight"
        work = 8 * (_work(shape) + matrix.size)
        stored = "I8" if coded else dtype
        yield PlannedTensor(name, shape, stored, matrix.tensor, store.reader(name, shape, double), work)
        if coded:
            name, lengths = f"{matrix.name}.{kind}.{SCALE}", shape[:1]
            yield PlannedTensor(name, lengths, dtype, matrix.tensor, store.reader(name, lengths, double), work)
    if stop:
        name = f"{matrix.name}.{ROWS}"
        yield PlannedTensor(name, (stop - start,), "I64", matrix.tensor, store.reader(name, (stop - start,), double))


def _given(value: Values, shape: tuple[int, ...], name: str) -> Callable[[Tensors], Iterable[Tensor]]:
    def compute(_: Tensors) -> Iterable[Tensor]:
        tensor = value().detach().cpu()
        assert tuple(tensor.shape) == shape, f"{name} is given as {list(tensor.shape)}, not {list(shape)}"
        yield tensor

    return compute


def _work(shape: Sequence[int]) -> int:
    return 4 * math.prod(shape)


def _check_changed(changed: Mapping[str, Values], planned: Sequence[PlannedTensor]) -> None:
    unknown = changed.keys() - {tensor.name for tensor in planned}
    assert not unknown, f"changed tensors that the output has not: {sorted(unknown)}"


def _through(tensor: PlannedTensor, between: Mapping[str, PlannedTensor]) -> PlannedTensor:
    """A tensor that is computed from planned ones, as one that is computed from the checkpoint."""
    compute, source = tensor.compute, between[tensor.source]
    if compute is None:
        return replace(source, name=tensor.name)
    return replace(
        tensor,
        source=source.source,
        compute=lambda values: compute(_Planned(between, values)),
        work=tensor.work + source.work,
    )


@dataclass(frozen=True)
class _Planned:
    """Planned tensors as a place to read from: each is computed when it is read."""

    tensors: Mapping[str, PlannedTensor]
    values: Tensors

    def read(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return self.values.read(tensor.source) if tensor.compute is None else torch.cat([*tensor.compute(self.values)])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]


class _Store:
    """The factors' values by tensor name. Slots that share a right factor are computed together, once for all of their
    tensors, and let go when all have been read."""

    def __init__(
        self,
        lowrank: LowRank,
        factored: Sequence[Factored],
        factors: Factors,
        metric: Metric,
        dtypes: Mapping[str, str],
    ) -> None:
        self._lowrank, self._factors, self._metric, self._dtypes = lowrank, factors, metric, dtypes
        self._groups: dict[str, list[Factored]] = defaultdict(list)
        for one in sorted(factored, key=lambda one: one.shared_with is not None):  # owners come first
            self._groups[one.shared_with or one.matrix.name].append(one)
        self._held: dict[str, dict[str, Tensor]] = {owner: {} for owner in self._groups}
        self._locks = {owner: threading.Lock() for owner in self._groups}
        self.spans: dict[str, tuple[int, int]] = {}
        for owner, group in self._groups.items():
            chosen = [one for one in group if one.pivoted]
            assert all(one.matrix.layer is not None for one in chosen), "embeddings and heads are not pivoted"
            if len(chosen) == 1:
                self.spans[chosen[0].matrix.name] = (0, chosen[0].rank)
            elif chosen:
                held, start = self._compute(owner), 0  # and let go: that of all owners at once may not fit
                for one in chosen:
                    rows = len(held.get(f"{one.matrix.name}.{ROWS}", ()))
                    if rows:
                        self.spans[one.matrix.name] = (start, start + rows)
                    start += rows

    def reader(self, name: str, shape: tuple[int, ...], double: bool) -> Callable[[Tensors], Iterable[Tensor]]:
        """How a planned tensor of this name comes about."""
        slot = name.partition(f".{RIGHT}")[0].partition(f".{LEFT}")[0].partition(f".{ROWS}")[0]
        owner = self._lowrank.shared.get(slot, slot)

        def compute(_: Tensors) -> Iterable[Tensor]:
            with self._locks[owner]:
                held = self._held[owner]
                if name not in held:
                    held.update(self._compute(owner))
                value = held.pop(name)
            assert tuple(value.shape) == shape, f"{name} is given as {list(value.shape)}, not {list(shape)}"
            yield value.to(torch.float64 if double else torch.float32) if value.is_floating_point() else value

        return compute

    def _compute(self, owner: str) -> dict[str, Tensor]:
        group = self._groups[owner]
        pairs = [self._oriented(one, *self._factors(one.matrix.name)) for one in group]
        right, lefts = pairs[0][0], [left for _, left in pairs]
        chosen = [index for index, one in enumerate(group) if one.pivoted]
        found: dict[str, Tensor] = {}
        if chosen:
            made: Pivoted = pivot(right, lefts, chosen)
            right, lefts = made.right, list(made.lefts)
            for index in chosen:
                if len(made.rows[index]):
                    found[f"{group[index].matrix.name}.{ROWS}"] = made.rows[index]
        names = [f"{owner}.{RIGHT}", *(f"{one.matrix.name}.{LEFT}" for one in group)]
        if self._lowrank.bits is None:
            return found | {f"{name}.weight": value for name, value in zip(names, (right, *lefts), strict=True)}
        a, b = quantized(
            right, torch.cat(lefts), inputs=self._metric(owner), pivoted=bool(chosen),
            dtype=torch_dtype(self._dtypes[group[0].matrix.tensor]),
        )  # fmt: skip
        sizes = [len(left) for left in lefts]
        codes, scales = (a.codes, *torch.split(b.codes, sizes)), (a.scale, *torch.split(b.scale, sizes))
        for name, code, scale in zip(names, codes, scales, strict=True):
            found |= {f"{name}.weight": code, f"{name}.{SCALE}": scale}
        return found

    def _oriented(self, one: Factored, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """As they are stored: a table of embeddings is words by entries, though its arrow reads words."""
        a, b = a.detach().cpu(), b.detach().cpu()
        if one.matrix.role in ("embedding", "positions") and one.matrix.transposed:
            return b.T.contiguous(), a.T.contiguous()
        return a, b
