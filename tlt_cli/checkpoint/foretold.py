"""A checkpoint that does not exist yet, known by its plan alone: headers to go on planning with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tlt_cli.checkpoint.header import TensorInfo, tensor_bytes
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import PlannedTensor
from tlt_cli.checkpoint.shards import plan_files


def foretold(
    output: Path,
    tensors: Sequence[PlannedTensor],
    values: Checkpoint,
    *,
    config: Mapping[str, Any],
    lineage: Mapping[str, Any],
    name: str,
) -> Checkpoint:
    """What opening `output` would give once it is written of `values`: called `name`, and without any value."""
    layout = plan_files(output, tensors, values, metadata={}, config={})
    infos = {
        one.name: TensorInfo(one.name, one.dtype, one.shape, shard.name, 0, tensor_bytes(one.dtype, one.shape))
        for shard in layout.shards
        for one in shard.tensors
    }
    shards = tuple(shard.name for shard in layout.shards)
    told = json.loads(json.dumps(lineage))  # as a header holds it
    return replace(
        values, source=name, config=dict(config), tensors=infos, metadata={}, shards=shards, lineage=told, parents=(),
        _files=None, _digests=dict.fromkeys(shards, ""),
    )  # fmt: skip
