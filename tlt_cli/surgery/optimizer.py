"""Growing AdamW's state with the weights: gradients go through the dual map, G' = (P_out+)T G P_inT.

So do their first moments; second moments go through its squares, exact where every new entry copies one old entry
(reference: grow, section 3.9; the integer case is muP-scaling's, arXiv:2602.10545). With the learning rates, weight
decays and epsilons of `advice` an evenly doubled model then repeats the small model's steps.

A state is a safetensors file of `<parameter>.exp_avg` and `<parameter>.exp_avg_sq`, and a `step` if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlt_cli.axes import shape
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.errors import TltError, UsageError
from tlt_cli.surgery.grow import Growth, grown_places, widening
from tlt_cli.surgery.maps import COPY, AxisMap
from tlt_cli.surgery.widen import BLOCK_ELEMENTS, Side, Widening

STATE, ADVICE = "optimizer.safetensors", "optimizer.json"
_MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}


def grow_moments(growth: Growth, state: Checkpoint) -> list[PlannedTensor]:
    """The grown state, in the state's own dtypes. Raises TltError where the state does not fit the model."""
    if growth.rotates:
        raise UsageError("--optimizer-state cannot go with --method rotate: second moments have no rotation")
    planned = []
    for name, place, layer in grown_places(growth):
        work = widening(growth, name, place, layer)
        for moment, power in _MOMENTS.items():
            source = f"{place.name}.{moment}"
            info = state.tensors.get(source)
            if info is None:
                raise TltError(f"{state.source} has no {source}; wanted both moments of every parameter")
            if info.shape != work.old_shape:
                raise TltError(
                    f"{state.source}: {source} is {list(info.shape)}, but the parameter {list(work.old_shape)}"
                )
            dual = replace(
                work,
                name=f"{name}.{moment}",
                source=source,
                sides=tuple(Side(_axis(side).dual(power), side.reads) for side in work.sides),
                fill="zero",
                offset=0.0,
                double=info.dtype == "F64",
            )
            planned.append(
                PlannedTensor(
                    dual.name, shape(place.arrow, growth.targets.sizes), info.dtype, source,
                    _filled(dual, state, fresh_mean=moment == "exp_avg_sq"), dual.work, STATE,
                )
            )  # fmt: skip
    if "step" in state.tensors:
        info = state.tensors["step"]
        planned.append(PlannedTensor("step", info.shape, info.dtype, "step", lambda _: [state.read("step")], 0, STATE))
    return planned


def _axis(side: Side) -> AxisMap:
    assert isinstance(side.map, AxisMap), "rotations are refused before"
    return side.map


def _filled(work: Widening, state: Tensors, *, fresh_mean: bool) -> Callable[[Tensors], Iterable[Tensor]]:
    """Computes from `state`, whatever the plan reads from. Fresh second moments become the tensor's mean: at zero
    with many steps taken, the first updates would be several learning rates large."""
    fresh = [torch.from_numpy(_axis(side).kind != COPY) for side in work.sides]

    def compute(_: Tensors) -> Iterator[Tensor]:
        mean = _mean(work, state) if fresh_mean and any(bool(mask.any()) for mask in fresh) else None
        start = 0
        for block in work(state):
            if mean is not None:
                block[fresh[0][start : start + len(block)]] = mean
                if block.dim() > 1:
                    block[:, fresh[1]] = mean
            start += len(block)
            yield block

    return compute


def _mean(work: Widening, state: Tensors) -> float:
    rows = work.old_shape[0]
    step = max(1, BLOCK_ELEMENTS // max(1, int(np.prod(work.old_shape[1:]))))
    total = sum(
        float(state.read_rows(work.source, start, min(rows, start + step)).double().sum())
        for start in range(0, rows, step)
    )
    return total / max(1, int(np.prod(work.old_shape)))


def advice(growth: Growth) -> dict[str, dict[str, Any]]:
    """Per new parameter what to multiply the old learning rate, weight decay and epsilon with.

    `uniform` is false where the entries of one tensor would need several factors; theirs is then the mean. Weight decay
    of gains stored as 1 + w pulls them to 1, whatever they were scaled by, so it should be off for those.
    """
    report = {}
    for name, place, layer in grown_places(growth):
        work = widening(growth, name, place, layer)
        rate, epsilon, uniform = 1.0, 1.0, True
        for side in work.sides:
            mapped = _axis(side)
            copied = mapped.kind == COPY
            forth, back = mapped.write[copied], mapped.read[copied]
            if side.reads:
                forth, back = back, forth
            rate *= float(forth.mean())
            epsilon *= float(back.mean())
            uniform = uniform and bool(np.allclose(forth, forth[0]) and np.allclose(back, back[0]))
        report[name] = {"lr": rate, "weight_decay": 1 / rate, "eps": epsilon, "uniform": uniform}
    return report
