"""`tlt merge`: several models made one, side by side, that computes the weighted mean of what they say."""

from __future__ import annotations

from typing import Annotated

import typer

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
    Sources,
    Verbose,
    Verify,
)

EXAMPLES = """
Examples:

tlt merge one two three four -o merged

tlt merge one two --weights 1/4,3/4 -o merged.safetensors

tlt merge one two --layout stock --calibration text.txt -o dense

tlt merge one two --glue lowrank -o glued

tlt merge one two --dry-run --json | jq .sizes
"""

Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="W,W,...", help="Each model's share of the logits; they add up to 1. Default: all alike."
    ),
]

Layout = Annotated[
    str,
    typer.Option(
        "--layout", metavar="NAME",
        help="grouped: exact, as large as all models. stock: dense, of the family itself, near their mean.",
    ),
]  # fmt: skip
Vocab = Annotated[
    str,
    typer.Option(
        "--vocab", metavar="NAME",
        help="same: one tokenizer. union: all tokens of all, by their text; a model's mean token for those it lacks.",
    ),
]  # fmt: skip
Calibration = Annotated[
    list[str] | None,
    typer.Option("--calibration", metavar="TEXT", help="A text to fit norms of --layout stock on, or --glue-init fit."),
]

_GLUE = "Glue between the models"
Glue = Annotated[
    str,
    typer.Option(
        "--glue", metavar="KIND", rich_help_panel=_GLUE,
        help="none, lowrank, full or blocks: a linear map in front of every linear, to be trained and folded.",
    ),
]  # fmt: skip
GlueRank = Annotated[
    int | None,
    typer.Option("--glue-rank", min=1, metavar="R", rich_help_panel=_GLUE, help="Rank of lowrank. Default: 8."),
]
GlueInit = Annotated[
    str,
    typer.Option(
        "--glue-init", metavar="HOW", rich_help_panel=_GLUE,
        help="identity: it changes nothing yet; fit: by least squares between the models on a text.",
    ),
]  # fmt: skip


def merge(
    sources: Sources,
    weights: Weights = None,
    layout: Layout = "grouped",
    calibration: Calibration = None,
    vocab: Vocab = "same",
    glue: Glue = "none",
    glue_rank: GlueRank = None,
    glue_init: GlueInit = "identity",
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
    """Lay models of one family side by side: one model, as large as all of them, that says the mean of their logits.

    Widths, heads, depths, rotations and epsilons may differ; the tokenizer only with --vocab union. What is merged may
    be merged again.
    """
    from tlt_cli.cli.opening import hashing

    opened = list(sources) if dry_run else [hashing(source) for source in sources]
    from tlt_cli.cli.gluing import Gluing
    from tlt_cli.cli.merging import merge_checkpoints, parse_weights

    out = Out(json=json, quiet=quiet, verbose=verbose)
    outcome = merge_checkpoints(
        opened, output, out=out, weights=None if weights is None else parse_weights(weights),
        gluing=Gluing(glue, glue_rank, glue_init), family=family, axes=axis,
        dtype=dtype, force=force, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs, verify=verify, seed=seed,
        layout=layout, vocab=vocab, calibration=calibration,
    )  # fmt: skip
    outcome.show(out)
