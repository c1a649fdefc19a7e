"""`tlt eval`: perplexity, several checkpoints side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from tlt_cli.cli.console import Output, Table
from tlt_cli.cli.options import (
    Axis,
    Base,
    Block,
    Data,
    Device,
    Dtype,
    Family,
    Json,
    Level,
    Quiet,
    Sources,
    Stream,
    TokenizerFrom,
    Verbose,
)
from tlt_cli.errors import UsageError

EXAMPLES = """
Examples:

tlt eval model --data text.txt

tlt eval fractal --levels --data text.txt

tlt eval glued folded --streams --data one.txt --data two.txt

tlt eval small.safetensors big.safetensors --data text.txt --json | jq '.models[].perplexity'
"""

Context = Annotated[
    int | None,
    typer.Option("--context", min=2, metavar="N", help="Tokens per window. Default: 512, or the model's positions."),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, metavar="N", help="Windows at once. Default: what memory allows.")
]

Levels = Annotated[
    bool, typer.Option("--levels", help="Every level and block of a nested or fractal model, run in its place.")
]

Streams = Annotated[
    bool,
    typer.Option(
        "--streams", help="Every --data by itself; of a merged model also each part, and all without their glue."
    ),
]


def evaluate(
    sources: Sources,
    data: Data = None,
    context: Context = None,
    batch_size: BatchSize = None,
    levels: Levels = False,
    streams: Streams = False,
    level: Level = None,
    block: Block = None,
    base: Base = None,
    family: Family = None,
    axis: Axis = None,
    tokenizer: TokenizerFrom = None,
    device: Device = "auto",
    dtype: Dtype = None,
    stream: Stream = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Perplexity on a text: lower is better.

    Windows of --context tokens do not overlap; of each, every token but the first is scored.
    """
    from tlt_cli.cli.measuring import measure, parts, prepare

    out = Output(json=json, quiet=quiet, verbose=verbose)
    if streams:
        from tlt_cli.cli.streams import by_stream, stream_table

        if levels or level is not None or block is not None:
            raise UsageError("--streams goes without --levels, --level and --block; ask for one thing at a time")
        report = by_stream(
            sources, data, out=out, base=base, family=family, axes=axis, tokenizer=tokenizer, context=context,
            batch_size=batch_size, device=device, dtype=dtype, stream=stream,
        )  # fmt: skip
        out.result(report, table=stream_table(report))
        return
    prepared = prepare(sources, out=out, family=family, axes=axis, tokenizer=tokenizer, data=data, base=base)
    prepared = parts(prepared, levels=levels, level=level, block=block)
    models = measure(
        prepared, out=out, context=context, batch_size=batch_size, device=device, dtype=dtype, stream=stream
    )
    inner = ("part", "parameters") if levels or level is not None or block is not None else ()
    columns = ("source", *inner, "perplexity", "nll", "tokens", "context", "corpus_sha256", "tokenizer")
    table = Table(columns, [[model.get(column) for column in columns] for model in models])
    out.result(models[0] if len(models) == 1 else {"models": models}, table=table)
