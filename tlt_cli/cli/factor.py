"""`tlt factor`: matrices cut down to their best low-rank factors, or a look at what every rank would cost and lose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlt_cli.cli.console import Output as Out
from tlt_cli.cli.options import (
    Axis,
    Device,
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
    TokenizerFrom,
    Verbose,
    Verify,
)

EXAMPLES = """
Examples:

tlt factor model.st --rank-sweep

tlt factor model --keep 0.8 --calibration text.txt -o smaller

tlt factor model --keep 0.8 --bits 8 -o smaller

tlt factor model --rank-sweep --eval text.txt --max-perplexity 20 -o smallest

tlt factor model --rank 8 --only '*.27.mlp.down_proj' --format dense
"""
_SIZE, _HOW, _SWEEP = "How small (one of these)", "How", "Every rank at once"


Rank = Annotated[
    int | None, typer.Option("--rank", metavar="R", rich_help_panel=_SIZE, help="The same rank for every matrix.")
]
Keep = Annotated[
    float | None,
    typer.Option("--keep", metavar="X", rich_help_panel=_SIZE, help="Share of the matrices' parameters to keep: 0.8."),
]
Energy = Annotated[
    float | None,
    typer.Option("--energy", metavar="E", rich_help_panel=_SIZE, help="Share of each matrix's energy to keep: 0.99."),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method", metavar="NAME", rich_help_panel=_HOW,
        help="svd, weighted, fisher, kfac, activation or whiten. Default: svd without a text, kfac with one.",
    ),
]  # fmt: skip
Calibration = Annotated[
    list[Path] | None,
    typer.Option("--calibration", metavar="TEXT", rich_help_panel=_HOW, help="The text that says what matters."),
]
Allocate = Annotated[
    str | None,
    typer.Option(
        "--allocate", metavar="NAME", rich_help_panel=_HOW,
        help="How --keep is shared out: uniform, or global for the least loss. Default: global where gradients are.",
    ),
]  # fmt: skip
Refine = Annotated[
    str | None,
    typer.Option(
        "--refine", metavar="NAME", rich_help_panel=_HOW,
        help="none; drift: refit each matrix behind the compressed ones; block: also each block to its output.",
    ),
]  # fmt: skip
Align = Annotated[
    int,
    typer.Option(
        "--align", min=1, metavar="N", rich_help_panel=_HOW,
        help="Ranks in multiples of N, as hardware likes them; or the matrix stays dense.",
    ),
]  # fmt: skip
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="GLOB", rich_help_panel=_HOW, help="Matrices by name; may be given several times."),
]
Format = Annotated[
    str,
    typer.Option("--format", metavar="NAME", rich_help_panel=_HOW, help="lowrank: two factors; dense: their product."),
]
Bits = Annotated[
    int | None,
    typer.Option("--bits", metavar="8", rich_help_panel=_HOW, help="Factors as 8-bit integers, a scale for each row."),
]
RankSweep = Annotated[
    bool, typer.Option("--rank-sweep", rich_help_panel=_SWEEP, help="Table what each rank costs and loses.")
]
Ranks = Annotated[
    str | None,
    typer.Option("--ranks", metavar="8,16,32", rich_help_panel=_SWEEP, help="Which. Default: up to 32 of them."),
]
Eval = Annotated[
    list[Path] | None,
    typer.Option("--eval", metavar="TEXT", rich_help_panel=_SWEEP, help="Measure the perplexity on this text as well."),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", min=2, metavar="N", rich_help_panel=_SWEEP,
        help="Tokens per window of both texts. Default: 512, or the model's positions.",
    ),
]  # fmt: skip
MaxPerplexity = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity", metavar="X", rich_help_panel=_SWEEP,
        help="Take the smallest of the sweep that reads --eval this well; exit code 1 if none does.",
    ),
]  # fmt: skip
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", rich_help_panel=_SWEEP, help="Draw it: .png, .svg or .pdf.")
]


def factor(
    source: Source,
    rank: Rank = None,
    keep: Keep = None,
    energy: Energy = None,
    method: Method = None,
    calibration: Calibration = None,
    allocate: Allocate = None,
    refine: Refine = None,
    align: Align = 1,
    only: Only = None,
    format: Format = "lowrank",
    bits: Bits = None,
    rank_sweep: RankSweep = False,
    ranks: Ranks = None,
    eval: Eval = None,
    context: Context = None,
    max_perplexity: MaxPerplexity = None,
    plot: Plot = None,
    tokenizer: TokenizerFrom = None,
    family: Family = None,
    axis: Axis = None,
    output: Output = None,
    force: Force = False,
    dry_run: DryRun = False,
    max_shard_size: MaxShardSize = None,
    verify: Verify = True,
    jobs: Jobs = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make matrices smaller: each becomes the product of two thin ones.

    Works on any checkpoint. A calibration text says which directions matter; without one all entries count alike.
    Merged models are factored one by one.
    """
    from tlt_cli.cli.factor_request import Request
    from tlt_cli.cli.factoring import factor_checkpoint
    from tlt_cli.cli.sweeping import show, sweep_checkpoint

    out = Out(json=json, quiet=quiet, verbose=verbose)
    request = Request(
        rank=rank, keep=keep, energy=energy, method=method, calibration=calibration, allocate=allocate, refine=refine,
        align=align, only=only or (), format=format, bits=bits, eval=eval, context=context,
        max_perplexity=max_perplexity, tokenizer=tokenizer,
        family=family, axes=axis, output=output, force=force, dry_run=dry_run, max_shard_size=max_shard_size,
        verify=verify, jobs=jobs, seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
    if request.sweeps(asked=rank_sweep, ranks=ranks):
        show(sweep_checkpoint(source, request, ranks=ranks, plot=plot, out=out), out)
    else:
        factor_checkpoint(source, request, plot=plot, out=out).show(out)
