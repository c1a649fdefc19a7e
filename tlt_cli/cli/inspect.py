"""`tlt inspect`: what a checkpoint is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlt_cli.cli.console import Output
from tlt_cli.cli.options import Axis, Family, Force, Json, Quiet, Source, TokenizerFrom, Verbose
from tlt_cli.errors import UsageError

EXAMPLES = """
Examples:

tlt inspect small.safetensors

tlt inspect org/name --json | jq .axes.hidden

tlt inspect model --toml > my.toml

tlt inspect model --heatmap maps.png --prefixes 8,16,32
"""
_PREFIXES = "Prefixes of the embedding"

Toml = Annotated[
    bool,
    typer.Option("--toml", help="Print the family table as solved for this checkpoint, to edit and give to --family."),
]
Heatmap = Annotated[
    Path | None,
    typer.Option(
        "--heatmap",
        metavar="FILE",
        rich_help_panel=_PREFIXES,
        help="Draw which tokens are alike in each prefix: .png, .svg or .pdf.",
    ),
]
Prefixes = Annotated[
    str | None,
    typer.Option(
        "--prefixes",
        metavar="M,M,...",
        rich_help_panel=_PREFIXES,
        help="Their lengths. Default: those it was trained with, or halves of the width; and the width.",
    ),
]
Categories = Annotated[
    Path | None,
    typer.Option(
        "--categories",
        metavar="FILE",
        rich_help_panel=_PREFIXES,
        help="Categories of tokens (JSON) to compare clusters with.",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        metavar="N",
        rich_help_panel=_PREFIXES,
        help="Look at the first N tokens. Default: 64, or those that are in a category.",
    ),
]


def inspect(
    source: Source,
    toml: Toml = False,
    heatmap: Heatmap = None,
    prefixes: Prefixes = None,
    categories: Categories = None,
    tokens: Tokens = None,
    tokenizer: TokenizerFrom = None,
    family: Family = None,
    axis: Axis = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Tensors, axes and their sizes, parameters, bytes, lineage.

    Only headers are read: of a repository of the hub, some kilobytes. With an option about prefixes, how tokens lie in
    the first entries of the embedding instead.
    """
    from tlt_cli.cli.adapters import adapter_of
    from tlt_cli.cli.description import describe, summary, tensor_table
    from tlt_cli.cli.family_draft import drafted_table
    from tlt_cli.cli.family_text import solved_table
    from tlt_cli.cli.opening import opened_if_known

    if toml and json:
        raise UsageError("--toml and --json are two forms of the same: give one of them")
    if force and heatmap is None:
        raise UsageError("--force says nothing without --heatmap; drop it")
    out = Output(json=json, quiet=quiet, verbose=verbose)
    if any(given is not None for given in (heatmap, prefixes, categories, tokens)):
        from tlt_cli.cli.heatmap import look_at_prefixes

        if toml:
            raise UsageError("--toml prints a family's table, which has no prefixes; ask for one thing at a time")
        report, table = look_at_prefixes(
            source, out=out, heatmap=heatmap, prefixes=prefixes, categories=categories, tokens=tokens,
            tokenizer=tokenizer, family=family, axes=axis, force=force,
        )  # fmt: skip
        out.result(report, table=table)
        if heatmap is not None:
            out.note(f"drawn: {heatmap}")
        return
    if tokenizer is not None:
        raise UsageError("--tokenizer says nothing without --prefixes, --categories, --tokens or --heatmap; drop it")
    adapter = adapter_of(source)
    if adapter is not None:
        if toml or family or axis:
            raise UsageError(
                f"{source} is a {adapter.kind}, of no family: --toml, --family and --axis go with its base"
            )
        data = {**describe(adapter.tensors, None), "source": source, "adapter": dict(adapter.data())}
        out.result(data, table=tensor_table(data))
        if not json:
            for line in (adapter.summary(), *summary(data)):
                out.summary(line)
        return
    checkpoint, fitted = opened_if_known(source, out=out, family=family, axes=axis)
    if toml:
        out.write(drafted_table(checkpoint) if fitted is None else solved_table(checkpoint, fitted))
        return
    data = describe(checkpoint, fitted)
    out.result(data, table=tensor_table(data))
    if not json:
        for line in summary(data):
            out.summary(line)
