"""Plans for factored matrices of any checkpoint, family known or not: multiplied out, as two tensors each, and back.

Needs names and shapes alone. What a known family's runtime wants beside them is the business of `lowrank`.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tlt_cli.checkpoint.cast import torch_dtype
from tlt_cli.checkpoint.header import TensorInfo
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.checkpoint.strict_json import shortened
from tlt_cli.errors import TltError
from tlt_cli.families.factors import (
    KEY,
    LEFT,
    MODEL_TYPE,
    RIGHT,
    SCALE,
    LowRank,
    dense_config,
    is_factor,
    read_lowrank,
    stock_of,
)
from tlt_cli.surgery.matrices import Matrix, write_back
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.quantize import quantized, read_factor

OPERATION = "factor"
Factors = Callable[[Matrix, int], tuple[Tensor, Tensor]]
_TENSORS, _OWN_CODE = "tensors", "dense_auto_map"


def multiplied_plan(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
    ranks: Mapping[Matrix, int],
    factors: Factors,
    *,
    details: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Plan:
    """Every tensor as it was, those of `ranks` with b @ a in the matrices' places: stock, and no smaller."""
    by_tensor: dict[str, list[Matrix]] = {}
    for matrix in ranks:
        by_tensor.setdefault(matrix.tensor, []).append(matrix)

    def computed(name: str) -> Callable[[Tensors], Iterator[Tensor]]:
        def compute(values: Tensors) -> Iterator[Tensor]:
            stored = values.read(name)
            products = {}
            for matrix in by_tensor[name]:
                a, b = factors(matrix, ranks[matrix])
                products[matrix] = b @ a
            yield write_back(stored.to(torch.promote_types(stored.dtype, torch.float32)), products)

        return compute

    planned = [
        PlannedTensor(
            name, info.shape, info.dtype, name,
            computed(name) if name in by_tensor else None, work=16 * math.prod(info.shape) if name in by_tensor else 0,
        )
        for name, info in tensors.items()
    ]  # fmt: skip
    return Plan(OPERATION, tuple(planned), dict(config or {}), exact=False, details=dict(details), notes=tuple(notes))


def separate_plan(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
    ranks: Mapping[Matrix, int],
    factors: Factors,
    *,
    details: Mapping[str, Any],
    notes: Sequence[str] = (),
    bits: int | None = None,
) -> Plan:
    """`<slot>.lowrank_a.weight` [r, in] and `<slot>.lowrank_b.weight` [out, r] instead of each matrix of `ranks`.

    For checkpoints of no known family, where every matrix is a tensor of its own. With `bits` both are codes, with
    `.scale` beside each `.weight`. config.json no longer names a class that would take the file for the dense model.
    """
    by_tensor = {matrix.tensor: matrix for matrix in ranks}
    assert len(by_tensor) == len(ranks), "without a family nothing is known to be fused"
    planned: list[PlannedTensor] = []
    for name, info in tensors.items():
        if name in by_tensor:
            matrix = by_tensor[name]
            planned += _Pair(matrix, ranks[matrix], factors, info.dtype, bits).planned()
        else:
            planned.append(PlannedTensor(name, info.shape, info.dtype, name))
    changed = _factored_config(config or {}, ranks, bits)
    return Plan(OPERATION, tuple(planned), changed, exact=False, details=dict(details), notes=tuple(notes))


def _factored_config(config: Mapping[str, Any], ranks: Mapping[Matrix, int], bits: int | None) -> dict[str, Any]:
    lowrank = LowRank(
        {matrix.name: rank for matrix, rank in ranks.items()},
        stock=replace(stock_of(config), rope_scaling=None),  # that stays where it is
        bits=bits,
    )
    said = lowrank.data()
    other = {
        matrix.name: {"name": matrix.tensor, "shape": list(matrix.stored)}
        for matrix in ranks
        if matrix.tensor != f"{matrix.name}.weight" or len(matrix.stored) != 2
    }
    said |= {_TENSORS: other} if other else {}
    said |= {_OWN_CODE: config["auto_map"]} if "auto_map" in config else {}
    kept = {key: value for key, value in config.items() if key not in ("architectures", "auto_map")}
    return {**kept, "model_type": MODEL_TYPE, KEY: said}


