"""Several checkpoints as one: every tensor under its own name behind the number of the checkpoint that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tlt_cli.checkpoint.files import OpenFiles
from tlt_cli.checkpoint.lazy import Checkpoint


def numbered(number: int, name: str) -> str:
    """What tensor `name` of checkpoint `number`, counted from 0, is called in all of them together.

    >>> numbered(1, "model.norm.weight")
    '2:model.norm.weight'
    """
    return f"{number + 1}:{name}"


def together(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """All tensors of some checkpoints as one to read and copy from. What lies beside the weights is the first one's."""
    first = checkpoints[0]
    tensors, paths, shards = {}, dict[str, Path](), list[str]()
    for number, one in enumerate(checkpoints):
        for shard in one.shards:
            shards.append(numbered(number, shard))
            if one._files is not None:
                paths[numbered(number, shard)] = one._files.path(shard)
        for name, info in one.tensors.items():
            own = numbered(number, name)
            tensors[own] = replace(info, name=own, file=numbered(number, info.file))
    known = all(one._files is not None for one in checkpoints)
    return Checkpoint(
        source=", ".join(one.source for one in checkpoints),
        location=first.location,
        config=first.config,
        tensors=tensors,
        metadata=first.metadata,
        shards=tuple(shards),
        companions=first.companions,
        lineage=first.lineage,
        repository=first.repository,
        revision=first.revision,
        card=first.card,
        parents=tuple(checkpoints),
        _files=OpenFiles(paths) if known else None,
    )


def in_place_of(whole: Checkpoint, checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """As `together`, of what was made of the parts of `whole`: that is where all of it comes from."""
    joined = together(checkpoints)
    return replace(whole, tensors=joined.tensors, shards=joined.shards, parents=(whole,), _files=joined._files)
