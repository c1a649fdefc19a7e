"""`tlt slice`: a part of a model as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlt_cli.cli.console import Output as Out
from tlt_cli.cli.options import (
    Axis,
    Block,
    Data,
    DryRun,
    Dtype,
    Family,
    Force,
    Jobs,
    Json,
    Level,
    MaxShardSize,
    Output,
    Quiet,
    Seed,
    Source,
    TokenizerFrom,
    Verbose,
    Verify,
)  # fmt: skip

EXAMPLES = """
Examples:

tlt slice model --dim 256

tlt slice model --ffn 2048 --layers 12 -o smaller

tlt slice model --size 1/4

tlt slice fractal --level 2 --block 3/16
"""
_SIZES, _HOW = "What to keep", "How"


def _size(name: str, what: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(f"--{name}", min=1, metavar="N", rich_help_panel=_SIZES, help=what)
    return option


Dim = Annotated[int | None, _size("dim", "Width of the residual stream; ffn and heads follow where they can.")]
Ffn = Annotated[int | None, _size("ffn", "Inner width of the feed-forward layers.")]
Heads = Annotated[int | None, _size("heads", "Query heads: whole groups, or as many of each group.")]
KvHeads = Annotated[int | None, _size("kv-heads", "Key/value heads, each with its query heads.")]
HeadDim = Annotated[int | None, _size("head-dim", "Entries of one head.")]
Layers = Annotated[int | None, _size("layers", "Blocks: the first ones.")]
Vocab = Annotated[int | None, _size("vocab", "Tokens: the first ones.")]
Size = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="X", rich_help_panel=_SIZES,
        help="A budget: 1/4 of the parameters, or 160000 of them; the width is found.",
    ),
]  # fmt: skip
Norm = Annotated[
    str | None,
    typer.Option(
        "--norm", metavar="NAME", rich_help_panel=_HOW,
        help="What norms see: sliced, the kept entries; masked, all, the rest zero. Default: as trained, else sliced; "
        "with --order or --refit sliced, with calibrated gains.",
    ),
]  # fmt: skip
Order = Annotated[
    str,
    typer.Option(
        "--order", metavar="NAME", rich_help_panel=_HOW,
        help="Which entries are kept: prefix, the first; importance, the most active; pca, after a rotation.",
    ),
]  # fmt: skip
Calibration = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration", metavar="TEXT", rich_help_panel=_HOW,
        help="A text to order and refit on. Default: what every Python carries.",
    ),
]  # fmt: skip
Refit = Annotated[
    bool, typer.Option("--refit", rich_help_panel=_HOW, help="Fit what remains to what each layer wrote, on the text.")
]
Context = Annotated[
    int | None,
    typer.Option("--context", min=2, metavar="N", rich_help_panel=_HOW, help="Tokens per window of the calibration."),
]


def slice(
    source: Source,
    dim: Dim = None,
    ffn: Ffn = None,
    heads: Heads = None,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = None,
    layers: Layers = None,
    vocab: Vocab = None,
    size: Size = None,
    level: Level = None,
    block: Block = None,
    norm: Norm = None,
    order: Order = "prefix",
    calibration: Calibration = None,
    refit: Refit = False,
    context: Context = None,
    data: Data = None,
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
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Cut a smaller model out of a larger one: any axis, a level, a block, or a budget.

    What is kept computes exactly what it does inside the whole, unless --order or --refit moves it.

    A model that was grown is taken back by the growth's own maps. Of merged models each is cut, or the one that --block
    names. --data is a text on which the part is compared with the whole.
    """
    from tlt_cli.cli.opening import hashing

    opened = source if dry_run else hashing(source)
    from tlt_cli.cli.slice_request import Request
    from tlt_cli.cli.slicing import slice_checkpoint
    from tlt_cli.surgery.targets import Sizes

    out = Out(json=json, quiet=quiet, verbose=verbose)
    sizes = Sizes(
        dim=dim, ffn=ffn, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=layers, vocab=vocab
    )  # fmt: skip
    request = Request(
        sizes=sizes, size=size, level=level, block=block, norm=norm, order=order, calibration=calibration, refit=refit,
        context=context, data=data, tokenizer=tokenizer, family=family, axes=axis, output=output, force=force,
        dry_run=dry_run, max_shard_size=max_shard_size, verify=verify, jobs=jobs, seed=seed, dtype=dtype,
    )  # fmt: skip
    slice_checkpoint(opened, request, out=out).show(out)
