"""Merged models factored: each of them, and what becomes of them merged again."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome, Writing
from tlt_cli.cli.factor_request import Request
from tlt_cli.cli.factoring import Opened, factor_checkpoint, factor_command, with_seconds
from tlt_cli.cli.judging import eval_text, judge
from tlt_cli.cli.part_by_part import Command, part_by_part
from tlt_cli.families import Fit


def factor_parts(
    checkpoint: Checkpoint, fitted: Fit, request: Request, *, output: Path, kind: str | None, out: Output
) -> Outcome:
    """Every one of merged models factored, and merged again; all together read the request's text."""

    def run(part: Checkpoint, output: Path, table: str | None, out: Output, dry: bool) -> Outcome:
        own = replace(
            request, output=output, family=table, axes=None, force=False, dry_run=dry, max_shard_size=None, eval=None,
            max_perplexity=None,
        )  # fmt: skip
        return factor_checkpoint(part, own, out=out)

    whole = Opened(checkpoint, fitted, checkpoint.tensors, ())
    text = eval_text(whole, request, out=out)
    writing = Writing(
        output=output, force=request.force, dry_run=request.dry_run, max_shard_size=request.max_shard_size,
        jobs=request.jobs,
    )  # fmt: skip
    begun = time.perf_counter()
    command = Command(
        operation="factor", participle="factored", words=factor_command(whole, request, kind, None), run=run,
        reads=request.reads,
        judge=None if text is None else lambda staged: judge(whole, request, text, open_checkpoint(staged)),
    )  # fmt: skip
    outcome = part_by_part(
        checkpoint, fitted, command, out=out, writing=writing, family=request.family, verify=request.verify,
        seed=request.seed,
    )  # fmt: skip
    seconds = {
        f"{number}:{matrix}": passed
        for number, part in enumerate(outcome.report["parts"], 1)
        for matrix, passed in part["matrix_seconds"].items()
    }
    return with_seconds(outcome, seconds, begun)
