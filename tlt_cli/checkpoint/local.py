"""Opening a local file or folder: every header read and checked, no tensor touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tlt_cli.checkpoint import folder
from tlt_cli.checkpoint.files import OpenFiles
from tlt_cli.checkpoint.header import PREFIX_BYTES, TensorInfo, header_length, parse_header
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.errors import TltError

Header = tuple[dict[str, TensorInfo], dict[str, str]]


def open_file(path: Path, source: str) -> Checkpoint:
    """One weight file; its config is in its metadata, or else in the config.json beside it."""
    files = OpenFiles({path.name: path})
    tensors, metadata = _read_header(files, path.name)
    config: dict[str, Any] | None
    if "config" in metadata:
        config = folder.parse_config(metadata["config"], f"{path}: __metadata__ config")
    else:
        config = _config_in(path.parent)
    return Checkpoint(
        source=source,
        location=path,
        config=config,
        tensors=tensors,
        metadata=metadata,
        shards=(path.name,),
        companions=folder.companions_of_file(path),
        lineage=lineage_in(metadata),
        _files=files,
    )


def open_folder(path: Path, source: str) -> Checkpoint:
    """A folder with one weight file, or with an index and its shards."""
    try:
        names = [entry.name if entry.is_file() else f"{entry.name} (not a file)" for entry in path.iterdir()]
        companions = folder.companions_of_folder(path)
        card = path / "README.md"
        card_text = card.read_text("utf-8", errors="replace") if card.is_file() else None
        chosen = folder.choose_weights(names, str(path))
        index = (path / chosen).read_bytes() if chosen == folder.INDEX else None
    except OSError as error:
        raise TltError(f"{path}: cannot read: {error.strerror}") from error
    where = f"{path / chosen}"
    weight_map = None if index is None else folder.parse_index(index, where, names)
    shards = (chosen,) if weight_map is None else tuple(sorted(set(weight_map.values())))
    files = OpenFiles({shard: path / shard for shard in shards})
    headers = {shard: _read_header(files, shard) for shard in shards}
    tensors, metadata = merge_headers(headers, weight_map, where)
    config = _config_in(path)
    if config is None and "config" in metadata:
        config = folder.parse_config(metadata["config"], f"{path}: __metadata__ config")
    return Checkpoint(
        source=source,
        location=path,
        config=config,
        tensors=tensors,
        metadata=metadata,
        shards=shards,
        companions=companions,
        lineage=lineage_in(metadata),
        card=card_text,
        _files=files,
    )


def merge_headers(headers: Mapping[str, Header], weight_map: Mapping[str, str] | None, where: str) -> Header:
    """The headers of all shards as one; TltError unless they hold just what the index says."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard, (shard_tensors, shard_metadata) in headers.items():
        for name, info in shard_tensors.items():
            if name in tensors:
                raise TltError(f"{where}: {name!r} is in two shards: {tensors[name].file}, {shard}")
            if weight_map is not None and weight_map.get(name) != shard:
                listed = weight_map.get(name)
                other = f"puts it in {listed}" if listed else "does not list it"
                raise TltError(f"{where}: {name!r} is in {shard}, but the index {other}")
            tensors[name] = info
        metadata = {**shard_metadata, **metadata}
    lacking = [name for name in weight_map or () if name not in tensors]
    if lacking and weight_map is not None:
        raise TltError(
            f"{where}: lists {len(lacking)} tensors that their shards lack, the first is "
            f"{lacking[0]!r}, not in {weight_map[lacking[0]]}"
        )
    return tensors, metadata


def lineage_in(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The history that tlt wrote into a file; None where there is none that can be read."""
    try:
        value = json.loads(metadata.get("tlt", ""))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_header(files: OpenFiles, file: str) -> Header:
    size, name = files.size(file), str(files.path(file))
    length = header_length(files.read(file, 0, min(size, PREFIX_BYTES)), name, size)
    raw = files.read(file, PREFIX_BYTES, length)
    tensors, metadata = parse_header(raw, name, size - PREFIX_BYTES - length)
    return {key: replace(info, file=file) for key, info in tensors.items()}, metadata


def _config_in(path: Path) -> dict[str, Any] | None:
    file = path / folder.CONFIG
    try:
        return folder.parse_config(file.read_bytes(), str(file)) if file.is_file() else None
    except OSError as error:
        raise TltError(f"{file}: cannot read: {error.strerror}") from error
