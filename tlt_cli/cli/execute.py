"""What every surgery does once it has a Plan: dry run or write, verify what was staged, say what became of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_cli.checkpoint import record
from tlt_cli.checkpoint.folder import SAFE_SUFFIXES
from tlt_cli.checkpoint.header import tensor_bytes
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.ranks import world_size
from tlt_cli.checkpoint.shards import Layout, is_single_file, parse_size, plan_files
from tlt_cli.checkpoint.staging import check_room, free_space
from tlt_cli.checkpoint.writer import check_target, write
from tlt_cli.cli.console import Output, Table
from tlt_cli.errors import TltError, UsageError

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


@dataclass(frozen=True)
class Outcome:
    """What became of a plan: `report` is everything, JSON-able, its "path" where the output is or would be; `table` is
    the same for a person. `plan` is that plan, where there was one."""

    report: dict[str, Any]
    table: Table
    plan: Plan | None = None

    def show(self, out: Output) -> None:
        """The closing table to stderr, and the path or the JSON object to stdout."""
        out.report(self.table)
        out.result(self.report, line=self.report["path"])


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
    keys = [key for key in ("dtype", "torch_dtype") if key in plan.config] or ["dtype"]
    name = _CONFIG_DTYPES[dtype]
    changed: dict[str, Any] = {key: name for key in keys if plan.config.get(key) != name}
    details = {**plan.details, "config": {**plan.details.get("config", {}), **changed}}
    return replace(plan, tensors=tensors, config={**plan.config, **changed}, details=details)


def carry_out(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    out: Output,
    writing: Writing,
    command: str,
    changes: Sequence[tuple[str, str, str]],
    files: Mapping[str, bytes] = {},
    verify: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Outcome:
    """Write the plan; with --dry-run find out what would be written, after the same checks. Notes and progress go to
    `out`, the outcome is for the caller to show.

    `verify` is given the staged output, and raises to refuse it; what it returns goes into the report.
    """
    check_target(writing.output, checkpoint, force=writing.force)
    size = None if writing.max_shard_size is None else shard_size(writing.max_shard_size)
    lineage = record.lineage(checkpoint, operation=plan.operation, command=command, details=plan.details)
    layout = plan_files(
        writing.output, plan.tensors, checkpoint, metadata=record.metadata(lineage), config=plan.config,
        max_shard_size=size,
    )  # fmt: skip
    extras: dict[str, Path | bytes] = {}
    if not is_single_file(writing.output):
        card = record.model_card(checkpoint, lineage, changes=changes, notes=plan.notes)
        extras = {**record.companions(checkpoint), "README.md": card.encode(), **files}
    put_code(extras, plan.config, writing.output, out)
    for note in plan.notes:
        out.note(note)
    if world_size() > len(layout.shards):
        out.note(f"{world_size()} ranks share {len(layout.shards)} file(s): the others idle; try --max-shard-size")
    listed, before = _files(layout, extras), checkpoint.config or {}
    report: dict[str, Any] = {
        "operation": plan.operation, "command": command, "source": checkpoint.source,
        "path": os.fspath(writing.output), **plan.details,
        "config": {key: value for key, value in plan.config.items() if key not in before or before[key] != value},
        "parameters": plan.parameters, "exact": plan.exact,
        "notes": list(plan.notes), "files": listed, "bytes": sum(file["bytes"] for file in listed), "lineage": lineage,
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "bytes": tensor_bytes(t.dtype, t.shape)}
            for t in plan.tensors
        ],
    }  # fmt: skip
    if writing.dry_run:
        check_room(writing.output, report["bytes"])
        report.update(dry_run=True, free_bytes=free_space(writing.output)[1])
        if checkpoint.location is None:
            out.note("the repository's other files would be copied too; they are not counted here")
        return Outcome(report, _table(plan, changes, checkpoint, None), plan)

    def check(staged: Path) -> None:
        if verify is not None:
            report["verification"] = dict(verify(staged))

    with out.progress(f"{plan.operation}: writing {writing.output}") as progress:
        write(
            writing.output, plan.tensors, checkpoint, config=plan.config, metadata=record.metadata(lineage),
            files=extras, max_shard_size=size, jobs=writing.jobs, force=writing.force, progress=progress, check=check,
        )  # fmt: skip
    return Outcome(report, _table(plan, changes, checkpoint, report.get("verification")), plan)


def put_code(extras: dict[str, Path | bytes], config: Mapping[str, Any], output: Path, out: Output) -> None:
    """The code that transformers runs the output by, where it is of no family; that of the source never goes along."""
    from tlt_cli.model.modeling import AUTO_MAP, MODELING, modeling_source

    extras.pop(MODELING, None)
    if config.get("auto_map") != AUTO_MAP:
        return
    if is_single_file(output):
        out.note(f"{output} has no place for {MODELING}: only tlt reads it; transformers wants a folder")
    else:
        extras[MODELING] = modeling_source()


def shard_size(text: str) -> int:
    """--max-shard-size in bytes."""
    try:
        return parse_size(text)
    except TltError as error:
        raise UsageError(f"--max-shard-size {error}") from error


def _files(layout: Layout, extras: Mapping[str, Path | bytes]) -> list[dict[str, Any]]:
    """Every file of the output with its bytes, and those of its header where it holds weights."""
    found: list[dict[str, Any]] = [
        {"name": shard.name, "bytes": shard.size, "header_bytes": len(shard.header)} for shard in layout.shards
    ]
    for name, content in (*layout.texts.items(), *extras.items()):
        found.append({"name": name, "bytes": len(content) if isinstance(content, bytes) else content.stat().st_size})
    return sorted(found, key=lambda file: file["name"])


def _table(
    plan: Plan,
    changes: Sequence[tuple[str, str, str]],
    checkpoint: Checkpoint,
    verification: Mapping[str, Any] | None,
) -> Table:
    before = sum(info.nbytes for one in checkpoint.parents or (checkpoint,) for info in one.tensors.values())
    after = sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in plan.tensors if tensor.file is None)
    rows: list[Sequence[str]] = [*changes, ("bytes of tensors", f"{before:,}", f"{after:,}")]
    verification = verification or {}
    if "error" in verification:
        rows.append(("relative error of the matrices", "", f"{verification['error']:.4g}"))
    if "perplexity" in verification:
        rows.append(("perplexity", "", f"{verification['perplexity']:.6g}"))
    if "kl" in verification:
        rows.append(("max |Δlogit| / deviation", "", f"{verification['relative']:.1e}"))
        rows.append(("KL, nats per token", "", f"{verification['kl']:.1e}"))
        if verification.get("lost") is not None:
            rows.append(("KL from the whole model on the text", "", f"{verification['lost']['kl']:.4g}"))
        if verification.get("written") is not None:
            rows.append(("  as rounded to the output's dtype", "", f"{verification['written']['relative']:.1e}"))
    return Table(("", "before", "after"), rows)
