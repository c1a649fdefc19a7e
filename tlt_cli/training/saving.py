"""A trained model as a checkpoint, by the same writer as every surgery's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import tlt_cli
from tlt_cli.checkpoint import record
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.checkpoint.shards import is_single_file, plan_files
from tlt_cli.checkpoint.writer import Written, parse_size, write
from tlt_cli.training.world import ALONE, World, whole

NOTHING = Checkpoint("nothing", None, None, {}, {}, (), (), None)
_SHARD = parse_size("5GB")
_STORED = {"torch.float64": "F64", "torch.float32": "F32", "torch.int64": "I64", "torch.int8": "I8"}


def save(
    tensors: Mapping[str, Tensor],
    output: Path,
    *,
    config: Mapping[str, Any],
    command: str,
    source: Checkpoint | None = None,
    details: Mapping[str, Any] = {},
    dtypes: Mapping[str, str] = {},
    files: Mapping[str, Path | bytes] = {},
    changes: Sequence[tuple[str, str, str]] = (),
    max_shard_size: int | None = None,
    force: bool = False,
    world: World = ALONE,
) -> Written:
    """Write tensors by name to a new file or folder, with config.json, and with the lineage of `source`.

    `source` is the checkpoint that training started from, None where it started from random weights; files beside it
    go along. `dtypes` are those to store in, the tensors' own where none is named. Several ranks write what each is
    given of the files; split tensors are put together for that. Raises TltError where the output exists or cannot be
    written.
    """
    values: dict[str, Tensor] = {}
    planned = [
        PlannedTensor(
            name, tuple(tensor.shape), dtypes.get(name, _STORED[str(tensor.dtype)]), name, partial(_value, values, name)
        )
        for name, tensor in tensors.items()
    ]
    lineage = trained_lineage(source, command, details)
    beside = dict(files)
    if source is not None:
        card = record.model_card(source, lineage, changes=changes)
        beside = {**record.companions(source), "README.md": card.encode(), **files}
    size = None if is_single_file(output) else max_shard_size or _SHARD
    metadata = record.metadata(lineage)
    layout = plan_files(output, planned, source or NOTHING, metadata=metadata, config=config, max_shard_size=size)
    own = {tensor.name for shard in layout.shards[world.rank :: world.size] for tensor in shard.tensors}
    for name, tensor in tensors.items():  # in the same order on every rank: putting together is done by all at once
        complete = whole(tensor.detach())
        if name in own:
            values[name] = complete.cpu()
    return write(
        output, planned, source or NOTHING, config=config, metadata=metadata, files=beside, max_shard_size=size,
        force=force,
    )  # fmt: skip


def trained_lineage(source: Checkpoint | None, command: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a training: its source's and this step, or where there is no source the beginning of one."""
    if source is not None:
        return record.lineage(source, operation="train", command=command, details=details)
    return {
        "version": tlt_cli.__version__, "operation": "train", "command": command, "parents": [],
        "details": dict(details), "history": [],
    }  # fmt: skip


def _value(values: Mapping[str, Tensor], name: str, _: Tensors) -> Iterable[Tensor]:
    yield values[name]
