"""Merged models sliced: each of them, or one that is taken out for it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome, Writing
from tlt_cli.cli.opening import fitted_like, opened, own_table
from tlt_cli.cli.part_by_part import Command, part_by_part
from tlt_cli.cli.slice_request import Request
from tlt_cli.cli.slicing import slice_checkpoint, slice_opened, text_of, which
from tlt_cli.cli.taking_out import blaming, label, nowhere, refuse_dry, refuse_glued, room_for_parts, taken_out
from tlt_cli.families import Fit
from tlt_cli.model.compare import distance
from tlt_cli.model.nested import parse_block
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.verify import sample_tokens


def slice_parts(
    checkpoint: Checkpoint, fitted: Fit, request: Request, writing: Writing, words: str, *, out: Output
) -> Outcome:
    """Every one of merged models sliced, and what is kept of them merged again."""

    def run(part: Checkpoint, output: Path, table: str | None, out: Output, dry: bool) -> Outcome:
        own = replace(
            request, output=output, family=table, axes=None, force=False, dry_run=dry, max_shard_size=None
        )  # fmt: skip
        return slice_checkpoint(part, own, out=out)

    text = text_of(checkpoint, fitted, request) if checkpoint.location is not None else None

    def lost(staged: Path) -> dict[str, Any]:
        """How far all together are from what they were, on the text."""
        assert text is not None
        written = open_checkpoint(staged)
        small = fitted_like(written, fitted)
        vocab = small.sizes["vocab"]
        ids = sample_tokens(small, text[text < vocab], seed=request.seed)[2:]
        whole = load_checkpoint(checkpoint, fitted, stream=True)(ids)[..., :vocab]
        found = distance(whole, load_checkpoint(written, small, stream=True)(ids))
        return {"lost": {"relative": found.relative, **asdict(found)}}

    command = Command(
        operation="slice", participle="sliced", words=words, run=run, reads=request.reads,
        judge=None if text is None else lost,
    )  # fmt: skip
    return part_by_part(
        checkpoint, fitted, command, out=out, writing=writing, family=request.family, verify=request.verify,
        seed=request.seed,
    )  # fmt: skip


def slice_one(
    checkpoint: Checkpoint,
    fitted: Fit,
    request: Request,
    writing: Writing,
    words: str,
    kind: str | None,
    *,
    out: Output,
) -> Outcome:
    """One of merged models taken out, and sliced."""
    assert fitted.groups is not None and request.block is not None
    number = which(fitted, parse_block(request.block))
    refuse_glued(fitted.groups, "slice", "sliced")
    if request.dry_run and request.reads is not None:
        raise refuse_dry(request.reads)
    dry, table = request.dry_run, request.family or own_table(checkpoint)
    with nullcontext(nowhere(writing.output)) if dry else room_for_parts(writing.output) as folder:
        part, _ = taken_out(
            checkpoint, fitted, number, folder / "taken", dry=dry, family=request.family, jobs=request.jobs
        )
        part = replace(part, source=checkpoint.source, parents=(checkpoint,))
        own = replace(request, block=None, family=table, axes=None)
        with blaming(label(fitted.groups, number)):
            found = opened(part, out=out, family=table)[1]
            return slice_opened(part, found, own, writing, words, kind, out=out, block=request.block)
