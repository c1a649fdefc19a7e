"""`tlt fold`: what a surgery has split becomes plain matrices again, in a checkpoint of the family."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_cli.cli.console import Output as Out
from tlt_cli.cli.options import (
    Axis,
    DryRun,
    Dtype,
    Family,
    Force,
    Jobs,
    Json,
    MaxShardSize,
    Output,
    Quiet,
    Seed,
    Source,
    Verbose,
    Verify,
)

if TYPE_CHECKING:
    from tlt_cli.cli.execute import Outcome

EXAMPLES = """
Examples:

tlt fold factored -o plain

tlt fold factored --dtype bfloat16 --json | jq .verification.kl
"""


def fold(
    source: Source,
    output: Output = None,
    force: Force = False,
    dry_run: DryRun = False,
    max_shard_size: MaxShardSize = None,
    verify: Verify = True,
    jobs: Jobs = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    family: Family = None,
    axis: Axis = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Multiply low-rank factors out: the stock model that computes the same.

    The output is no smaller than the model that was factored; it needs no code of its own.
    """
    out = Out(json=json, quiet=quiet, verbose=verbose)
    outcome = fold_checkpoint(
        source, output, out=out, family=family, axes=axis, dtype=dtype, force=force, dry_run=dry_run,
        max_shard_size=max_shard_size, jobs=jobs, verify=verify, seed=seed,
    )  # fmt: skip
    outcome.show(out)


def fold_checkpoint(
    source: str,
    output: Path | None,
    *,
    out: Out,
    family: str | None = None,
    axes: Sequence[str] | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    verify: bool = True,
    seed: int = 0,
) -> Outcome:
    """Fold `source` and write it; without an `output` under a name made of the source's.

    Notes and progress go to `out`. Raises TltError, with nothing written, where there is nothing to fold, and where the
    folded model does not compute what the factored one does. `seed` is that of the tokens to verify on.
    """
    from tlt_cli.checkpoint.ranks import joined
    from tlt_cli.checkpoint.reader import open_checkpoint
    from tlt_cli.checkpoint.record import source_name
    from tlt_cli.checkpoint.writer import check_target
    from tlt_cli.cli.execute import Writing, carry_out, derived_output, retyped
    from tlt_cli.cli.opening import opened, parse_dtype
    from tlt_cli.model.modeling import MODELING
    from tlt_cli.surgery.fold import fold as folded
    from tlt_cli.surgery.verify import check, sample_tokens
    from tlt_cli.surgery.verify import verify as verified

    with joined() as team:
        with team.together():  # what one of several ranks refuses, all do
            kind = None if dtype is None else parse_dtype(dtype)
            checkpoint, fitted = opened(source, out=out, family=family, axes=axes, values=not dry_run)
            plan = retyped(folded(fitted, {name: info.dtype for name, info in checkpoint.tensors.items()}), kind)
            needless = tuple(path for path in checkpoint.companions if path.name != MODELING)
            checkpoint = replace(checkpoint, companions=needless)
            writing = Writing(
                output=output or derived_output(checkpoint, "folded"), force=force, dry_run=dry_run,
                max_shard_size=max_shard_size, jobs=jobs,
            )  # fmt: skip
            check_target(writing.output, checkpoint, force=force)

        def compared(staged: Path) -> dict[str, Any]:
            found = verified(
                fitted, plan, checkpoint, sample_tokens(fitted, seed=seed), written=open_checkpoint(staged)
            )
            check(plan, found)
            report = {"relative": found.computed.relative, "bound": found.bound, **asdict(found.computed)}
            if found.written is not None:
                report["written"] = {"relative": found.written.relative, **asdict(found.written)}
            return report

        words = ["tlt", "fold", source_name(checkpoint), *(["--dtype", kind.lower()] if kind else [])]
        words += ["--family", Path(family).name] if family else []
        words += ["--max-shard-size", max_shard_size] if max_shard_size else []
        before = sum(prod(checkpoint.tensors[name].shape) for name in fitted.places)
        return carry_out(
            plan, checkpoint, out=out, writing=writing, command=shlex.join(words),
            changes=[
                ("factored matrices", str(plan.details["folded"]), "0"),
                ("parameters", f"{before:,}", f"{plan.parameters:,}"),
            ],
            verify=compared if verify and checkpoint.location is not None else None,
        )  # fmt: skip
