"""The options that several commands share, each spelled and explained once.

def grow(source: Source, *, output: Output = None, json: Json = False, seed: Seed = 0) -> None: ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_WRITES, _COMPUTES, _READS, _PART = "Output", "Compute", "Reading the checkpoint", "A part whole"

Source = Annotated[
    str,
    typer.Argument(metavar="SRC", help="A .safetensors or .st file, a folder, or a repository of the hub (org/name)."),
]
Sources = Annotated[
    list[str],
    typer.Argument(metavar="SRC", help="Files, folders or repositories of the hub (org/name)."),
]

Level = Annotated[
    int | None,
    typer.Option(
        "--level", min=0, metavar="L", rich_help_panel=_PART, help="A level of a nested or fractal model: 1, 2, ..."
    ),
]
Block = Annotated[
    str | None,
    typer.Option(
        "--block", metavar="K/N", rich_help_panel=_PART, help="Block K of the N side by side, counted from 1."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="SRC", rich_help_panel=_READS, help="The model that an adapter stands beside, if it moved."
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        "--family", metavar="FILE", rich_help_panel=_READS, help="A family table of your own, or a carried one's name."
    ),
]
Axis = Annotated[
    list[str] | None,
    typer.Option(
        "--axis", metavar="NAME=SIZE", rich_help_panel=_READS, help="A size that shapes cannot tell: --axis kv=4."
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option("--data", metavar="TEXT", help="A UTF-8 text file; several are read one after the other."),
]
TokenizerFrom = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH",
        rich_help_panel=_READS,
        help="A tokenizer.json, or a folder or checkpoint that has one.",
    ),
]

Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="PATH", rich_help_panel=_WRITES, help="A .safetensors or .st file, or a folder."
    ),
]
Force = Annotated[bool, typer.Option("--force", rich_help_panel=_WRITES, help="Replace an output that exists.")]
DryRun = Annotated[bool, typer.Option("--dry-run", rich_help_panel=_WRITES, help="Say what would be, write nothing.")]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        rich_help_panel=_WRITES,
        help="Most bytes per weight file, such as 5GB. Default: sharded like the input.",
    ),
]
Verify = Annotated[
    bool,
    typer.Option("--verify/--no-verify", rich_help_panel=_WRITES, help="Compare what the output computes."),
]
Json = Annotated[bool, typer.Option("--json", rich_help_panel=_WRITES, help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", rich_help_panel=_WRITES, help="Nothing but data and errors.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", rich_help_panel=_WRITES, help="Say more on the way.")]

Seed = Annotated[
    int, typer.Option("--seed", metavar="N", rich_help_panel=_COMPUTES, help="The same seed gives the same result.")
]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", rich_help_panel=_COMPUTES, help="auto, cpu, cuda, cuda:1, ...")
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", rich_help_panel=_COMPUTES, help="bfloat16, float16, float32 or float64."),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", min=1, metavar="N", rich_help_panel=_COMPUTES, help="Tensors worked on at once."),
]
Stream = Annotated[
    bool,
    typer.Option("--stream", rich_help_panel=_COMPUTES, help="Read each tensor when it is its turn, hold none."),
]
