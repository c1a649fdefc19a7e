"""`tlt fold`: what a surgery has split becomes plain matrices again, in a checkpoint of the family."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlt_cli.cli.console import Output as Out
from tlt_cli.cli.options import (
    Axis,
    Base,
    Data,
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
from tlt_cli.errors import TltError, UsageError

if TYPE_CHECKING:
    from tlt_cli.checkpoint.lazy import Checkpoint
    from tlt_cli.cli.execute import Outcome
    from tlt_cli.families import Fit

EXAMPLES = """
Examples:

tlt fold factored -o plain

tlt fold glued -o one --data text.txt

tlt fold adapter -o merged

tlt fold tree --leaf 2 -o merged

tlt fold tree --leaf 2 --format peft -o adapter

tlt fold factored --dtype bfloat16 --json | jq .verification.kl
"""

Leaf = Annotated[
    int | None, typer.Option("--leaf", metavar="K", min=0, help="Of a tree of LoRAs, the leaf to fold, counted from 0.")
]
Format = Annotated[
    str,
    typer.Option("--format", metavar="NAME", help="model: the base with the leaf in it; peft: the leaf as an adapter."),
]


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
    leaf: Leaf = None,
    format: Format = "model",
    base: Base = None,
    data: Data = None,
    family: Family = None,
    axis: Axis = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Multiply low-rank factors out, or an adapter into its base: the stock model that computes the same.

    The output is no smaller than the model that was factored; it needs no code of its own. Glue between merged models
    is multiplied into the linears behind it, which then reach across all models. With --data the proof reads that text
    too.
    """
    out = Out(json=json, quiet=quiet, verbose=verbose)
    outcome = fold_checkpoint(
        source, output, out=out, leaf=leaf, format=format, base=base, data=data, family=family, axes=axis, dtype=dtype,
        force=force, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs, verify=verify, seed=seed,
    )  # fmt: skip
    outcome.show(out)


