"""Which file each planned tensor goes to, and every byte that is not a tensor: headers, index, config.

All of it follows from the plan, so a dry run says exactly what the real run writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from tlt_cli.checkpoint.folder import CONFIG, INDEX, SAFE_SUFFIXES, SINGLE, WEIGHT_SUFFIXES
from tlt_cli.checkpoint.header import build_header, tensor_bytes
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import PlannedTensor
from tlt_cli.errors import TltError, UsageError

_SIZE = re.compile(r"(\d[\d_]*(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)


@dataclass(frozen=True)
class Shard:
    """One weight file: its first bytes, then `tensors` in the order of their bytes; `size` bytes in all."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    header: bytes
    starts: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class Layout:
    """The files of an output: weights, and by name the contents of config.json and the index."""

    shards: tuple[Shard, ...]
    texts: Mapping[str, bytes]

    @property
    def bytes(self) -> int:
        """Bytes of all files, companions and model card not counted."""
        return sum(shard.size for shard in self.shards) + sum(map(len, self.texts.values()))

    @property
    def parameters(self) -> int:
        """Stored elements of the model."""
        return sum(tensor.parameters for shard in self.shards for tensor in shard.tensors if tensor.file is None)


def is_single_file(output: Path) -> bool:
    """Whether the name of an output asks for one file; UsageError for a kind that tlt cannot write."""
    suffix = output.suffix.lower()
    if suffix in WEIGHT_SUFFIXES and suffix not in SAFE_SUFFIXES:
        raise UsageError(f"{output}: tlt writes .safetensors and .st files, or a folder, but no {suffix} files")
    return suffix in SAFE_SUFFIXES


def plan_files(
    output: Path,
    tensors: Sequence[PlannedTensor],
    values: Checkpoint,
    *,
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
    max_shard_size: int | None = None,
) -> Layout:
    """Divide `tensors` over files of at most `max_shard_size` bytes of tensors, or over files like those of `values`.

    A larger tensor gets a file of its own; tensors that name their file go there, beside the model. An empty config is
    not written.
    """
    metadata = {"format": "pt", **metadata}
    beside: dict[str, list[PlannedTensor]] = {}
    for tensor in tensors:
        if tensor.file is not None:
            beside.setdefault(tensor.file, []).append(tensor)
    tensors = [tensor for tensor in tensors if tensor.file is None]
    if is_single_file(output):
        if max_shard_size is not None:
            raise UsageError(f"{output} is one file, which cannot be sharded; name a folder, or drop --max-shard-size")
        if config:
            metadata["config"] = json.dumps(config)
        assert not beside, "a single file has nothing beside it"
        return Layout((_shard(output.name, tensors, metadata),), {})
    groups = _by_source(tensors, values) if max_shard_size is None else _by_size(tensors, max_shard_size)
    groups = groups if tensors or not beside else []  # an adapter is no model: its file stands alone
    count = len(groups)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [SINGLE][:count]
    shards = tuple(_shard(name, group, metadata) for name, group in zip(names, groups, strict=True))
    texts = {CONFIG: _json(config)} if config else {}
    if count > 1:
        texts[INDEX] = _json(_index(shards))
    return Layout((*shards, *(_shard(name, group, metadata) for name, group in beside.items())), texts)


def parse_size(text: str) -> int:
    """Bytes in "5GB", "500MB", "1_000_000" (powers of 1000, as on the hub) or "2GiB" (powers of 1024).

    >>> parse_size("1.5GB"), parse_size("2 KiB")
    (1500000000, 2048)
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match is not None:
        number, unit, binary = match.groups()
        power = "kmgt".index(unit.lower()) + 1 if unit else 0
        size = int(Decimal(number.replace("_", "")) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise TltError(f"{text!r} is not a size; wanted bytes, such as 5GB, 500MB, 2GiB or 1_000_000")
    return size


def _by_source(tensors: Iterable[PlannedTensor], values: Checkpoint) -> list[list[PlannedTensor]]:
    """Each tensor into the file of the tensor that it comes from; one that comes from none follows the one before."""
    groups: dict[str, list[PlannedTensor]] = {shard: [] for shard in values.shards}
    file = values.shards[0]
    for tensor in tensors:
        if tensor.source in values.tensors:
            file = values.tensors[tensor.source].file
        groups[file].append(tensor)
    return [group for group in groups.values() if group] or [[]]


def _by_size(tensors: Iterable[PlannedTensor], max_shard_size: int) -> list[list[PlannedTensor]]:
    """In the order of the plan, a new file whenever the next tensor would not fit."""
    groups: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor_bytes(tensor.dtype, tensor.shape)
        if groups[-1] and filled + size > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    return groups


def _shard(name: str, tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> Shard:
    header, starts = build_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], metadata)
    # An empty tensor starts where the next one does: by name then, as in the header.
    ordered = tuple(sorted(tensors, key=lambda tensor: (starts[tensor.name], tensor.name)))
    size = len(header) + sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in ordered)
    return Shard(name, ordered, header, starts, size)


def _index(shards: Sequence[Shard]) -> dict[str, Any]:
    files = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    if len(files) < sum(len(shard.tensors) for shard in shards):
        raise TltError("two tensors would be written under one name, in different shards")
    return {
        "metadata": {
            "total_parameters": sum(tensor.parameters for shard in shards for tensor in shard.tensors),
            "total_size": sum(shard.size - len(shard.header) for shard in shards),
        },
        "weight_map": dict(sorted(files.items())),
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
