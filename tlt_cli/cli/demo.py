"""`tlt demo`: the tour of all commands, on a model made on the spot."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from tlt_cli.cli.console import Output as Out
from tlt_cli.cli.options import Json, Output, Quiet, Seed, Verbose

EXAMPLES = """
Examples:

tlt demo

tlt demo -o tour && tlt generate tour/small --prompt "The "

tlt demo --steps 20 --json | jq .verdict
"""

Steps = Annotated[
    int, typer.Option("--steps", min=1, metavar="N", help="Steps of the first training, and of the one after growing.")
]


def demo(
    steps: Steps = 400,
    output: Output = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """See it all on a model made on the spot: no download, about two minutes on two cores.

    Trains a tiny model on the text that every Python carries, grows it by every method, shows that nothing was lost
    and that it trains on. -o keeps the models, in a new folder.
    """
    from tlt_cli.cli.console import DONE, FAILED
    from tlt_cli.cli.tour import tour

    out = Out(json=json, quiet=quiet, verbose=verbose)
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(TemporaryDirectory(prefix="tlt-demo-")))
        found = tour(folder, steps=steps, seed=seed, out=out)
    out.result(found.report, table=found.table)
    if not json:
        out.summary(found.verdict)
    return DONE if found.kept else FAILED