def fold_checkpoint(
    source: str,
    output: Path | None,
    *,
    out: Out,
    leaf: int | None = None,
    format: str = "model",
    base: str | None = None,
    data: Sequence[Path] | None = None,
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
    folded model does not compute what the factored one does. `seed` is that of the tokens to verify on, to which those
    of `data` are added.
    """
    from tlt_cli.cli.adapters import adapter_of
    from tlt_cli.cli.folding_leaf import FORMATS, export_leaf, one_leaf
    from tlt_cli.model.tree_files import LeafFolder

    if format not in FORMATS:
        raise UsageError(f"--format {format} is not known; take one of {', '.join(FORMATS)}")
    adapter = adapter_of(source)
    if adapter is not None:
        adapter = one_leaf(adapter, leaf)
    if format == "peft":
        if not isinstance(adapter, LeafFolder):
            raise UsageError(f"--format peft writes a leaf of a tree of LoRAs as an adapter, and {source} is no tree")
        if dtype is not None or max_shard_size is not None:
            raise UsageError("--dtype and --max-shard-size go with --format model; an adapter is one file in float32")
        return export_leaf(adapter, output, out=out, base=base, family=family, axes=axes, force=force, dry_run=dry_run)
    if adapter is not None and data:
        raise UsageError(f"--data is for checkpoints, and {source} is a {adapter.kind}; the proof reads random tokens")
    if adapter is not None:
        from tlt_cli.cli.folding_adapter import fold_adapter

        return fold_adapter(
            adapter, output, out=out, base=base, family=family, axes=axes, dtype=dtype, force=force, dry_run=dry_run,
            max_shard_size=max_shard_size, jobs=jobs, verified=verify, seed=seed,
            words=() if leaf is None else ("--leaf", str(leaf)),
        )  # fmt: skip
    for option, value in (("--base", base), ("--leaf", leaf)):
        if value is not None:
            raise UsageError(f"{option} goes with an adapter, and {source} is none")
    from tlt_cli.checkpoint.ranks import joined
    from tlt_cli.checkpoint.reader import open_checkpoint
    from tlt_cli.checkpoint.record import source_name
    from tlt_cli.checkpoint.writer import check_target
    from tlt_cli.cli.execute import Writing, carry_out, derived_output, retyped
    from tlt_cli.cli.opening import parse_dtype, tokenizer_for
    from tlt_cli.model.text import load_tokens
    from tlt_cli.surgery.factored_file import joined_plan
    from tlt_cli.surgery.fold import fold as folded
    from tlt_cli.surgery.fold_glue import fold_glue
    from tlt_cli.surgery.fold_parts import fold_parts
    from tlt_cli.surgery.verify import check, sample_tokens
    from tlt_cli.surgery.verify import verify as verified

    with joined() as team:
        with team.together():  # what one of several ranks refuses, all do
            kind = None if dtype is None else parse_dtype(dtype)
            checkpoint, fitted = _opened(source, out=out, family=family, axes=axes, values=not dry_run)
            if fitted is None:  # nothing can run it, but its products are what they are
                plan = retyped(joined_plan(checkpoint.tensors, checkpoint.config or {}), kind)
            else:
                dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
                factored = fitted.groups is not None and fitted.groups.factored
                way = fold_parts if factored else folded if fitted.groups is None else fold_glue
                plan = retyped(way(fitted, dtypes), kind)
            glued = fitted is not None and fitted.groups is not None and not fitted.groups.factored
            if data and fitted is None:
                raise UsageError(f"--data is for the proof, which runs the model, and no family fits {source}")
            proves = verify and fitted is not None and checkpoint.location is not None
            text = None
            if data and proves and fitted is not None:
                tokens = load_tokens(tokenizer_for(checkpoint, fitted.sizes["vocab"], None), data)
                text = tokens.ids
                for note in tokens.notes:
                    out.note(note)
            writing = Writing(
                output=output or derived_output(checkpoint, "folded"), force=force, dry_run=dry_run,
                max_shard_size=max_shard_size, jobs=jobs,
            )  # fmt: skip
            check_target(writing.output, checkpoint, force=force)

        def compared(staged: Path) -> dict[str, Any]:
            assert fitted is not None
            ids = sample_tokens(fitted, text, seed=seed)
            found = verified(fitted, plan, checkpoint, ids, written=open_checkpoint(staged))
            check(plan, found)
            return found.report()

        words = ["tlt", "fold", source_name(checkpoint), *(["--dtype", kind.lower()] if kind else [])]
        words += ["--family", Path(family).name] if family else []
        words += ["--max-shard-size", max_shard_size] if max_shard_size else []
        names = checkpoint.tensors if fitted is None else fitted.places
        before = sum(prod(checkpoint.tensors[name].shape) for name in names)
        return carry_out(
            plan, checkpoint, out=out, writing=writing, command=shlex.join(words),
            changes=[
                ("glued linears" if glued else "factored matrices", str(plan.details["folded"]), "0"),
                ("parameters", f"{before:,}", f"{plan.parameters:,}"),
            ],
            verify=compared if proves else None,
        )  # fmt: skip


def _opened(
    source: str, *, out: Out, family: str | None, axes: Sequence[str] | None, values: bool
) -> tuple[Checkpoint, Fit | None]:
    """As `opened`; without a fit where config.json says that the file is factored, but of no family that tlt knows."""
    from tlt_cli.checkpoint.reader import open_checkpoint
    from tlt_cli.cli.opening import opened, own_table
    from tlt_cli.families.choose import choose
    from tlt_cli.families.factors import dense_config, read_lowrank

    checkpoint = open_checkpoint(source, values=values, bars=out.draws)
    lowrank = read_lowrank(checkpoint.config)
    if lowrank is not None and not (family or axes or own_table(checkpoint)):
        try:
            choose({}, dense_config(checkpoint.config or {}, lowrank.stock), None)
        except TltError as error:
            out.note(str(error))
            return checkpoint, None
    return opened(checkpoint, out=out, family=family, axes=axes, values=values)
