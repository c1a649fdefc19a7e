"""What the user types. Each command has a file of its own; what it works with is imported when it runs."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from tlt_cli import __version__
from tlt_cli.cli import demo, eval, factor, fold, generate, grow, inspect, merge, slice, train
from tlt_cli.cli.console import Commands

app = typer.Typer(
    name="tlt",
    cls=Commands,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tlt {__version__}")
        raise typer.Exit


@app.callback()
def tlt(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Model surgery on transformer checkpoints.

    SRC is a .safetensors file, a folder or a repository of the hub.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("grow", epilog=grow.EXAMPLES)(grow.grow)
app.command("slice", epilog=slice.EXAMPLES)(slice.slice)
app.command("factor", epilog=factor.EXAMPLES)(factor.factor)
app.command("fold", epilog=fold.EXAMPLES)(fold.fold)
app.command("merge", epilog=merge.EXAMPLES)(merge.merge)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("eval", epilog=eval.EXAMPLES)(eval.evaluate)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)


def main() -> None:
    """The `tlt` command."""
    try:
        app(prog_name="tlt")
    finally:
        gc.freeze()  # Python looks through all objects once more at its end: of torch's that takes 0.4 s
