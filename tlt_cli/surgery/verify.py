"""Proof that a plan keeps the function: both models run on the same tokens, before anything takes its final name.

Two questions are kept apart. What the plan computes, in float32, must equal the source up to rounding. What was
written may be in a coarser dtype: its distance is reported, and bounded only by what that dtype can cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tlt_cli.checkpoint.cast import torch_dtype
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import Tensors
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, fit
from tlt_cli.model.compare import Distance, compare
from tlt_cli.model.decoder import Adapter, Decoder
from tlt_cli.model.describe import describe
from tlt_cli.model.grouped import decoder_class
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.plan import Plan

BOUND = 5e-5  # largest |difference| of two float32 logits, in their standard deviations, for up to four layers
_ROUNDINGS = 64  # how many times its own precision a coarser dtype may move a logit
_MOST_LOGITS = 1 << 23
_FULL = ("F32", "F64")


@dataclass(frozen=True)
class Verification:
    """`computed` is the plan against the source; `written` the file against it, where its dtype is a coarser one."""

    computed: Distance
    bound: float
    written: Distance | None = None

    @property
    def holds(self) -> bool:
        """Whether the plan computes what the source computes."""
        return self.computed.relative <= self.bound

    def report(self) -> dict[str, Any]:
        """As JSON has it: the plan's distance and its bound, and the file's where there is one."""
        found: dict[str, Any] = {"relative": self.computed.relative, "bound": self.bound, **asdict(self.computed)}
        if self.written is not None:
            found["written"] = {"relative": self.written.relative, **asdict(self.written)}
        return found


def sample_tokens(fitted: Fit, text: Tensor | None = None, *, seed: int = 0) -> Tensor:
    """ids [2, T]: random ones, and one or two more rows that are the first windows of `text` [N]."""
    seen = [describe(one)["positions"] or 64 for one in fitted.parts]
    longest = min(64, *seen, max(2, _MOST_LOGITS // (4 * fitted.sizes["vocab"])))
    if text is not None:
        if not len(text):
            raise TltError(f"the text has none of the model's {fitted.sizes['vocab']:,} tokens; give another one")
        longest = min(longest, len(text))
    ids = torch.randint(0, fitted.sizes["vocab"], (2, longest), generator=torch.Generator().manual_seed(seed))
    if text is None:
        return ids
    windows = min(2, len(text) // longest)
    return torch.cat([ids, text[: windows * longest].reshape(windows, longest)])


def verify(
    fitted: Fit,
    plan: Plan,
    values: Checkpoint,
    ids: Tensor,
    *,
    written: Checkpoint | None = None,
    adapted: Callable[[Decoder, torch.dtype], Adapter] | None = None,
) -> Verification:
    """Run the source, the plan and, where its dtype is coarser than float32, what was written. Streams: memory is one
    tensor at a time. A miss in float32 is measured again in float64 before it counts.

    `adapted` makes the adapter beside the source, for a plan that folds one.
    """
    grown = fit(plan.shapes, plan.config, family=fitted.family)

    def source(dtype: torch.dtype) -> Decoder:
        decoder = load_checkpoint(values, fitted, stream=True, dtype=dtype)
        decoder.adapter = None if adapted is None else adapted(decoder, dtype)
        return decoder

    def measured(dtype: torch.dtype) -> Verification:
        planned = planned_decoder(plan, grown, values, dtype=dtype)
        return Verification(compare(source(dtype), planned, ids), bound_of(grown))

    found = twice(measured)
    if written is None or not rounded(plan, values) or not plan.exact:
        return found
    distance = compare(source(torch.float32), load_checkpoint(written, grown, stream=True), ids)
    return replace(found, written=distance)


def twice(measure: Callable[[torch.dtype], Verification]) -> Verification:
    """What is measured in float32, or again in float64 where that misses its bound: rounding alone counts as none."""
    found = measure(torch.float32)
    return found if found.holds else measure(torch.float64)


def bound_of(fitted: Fit) -> float:
    """How far logits may differ in float32, in their deviations: as rounding errors of the layers add up."""
    return BOUND * max(1.0, math.sqrt(fitted.sizes["layer"] / 4))


def rounded(plan: Plan, values: Checkpoint) -> list[str]:
    """The dtypes coarser than float32 that the plan rounds some tensor of the model to."""
    return [
        tensor.dtype
        for tensor in plan.tensors
        if tensor.file is None and tensor.dtype not in _FULL
        if tensor.compute is not None or values.tensors[tensor.source].dtype != tensor.dtype
    ]


def check(plan: Plan, verification: Verification) -> None:
    """TltError where a function-preserving plan misses its bound; `--no-verify` would write it all the same."""
    if not plan.exact:
        return
    if not verification.holds:
        raise TltError(
            f"verification failed: logits differ by {verification.computed.relative:.1e} of their deviation, and "
            f"{verification.bound:.1e} is allowed; nothing was written; "
            + (
                "take less --noise"
                if plan.details.get("noise", 0) > 1
                else "report it, with the command and config.json"
            )
        )
    if verification.written is not None:
        precision = max(
            torch.finfo(torch_dtype(tensor.dtype)).eps for tensor in plan.tensors if tensor.dtype[0] in "FB"
        )
        if verification.written.relative > _ROUNDINGS * precision:
            moved = verification.written.relative
            raise TltError(
                f"verification failed: rounded to the output's dtype, logits move by {moved:.1e} of their deviation; "
                "nothing was written; take a finer --dtype"
            )


def planned_values(plan: Plan, values: Tensors) -> Callable[[str], Tensor]:
    """What reads a tensor of the plan by its name, computed or as it is in the source."""
    planned = {tensor.name: tensor for tensor in plan.tensors}

    def read(name: str) -> Tensor:
        tensor = planned[name]
        return values.read(tensor.source) if tensor.compute is None else torch.cat(list(tensor.compute(values)))

    return read


def planned_decoder(
    plan: Plan, fitted: Fit, values: Tensors, *, dtype: torch.dtype, as_stored: bool = False
) -> Decoder:
    """The model that a plan will write, computed tensor by tensor as it runs; `as_stored` rounds each to its dtype in
    the file, for what the file itself must compute."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    read = planned_values(plan, values)

    def fetch(name: str) -> Tensor:
        return stored(name, read(name))

    def stored(name: str, value: Tensor) -> Tensor:
        return value.to(torch_dtype(planned[name].dtype)) if as_stored else value

    def fetch_rows(name: str, ids: Tensor) -> Tensor:
        return stored(name, computed_rows(name, ids))

    def computed_rows(name: str, ids: Tensor) -> Tensor:
        tensor = planned[name]
        if tensor.compute is None:
            return read(name).flatten(0, -2)[ids.cpu()]
        rows, start, wanted = [], 0, ids.cpu()
        for block in tensor.compute(values):
            if len(wanted) and start > int(wanted[-1]):  # they ascend: what comes after is not asked for
                break
            found = block.flatten(0, -2)  # words are counted through all parts
            inside = wanted[(wanted >= start) & (wanted < start + len(found))]
            rows.append(found[inside - start])
            start += len(found)
        return torch.cat(rows)

    description = describe(fitted)
    return decoder_class(description).stream(description, fetch, fetch_rows, dtype=dtype)