@dataclass(eq=False)
class _Pair:
    """The tensors of one factored matrix: computed together when the first is written, let go as they are read."""

    matrix: Matrix
    rank: int
    factors: Factors
    dtype: str
    bits: int | None
    held: dict[str, Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def planned(self) -> Iterator[PlannedTensor]:
        slot, work = self.matrix.name, 16 * self.matrix.size
        stored = self.dtype if self.bits is None else "I8"
        for kind, shape in ((RIGHT, (self.rank, self.matrix.columns)), (LEFT, (self.matrix.rows, self.rank))):
            weight, scale = f"{slot}.{kind}.weight", f"{slot}.{kind}.{SCALE}"
            yield PlannedTensor(weight, shape, stored, self.matrix.tensor, self._reader(weight), work)
            if self.bits is not None:
                yield PlannedTensor(scale, shape[:1], self.dtype, self.matrix.tensor, self._reader(scale), work)

    def _reader(self, name: str) -> Callable[[Tensors], Iterator[Tensor]]:
        def compute(_: Tensors) -> Iterator[Tensor]:
            with self.lock:
                if name not in self.held:
                    self.held.update(self._computed())
                value = self.held.pop(name)
            yield value

        return compute

    def _computed(self) -> dict[str, Tensor]:
        a, b = self.factors(self.matrix, self.rank)
        slot = self.matrix.name
        if self.bits is None:
            return {f"{slot}.{RIGHT}.weight": a.contiguous(), f"{slot}.{LEFT}.weight": b.contiguous()}
        found: dict[str, Tensor] = {}
        for kind, made in zip((RIGHT, LEFT), quantized(a, b, dtype=torch_dtype(self.dtype)), strict=True):
            found |= {f"{slot}.{kind}.weight": made.codes, f"{slot}.{kind}.{SCALE}": made.scale}
        return found


def joined_plan(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Plan:
    """What `separate_plan` made, multiplied out in float64 and rounded once, under the names and shapes of before.

    Raises TltError for a factor that is missing, left over or of the wrong shape, and for what takes a family to fold.
    """
    lowrank = read_lowrank(config)
    if lowrank is None:
        raise TltError("nothing to fold: this checkpoint holds no low-rank factors")
    if lowrank.shared or lowrank.pivoted or lowrank.ffn:
        raise TltError("shared and pivoted factors take the family's table to fold: pass --family my.toml")
    kinds = ("weight",) if lowrank.bits is None else ("weight", SCALE)
    parts = {f"{slot}.{side}.{kind}": slot for slot in lowrank.ranks for side in (RIGHT, LEFT) for kind in kinds}
    for name, slot in parts.items():
        if name not in tensors:
            raise TltError(f"{name} is missing: config.json says that {slot} is factored")
    planned, done = [], set[str]()
    for name, info in tensors.items():
        if name not in parts:
            if is_factor(name):
                raise TltError(f"{name} is in the file, but config.json's {KEY} has no such factor")
            planned.append(PlannedTensor(name, info.shape, info.dtype, name))
        elif parts[name] not in done:
            done.add(parts[name])
            planned.append(_joined(tensors, config[KEY], lowrank, parts[name]))
    for name, count in Counter(tensor.name for tensor in planned).items():
        if count > 1:
            raise TltError(f"{name} is in the file, but config.json says that it is stored as factors")
    own = {"auto_map": config[KEY][_OWN_CODE]} if _OWN_CODE in config[KEY] else {}
    return Plan(
        "fold", tuple(planned), {**dense_config(config, lowrank.stock), **own}, exact=True,
        details={"folded": len(lowrank.ranks)},
    )  # fmt: skip


def _joined(tensors: Mapping[str, TensorInfo], said: Mapping[str, Any], lowrank: LowRank, slot: str) -> PlannedTensor:
    a, b = (tensors[f"{slot}.{kind}.weight"] for kind in (RIGHT, LEFT))
    rank = lowrank.ranks[slot]
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise TltError(
            f"the factors of {slot} are {list(a.shape)} and {list(b.shape)}, but config.json gives them the rank {rank}"
        )
    for factor in (a, b) if lowrank.bits is not None else ():
        scale = tensors[f"{factor.name.removesuffix('.weight')}.{SCALE}"]
        if factor.dtype != "I8" or scale.shape != factor.shape[:1]:
            raise TltError(
                f"{scale.name} {list(scale.shape)} does not go with {factor.name} {factor.dtype} {list(factor.shape)}: "
                "expected int8 codes, and a scale for each of their rows"
            )
    name, shape = _stored(said, slot, (b.shape[0], a.shape[1]))
    dtype = (b if lowrank.bits is None else tensors[f"{slot}.{LEFT}.{SCALE}"]).dtype

    def compute(values: Tensors) -> Iterator[Tensor]:
        left, right = (read_factor(values, slot, kind, lowrank.bits) for kind in (LEFT, RIGHT))
        yield (left @ right).reshape(shape)

    return PlannedTensor(name, shape, dtype, b.name, compute, 24 * math.prod(shape))


def _stored(said: Mapping[str, Any], slot: str, size: tuple[int, int]) -> tuple[str, tuple[int, ...]]:
    """The name and the shape that the slot's tensor had."""
    entries = said.get(_TENSORS, {})
    if not isinstance(entries, dict):
        raise TltError(f"config.json: {KEY}.{_TENSORS} must be an object, not {shortened(entries)}")
    if slot not in entries:
        return f"{slot}.weight", size
    match entries[slot]:
        case {"name": str(name), "shape": [int(rows), *rest]} if rows == size[0] and math.prod(rest) == size[1]:
            return name, (rows, *rest)
    raise TltError(
        f"config.json: {KEY}.{_TENSORS}.{slot} must give a name and a shape of {size[0]} x {size[1]} numbers, not "
        f"{shortened(entries[slot])}"
    )
