"""`tlt grow`: a larger model that computes what the small one does, ready to be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlt_cli.cli.console import Output as Out
from tlt_cli.cli.options import (
    Axis,
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
    TokenizerFrom,
    Verbose,
    Verify,
)  # fmt: skip

EXAMPLES = """
Examples:

tlt grow small.safetensors --to-dim 512

tlt grow model --to-layers 24 --to-ffn 8192 -o larger

tlt grow model --to-dim 512 --method rotate --dry-run --json
"""
_SIZES, _HOW = "What to grow", "How"


def _size(name: str, what: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        f"--to-{name}", min=1, metavar="N", rich_help_panel=_SIZES, help=what
    )
    return option


ToDim = Annotated[int | None, _size("dim", "Width of the residual stream; ffn and heads follow where they can.")]
ToFfn = Annotated[int | None, _size("ffn", "Inner width of the feed-forward layers.")]
ToHeads = Annotated[int | None, _size("heads", "Query heads.")]
ToKvHeads = Annotated[int | None, _size("kv-heads", "Key/value heads.")]
ToHeadDim = Annotated[int | None, _size("head-dim", "Entries of one head.")]
ToLayers = Annotated[int | None, _size("layers", "Blocks.")]
ToVocab = Annotated[int | None, _size("vocab", "Tokens; new ones start as the mean token.")]
Method = Annotated[
    str, typer.Option("--method", metavar="NAME", rich_help_panel=_HOW, help="identity, duplicate, spectral or rotate.")
]
Fill = Annotated[
    str | None,
    typer.Option(
        "--fill", metavar="NAME", rich_help_panel=_HOW,
        help="What new coordinates read: random, spectral or zero. Default: spectral for that method, else random.",
    ),
]  # fmt: skip
Noise = Annotated[
    float,
    typer.Option(
        "--noise", metavar="S", rich_help_panel=_HOW, help="Size of the fill: 1 is that of the matrix's own weights."
    ),
]
Split = Annotated[
    float, typer.Option("--split", metavar="X", rich_help_panel=_HOW, help="Share that the first of two copies keeps.")
]
Depth = Annotated[
    str,
    typer.Option(
        "--depth", metavar="NAME", rich_help_panel=_HOW,
        help="New layers: identity keeps the function; stack and interpose do not.",
    ),
]  # fmt: skip
OptimizerState = Annotated[
    Path | None,
    typer.Option(
        "--optimizer-state", metavar="DIR", rich_help_panel=_HOW,
        help="Grow AdamW's moments too: DIR/optimizer.safetensors, with <parameter>.exp_avg and .exp_avg_sq.",
    ),
]  # fmt: skip


def grow(
    source: Source,
    to_dim: ToDim = None,
    to_ffn: ToFfn = None,
    to_heads: ToHeads = None,
    to_kv_heads: ToKvHeads = None,
    to_head_dim: ToHeadDim = None,
    to_layers: ToLayers = None,
    to_vocab: ToVocab = None,
    method: Method = "duplicate",
    fill: Fill = None,
    noise: Noise = 1.0,
    split: Split = 0.5,
    depth: Depth = "identity",
    optimizer_state: OptimizerState = None,
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
    """Make a model larger without changing what it computes.

    Any size on any axis, alone or together. Merged models grow one by one: sizes are those of each. --data is a text to
    verify on, besides random tokens.
    """
    from tlt_cli.cli.opening import hashing

    opened = source if dry_run else hashing(source)
    from tlt_cli.cli.growing import grow_checkpoint
    from tlt_cli.surgery.grow import Recipe
    from tlt_cli.surgery.targets import Sizes

    out = Out(json=json, quiet=quiet, verbose=verbose)
    sizes = Sizes(
        dim=to_dim, ffn=to_ffn, heads=to_heads, kv_heads=to_kv_heads, head_dim=to_head_dim, layers=to_layers,
        vocab=to_vocab,
    )  # fmt: skip
    outcome = grow_checkpoint(
        opened, output, sizes, Recipe(method=method, fill=fill, noise=noise, split=split, depth=depth, seed=seed),
        out=out, optimizer_state=optimizer_state, data=data, tokenizer=tokenizer, family=family, axes=axis, dtype=dtype,
        force=force, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs, verify=verify,
    )  # fmt: skip
    outcome.show(out)
