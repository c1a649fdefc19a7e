"""`tlt grow`: a larger model that computes what the small one does, ready to be trained on."""

from __future__ import annotations

import json as json_module
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from tlt_cli.checkpoint.lazy import Checkpoint
    from tlt_cli.families import Fit
    from tlt_cli.surgery.grow import Growth
    from tlt_cli.surgery.plan import Plan

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

    Any size on any axis, alone or together. --data is a text to verify on, besides random tokens.
    """
    from tlt_cli.checkpoint.reader import open_checkpoint
    from tlt_cli.cli.execute import Writing, carry_out, derived_output, retyped
    from tlt_cli.cli.opening import opened, parse_dtype
    from tlt_cli.errors import UsageError
    from tlt_cli.surgery.grow import Recipe, grown
    from tlt_cli.surgery.targets import Sizes

    out = Out(json=json, quiet=quiet, verbose=verbose)
    wanted = Sizes(
        dim=to_dim, ffn=to_ffn, heads=to_heads, kv_heads=to_kv_heads, head_dim=to_head_dim, layers=to_layers,
        vocab=to_vocab,
    )  # fmt: skip
    recipe = Recipe(method=method, fill=fill, noise=noise, split=split, depth=depth, seed=seed)
    kind = None if dtype is None else parse_dtype(dtype)
    checkpoint, fitted = opened(source, out=out, family=family, axes=axis, values=not dry_run)
    growth, plan = grown(fitted, {name: info.dtype for name, info in checkpoint.tensors.items()}, wanted, recipe)
    plan = retyped(plan, kind)
    named = "-".join(f"{name.replace('_', '')}{size}" for name, size in wanted.named().items()) or method
    writing = Writing(
        output=output or derived_output(checkpoint, named), force=force, dry_run=dry_run,
        max_shard_size=max_shard_size, jobs=jobs,
    )  # fmt: skip
    files: dict[str, bytes] = {}
    if optimizer_state is not None:
        if writing.output.suffix in (".safetensors", ".st"):
            raise UsageError("--optimizer-state writes files beside the model: let -o name a folder")
        plan, files = _with_moments(plan, growth, optimizer_state)
    checked = None
    if verify and not dry_run:
        ids = _tokens(checkpoint, fitted, data, tokenizer, seed)
        checked = lambda staged: _verified(fitted, plan, checkpoint, ids, open_checkpoint(staged))  # noqa: E731
    carry_out(
        plan, checkpoint, out=out, writing=writing, command=_command(checkpoint, wanted.named(), recipe, kind),
        changes=_changes(plan, checkpoint), files=files, verify=checked,
    )  # fmt: skip


def _command(checkpoint: Checkpoint, sizes: Mapping[str, int], recipe: Any, dtype: str | None) -> str:
    """The command that makes the same bytes from the same source: no paths, no words on how to print."""
    from tlt_cli.checkpoint.record import source_name

    words = ["tlt", "grow", source_name(checkpoint)]
    for name, size in sizes.items():
        words += [f"--to-{name.replace('_', '-')}", str(size)]
    defaults = type(recipe)()
    words += ["--method", recipe.method]
    for name in ("fill", "noise", "split", "depth", "seed"):
        if getattr(recipe, name) != getattr(defaults, name):
            words += [f"--{name}", str(getattr(recipe, name))]
    return shlex.join([*words, *(["--dtype", dtype.lower()] if dtype else [])])


def _changes(plan: Plan, checkpoint: Checkpoint) -> list[tuple[str, str, str]]:
    from math import prod

    before, after = plan.details["from"], plan.details["to"]
    rows = [(name.replace("_", " "), f"{before[name]:,}", f"{after[name]:,}") for name in before]
    count = sum(prod(info.shape) for info in checkpoint.tensors.values())
    grown = sum(tensor.parameters for tensor in plan.tensors if tensor.file is None)
    return [*rows, ("parameters", f"{count:,}", f"{grown:,}")]


def _tokens(checkpoint: Checkpoint, fitted: Fit, data: list[Path] | None, tokenizer: str | None, seed: int) -> Any:
    from tlt_cli.cli.opening import tokenizer_for
    from tlt_cli.model.text import load_tokens
    from tlt_cli.surgery.verify import sample_tokens

    if not data:
        return sample_tokens(fitted, seed=seed)
    text = load_tokens(tokenizer_for(checkpoint, fitted.sizes["vocab"], tokenizer), data)
    return sample_tokens(fitted, text.ids, seed=seed)


def _verified(fitted: Fit, plan: Plan, checkpoint: Checkpoint, ids: Any, staged: Checkpoint) -> dict[str, Any]:
    from dataclasses import asdict

    from tlt_cli.surgery.verify import check, verify

    found = verify(fitted, plan, checkpoint, ids, written=staged)
    check(plan, found)
    report = {"relative": found.computed.relative, "bound": found.bound, **asdict(found.computed)}
    if found.written is not None:
        report["written"] = {"relative": found.written.relative, **asdict(found.written)}
    return report


def _with_moments(plan: Plan, growth: Growth, state: Path) -> tuple[Plan, dict[str, bytes]]:
    """The plan with the optimizer's state beside the model, and the advice on its hyperparameters as a file."""
    from dataclasses import replace

    from tlt_cli.checkpoint.reader import open_checkpoint
    from tlt_cli.surgery.optimizer import ADVICE, STATE, advice, grow_moments

    moments = grow_moments(growth, open_checkpoint(state / STATE))
    told = advice(growth)
    text = json_module.dumps(told, indent=2) + "\n"
    details = {**plan.details, "optimizer": {"file": STATE, "advice": told}}
    return replace(plan, tensors=(*plan.tensors, *moments), details=details), {ADVICE: text.encode()}
