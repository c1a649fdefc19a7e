"""A planned checkpoint onto the disk: whole or not at all, the same bytes every time, in bounded memory.

The headers come first, since the plan knows every shape; then the tensors, several at a time, each at its place. Under
`torchrun` the ranks share the plan and each fills its own shards (on a disk that all of them see).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlt_cli.checkpoint import ranks
from tlt_cli.checkpoint.filling import Tally, fill, opened
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import PlannedTensor
from tlt_cli.checkpoint.shards import Layout, is_single_file, parse_size, plan_files
from tlt_cli.checkpoint.staging import (
    Stage,
    absolute,
    check_output,
    check_room,
    plain_errors,
    staged,
    sync_folder,
)

__all__ = ["Layout", "Written", "check_room", "check_target", "parse_size", "plan_files", "write"]


@dataclass(frozen=True)
class Written:
    """What was written: `files` relative to the folder `path` (or the one file's name), `bytes` of all of them."""

    path: Path
    files: tuple[str, ...]
    bytes: int
    parameters: int


def write(
    output: Path,
    tensors: Sequence[PlannedTensor],
    values: Checkpoint,
    *,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    files: Mapping[str, Path | bytes] = {},
    max_shard_size: int | None = None,
    jobs: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[Path], None] | None = None,
) -> Written:
    """Write `tensors`, computed from or copied out of `values`, as one file or a folder, by the name of `output`.

    `metadata` goes into every file's header; `config` into config.json, or a single file's header. `files` are
    relative names with a file to copy or a content; a single file has no place for them. `max_shard_size` counts bytes
    of tensors per file (None: files like the source's). `jobs` tensors are worked on at once (None: one per core).
    `progress` is told the bytes done and all bytes, from any thread. `check` gets the path of the complete output
    before it takes its name, and refuses it by raising.

    Under `torchrun` every rank must call this; `check` runs on rank 0 alone, `progress` counts a rank's own bytes.
    Raises TltError, with nothing written and what existed untouched, for whatever goes wrong.
    """
    layout = plan_files(output, tensors, values, metadata=metadata, config=config, max_shard_size=max_shard_size)
    extras = {} if is_single_file(output) else dict(files)
    assert not {*extras} & {*layout.texts, *(shard.name for shard in layout.shards)}
    wanted = layout.bytes + sum(_size(content) for content in extras.values())
    with ranks.joined() as team, ExitStack() as cleanup:
        stage = Stage(absolute(output))
        leads = team.rank == 0
        with team.together():
            if leads:
                check_target(output, values, force=force)
                stage = cleanup.enter_context(staged(stage.output, force=force))
                check_room(output, wanted)
                if not is_single_file(output):
                    with plain_errors(stage.path):
                        stage.path.mkdir()
        folder = stage.folder if is_single_file(output) else stage.path
        own = layout.shards[team.rank :: team.size]
        total = sum(shard.size - len(shard.header) for shard in own)
        with team.together(), opened(own, folder) as opened_shards:
            fill(opened_shards, values, jobs=jobs or ranks.jobs_per_rank(), tally=Tally(total, progress))
        with team.together():
            if leads:
                for name, content in (*extras.items(), *layout.texts.items()):
                    _put(folder, name, content)
                with plain_errors(output):
                    sync_folder(folder)
                if check is not None:
                    check(stage.path)
                stage.commit(force=force)
    names = [*(shard.name for shard in layout.shards), *layout.texts, *extras]
    return Written(output, tuple(sorted(names)), wanted, layout.parameters)


def check_target(output: Path, values: Checkpoint, *, force: bool) -> None:
    """TltError if `output` may not be written: it is or touches the input, or exists and `force` is not given."""
    sources = []
    for one in values.parents or (values,):
        if one.location is not None:
            sources.append(one.location)
            if one.location.is_dir():  # files of a folder may be links to elsewhere
                sources.extend(one.location / shard for shard in one.shards)
    check_output(output, sources, force=force)


def _put(folder: Path, name: str, content: Path | bytes) -> None:
    """One file that is not weights: its content, or a copy of what lies at a path."""
    path = folder / name
    assert folder in path.parents and ".." not in path.parts
    with plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as target:
            if isinstance(content, bytes):
                target.write(content)
            else:
                with content.open("rb") as source:
                    shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
        if path.parent != folder:
            sync_folder(path.parent)


def _size(content: Path | bytes) -> int:
    if isinstance(content, bytes):
        return len(content)
    with plain_errors(content):
        return content.stat().st_size
