"""A trained model as a checkpoint, by the same writer as every surgery's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tlt_cli
from tlt_cli.checkpoint import record
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.checkpoint.writer import parse_size, write
from tlt_cli.model.decoder import Decoder

_NOTHING = Checkpoint("nothing", None, None, {}, {}, (), (), None)
_SHARD = parse_size("5GB")


def save(
    decoder: Decoder,
    folder: Path,
    *,
    config: Mapping[str, Any],
    command: str,
    source: Checkpoint | None = None,
    details: Mapping[str, Any] = {},
) -> None:
    """Write the decoder's weights in float32 to a new folder, with config.json, and with the lineage of `source`.

    `source` is the checkpoint that training started from, None where it started from random weights; files beside it
    go along. Raises TltError where the folder exists or cannot be written.
    """
    tensors = [
        PlannedTensor(name, tuple(parameter.shape), "F32", name, partial(_value, parameter))
        for name, parameter in decoder.named_parameters()
    ]
    files: dict[str, Path | bytes] = {}
    if source is None:
        lineage = {
            "version": tlt_cli.__version__, "operation": "train", "command": command, "parents": [],
            "details": dict(details), "history": [],
        }  # fmt: skip
    else:
        lineage = record.lineage(source, operation="train", command=command, details=details)
        files = {**record.companions(source), "README.md": record.model_card(source, lineage, changes=()).encode()}
    write(
        folder, tensors, source or _NOTHING, config=config, metadata=record.metadata(lineage), files=files,
        max_shard_size=_SHARD,
    )  # fmt: skip


def _value(parameter: torch.nn.Parameter, _: Tensors) -> Iterable[torch.Tensor]:
    yield parameter.detach().cpu()
