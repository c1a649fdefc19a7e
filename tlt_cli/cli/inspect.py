"""`tlt inspect`: what a checkpoint is made of."""

from __future__ import annotations

from typing import Annotated

import typer

from tlt_cli.cli.console import Output
from tlt_cli.cli.options import Axis, Family, Json, Quiet, Source, Verbose
from tlt_cli.errors import UsageError

EXAMPLES = """
Examples:

tlt inspect small.safetensors

tlt inspect org/name --json | jq .axes.hidden

tlt inspect model --toml > my.toml
"""

Toml = Annotated[
    bool,
    typer.Option("--toml", help="Print the family table as solved for this checkpoint, to edit and give to --family."),
]


def inspect(
    source: Source,
    toml: Toml = False,
    family: Family = None,
    axis: Axis = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Tensors, axes and their sizes, parameters, bytes, lineage.

    Only headers are read: of a repository of the hub, some kilobytes.
    """
    from tlt_cli.cli.adapters import adapter_of
    from tlt_cli.cli.description import describe, summary, tensor_table
    from tlt_cli.cli.family_draft import drafted_table
    from tlt_cli.cli.family_text import solved_table
    from tlt_cli.cli.opening import opened_if_known

    if toml and json:
        raise UsageError("--toml and --json are two forms of the same: give one of them")
    out = Output(json=json, quiet=quiet, verbose=verbose)
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
