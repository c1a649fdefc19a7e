"""What every surgery does once it has a Plan: dry run or write, verify what was staged, say what became of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_cli.checkpoint import record
from tlt_cli.checkpoint.folder import SAFE_SUFFIXES
from tlt_cli.checkpoint.header import tensor_bytes
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.ranks import world_size
from tlt_cli.checkpoint.writer import check_target, parse_size, plan_files, write
from tlt_cli.cli.console import Output, Table

if TYPE_CHECKING:
    from tlt_cli.surgery.plan import Plan

_FLOATS = ("F64", "F32", "F16", "BF16")
_CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Where and how to write, as typed."""

    output: Path
    force: bool = False
    dry_run: bool = False
    max_shard_size: str | None = None
    jobs: int | None = None


def derived_output(checkpoint: Checkpoint, suffix: str) -> Path:
    """A name in the current directory, one file where the source is one: small.st -> small-SUFFIX.st."""
    name = record.source_name(checkpoint).rpartition("/")[2]
    location = checkpoint.location
    if location is not None and location.suffix in SAFE_SUFFIXES and not location.is_dir():
        return Path(f"{Path(name).stem}-{suffix}{location.suffix}")
    return Path(f"{name}-{suffix}")


def retyped(plan: Plan, dtype: str | None) -> Plan:
    """The plan with every floating-point tensor, and config.json, in another dtype; None keeps each as it is."""
    if dtype is None:
        return plan
    tensors = tuple(
        replace(tensor, dtype=dtype) if tensor.dtype in _FLOATS and tensor.file is None else tensor
        for tensor in plan.tensors
    )
    key = "dtype" if "dtype" in plan.config or "torch_dtype" not in plan.config else "torch_dtype"
    return replace(plan, tensors=tensors, config={**plan.config, key: _CONFIG_DTYPES[dtype]})


def carry_out(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    out: Output,
    writing: Writing,
    command: str,
    changes: Sequence[tuple[str, str, str]],
    files: Mapping[str, bytes] = {},
    verify: Callable[[Path | None], Mapping[str, Any]] | None = None,
) -> None:
    """Write the plan and report it; with --dry-run say what would be written, after the same checks.

    `verify` is given the staged output, and raises to refuse it; what it returns goes into the report.
    """
    lineage = record.lineage(checkpoint, operation=plan.operation, command=command, details=plan.details)
    size = None if writing.max_shard_size is None else parse_size(writing.max_shard_size)
    report: dict[str, Any] = {"operation": plan.operation, "command": command, "source": checkpoint.source}
    report.update(plan.details, parameters=plan.parameters, exact=plan.exact, notes=list(plan.notes))
    layout = plan_files(
        writing.output, plan.tensors, checkpoint, metadata=record.metadata(lineage), config=plan.config,
        max_shard_size=size,
    )  # fmt: skip
    for note in plan.notes:
        out.note(note)
    if world_size() > len(layout.shards):
        out.note(f"{world_size()} ranks share {len(layout.shards)} file(s): the others idle; try --max-shard-size")
    if writing.dry_run:
        check_target(writing.output, checkpoint, force=writing.force)
        report["dry_run"] = True
        report["files"] = [{"name": shard.name, "bytes": shard.size} for shard in layout.shards]
        report["bytes"] = layout.bytes
        report["free_bytes"] = shutil.disk_usage(writing.output.absolute().parent).free
        report["path"] = os.fspath(writing.output)
        report["tensors"] = [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "bytes": tensor_bytes(t.dtype, t.shape)}
            for t in plan.tensors
        ]
        out.report(_table(plan, changes, checkpoint, None))
        out.result(report, line=os.fspath(writing.output))
        return
    card = record.model_card(checkpoint, lineage, changes=changes, notes=plan.notes)
    extras: dict[str, Path | bytes] = {**record.companions(checkpoint), "README.md": card.encode(), **files}

    def check(staged: Path) -> None:
        if verify is not None:
            report["verification"] = dict(verify(staged))

    with out.progress(f"{plan.operation}: writing {writing.output}") as progress:
        written = write(
            writing.output, plan.tensors, checkpoint, config=plan.config, metadata=record.metadata(lineage),
            files=extras, max_shard_size=size, jobs=writing.jobs, force=writing.force, progress=progress, check=check,
        )  # fmt: skip
    report.update(path=os.fspath(written.path), bytes=written.bytes, files=list(written.files), lineage=lineage)
    out.report(_table(plan, changes, checkpoint, report.get("verification")))
    out.result(report, line=os.fspath(written.path))


def _table(
    plan: Plan,
    changes: Sequence[tuple[str, str, str]],
    checkpoint: Checkpoint,
    verification: Mapping[str, Any] | None,
) -> Table:
    before = sum(info.nbytes for info in checkpoint.tensors.values())
    after = sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in plan.tensors if tensor.file is None)
    rows: list[Sequence[str]] = [*changes, ("bytes of tensors", f"{before:,}", f"{after:,}")]
    if verification is not None:
        rows.append(("max |Δlogit| / deviation", "", f"{verification['relative']:.1e}"))
        rows.append(("KL, nats per token", "", f"{verification['kl']:.1e}"))
        if verification.get("written") is not None:
            rows.append(("  as rounded to the output's dtype", "", f"{verification['written']['relative']:.1e}"))
    return Table(("", "before", "after"), rows)
