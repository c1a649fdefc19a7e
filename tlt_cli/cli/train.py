"""`tlt train`: what surgery left to train, or a model from nothing: one loop for all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tlt_cli.cli.console import Output as Out
from tlt_cli.cli.options import (
    Axis,
    Base,
    Device,
    DryRun,
    Dtype,
    Family,
    Force,
    Json,
    MaxShardSize,
    Output,
    Quiet,
    Seed,
    TokenizerFrom,
    Verbose,
)  # fmt: skip

EXAMPLES = """
Examples:

tlt train small.safetensors --data text.txt --steps 1000 -o trained

tlt train --init llama:dim=256,layers=4 --data text.txt --epochs 1 -o made

tlt train model --data text.jsonl --lora 16 -o adapter

tlt train adapter --data text.txt --steps 500 -o longer

tlt train --init llama:dim=128,heads=4 --data text.txt --steps 1000 --nested 1/2,1/4 -o nested

tlt train model --data text.txt --steps 2000 --resume -o trained
"""
_DATA, _LENGTH, _HOW, _WHAT, _LEVELS, _TREE, _RANK, _RUN = (
    "Data", "How long", "How", "What is trained", "Models inside a model", "A tree of LoRAs", "Low rank", "On the way",
)  # fmt: skip


def _option(panel: str, name: str, what: str, kind: str = "N", **more: Any) -> typer.models.OptionInfo:
    made: typer.models.OptionInfo = typer.Option(name, metavar=kind, rich_help_panel=panel, help=what, **more)
    return made


Start = Annotated[
    str | None,
    typer.Argument(metavar="[SRC]", help="What to train: a checkpoint, or an adapter to train on. Or see --init."),
]
Init = Annotated[
    str | None,
    _option(_WHAT, "--init", "Start from random weights: FAMILY:dim=256,layers=4,... or a config.json.", "SPEC"),
]
Texts = Annotated[
    list[Path] | None,
    _option(
        _DATA, "--data",
        "Text, .jsonl, .npy, .bin (uint16) or .safetensors of ids, or a folder of them. Several: each is a stream.",
        "PATH",
    ),
]  # fmt: skip
EvalData = Annotated[
    list[Path] | None, _option(_DATA, "--eval-data", "Text to evaluate on, instead of what is held out.", "PATH")
]
HeldOut = Annotated[
    float, _option(_DATA, "--held-out", "Share of every stream that is kept back for evaluation.", "SHARE")
]
Separator = Annotated[
    str | None, _option(_DATA, "--separator", "What stands between the documents of a text file.", "TEXT")
]
Field = Annotated[str, _option(_DATA, "--field", "The field of .jsonl lines that holds the text.", "NAME")]
Mix = Annotated[
    str | None, _option(_DATA, "--mix", "Weights of the streams, such as 2,1. Default: as long as they are.", "W,W")
]

Steps = Annotated[int | None, _option(_LENGTH, "--steps", "Steps of the optimizer.", min=1)]
Epochs = Annotated[float | None, _option(_LENGTH, "--epochs", "Times to read the data instead.", "X", min=0.0)]
TokenCount = Annotated[int | None, _option(_LENGTH, "--tokens", "Tokens to read instead.", min=1)]
Batch = Annotated[int | None, _option(_LENGTH, "--batch-size", "Windows per step, over all processes.", min=1)]
BatchTokens = Annotated[int | None, _option(_LENGTH, "--batch-tokens", "Tokens per step instead.", min=1)]
MicroBatch = Annotated[
    int | None,
    _option(
        _LENGTH, "--micro-batch", "Windows at a time, where memory is short. Same result but for a tree, nearly.", min=1
    ),
]
Context = Annotated[int | None, _option(_LENGTH, "--context", "Tokens per window.", min=1)]

Rate = Annotated[
    float | None, _option(_HOW, "--lr", "Highest learning rate. Default: 1e-3; 1e-2 for LoRA and its trees.", "X")
]
Optimizer = Annotated[str, _option(_HOW, "--optimizer", "adamw or muon.", "NAME")]
Schedule = Annotated[str, _option(_HOW, "--schedule", "wsd (warm up, hold, decay), cosine or linear.", "NAME")]
WarmUp = Annotated[
    int | None, _option(_HOW, "--warm-up", "Steps of rising rate. Default: a tenth, at most 200.", min=0)
]
Decay = Annotated[int | None, _option(_HOW, "--decay", "Steps of falling rate at wsd's end. Default: a fifth.", min=0)]
WeightDecay = Annotated[
    float | None,
    _option(_HOW, "--weight-decay", "Of matrices, decoupled. Default: 0.1; 0 for LoRA and its trees.", "X"),
]
Clip = Annotated[float, _option(_HOW, "--clip", "Largest norm of the gradient; 0: any.", "X")]

Only = Annotated[
    list[str] | None,
    _option(_WHAT, "--only", "Train tensors whose names match alone, such as '*.mlp.*'.", "GLOB"),
]
Distill = Annotated[
    str | None, _option(_WHAT, "--distill", "Learn this model's next-token distribution: heal what surgery did.", "SRC")
]
DistillShare = Annotated[
    float, _option(_WHAT, "--distill-share", "Share of it in the loss; the rest is the text's own.", "X")
]
Lora = Annotated[int | None, _option(_WHAT, "--lora", "Train a LoRA of this rank beside the frozen model.", min=1)]
Alpha = Annotated[float | None, _option(_WHAT, "--alpha", "LoRA's alpha: it is scaled by alpha / rank.", "X")]
Rslora = Annotated[bool, typer.Option("--rslora", rich_help_panel=_WHAT, help="Scale by alpha / sqrt(rank) instead.")]
Targets = Annotated[
    list[str] | None,
    _option(_WHAT, "--target", "Modules with an adapter, such as '*.q_proj'. Default: all in the blocks.", "GLOB"),
]
Nested = Annotated[
    str | None,
    _option(
        _LEVELS,
        "--nested",
        "Train smaller models inside, on the first entries of all axes: shares (1/2,1/4) or widths (64,32), or none.",
        "LIST",
    ),
]
NestedLayers = Annotated[
    str | None, _option(_LEVELS, "--nested-layers", "How many layers each has, or which share of them.", "LIST")
]
NestedHeads = Annotated[
    str | None, _option(_LEVELS, "--nested-heads", "How many whole query heads each has, or which share.", "LIST")
]
NestedSample = Annotated[
    bool,
    typer.Option(
        "--nested-sample",
        rich_help_panel=_LEVELS,
        help="The whole and one of them in each step, drawn by lot: cheaper.",
    ),
]
FractalLevels = Annotated[
    int | None,
    _option(
        _LEVELS,
        "--fractal",
        "Train models side by side inside, again inside each, in so many levels with the whole; they share the batch.",
        "LEVELS",
        min=2,
    ),
]
Split = Annotated[int, _option(_LEVELS, "--split", "Into how many each model splits: 2, 4, ...", min=2)]
LevelWeights = Annotated[
    str | None, _option(_LEVELS, "--level-weights", "Weights of the levels' losses, the whole's first.", "W,W")
]
LoraTree = Annotated[
    int | None, _option(_TREE, "--lora-tree", "Train a binary tree of LoRAs of this depth instead.", "DEPTH", min=1)
]
Rank = Annotated[int, _option(_TREE, "--rank", "Rank of each of its adapters.", min=1)]
Route = Annotated[
    str, _option(_TREE, "--route", "Who goes where: prefix, running (mean so far) or token (in every block).", "NAME")
]
TreeNodes = Annotated[
    str, _option(_TREE, "--tree-nodes", "path: every node has an adapter; leaf: the leaves alone.", "NAME")
]
LeafDevices = Annotated[
    str | None, _option(_TREE, "--leaf-devices", "Refused: all leaves are one pair of matrices, on one device.", "LIST")
]

Regularizer = Annotated[
    str | None,
    _option(
        _RANK, "--regularizer", "Favour matrices that truncate well: concentration, participation or nuclear.", "NAME"
    ),
]  # fmt: skip
Strength = Annotated[float, _option(_RANK, "--strength", "How strongly.", "S")]
TargetRank = Annotated[
    int | None,
    _option(_RANK, "--target-rank", "Where it stops; nuclear: how many singular values it spares.", "R", min=1),
]
RegularizeEvery = Annotated[int, _option(_RANK, "--regularize-every", "Every so many steps, so much stronger.", min=1)]
RegularizeOnly = Annotated[
    list[str] | None, _option(_RANK, "--regularize-only", "These matrices alone; all in the blocks otherwise.", "GLOB")
]

_PREFIX = "Prefixes of the embedding"
Hierarchy = Annotated[
    str | None,
    _option(
        _PREFIX, "--hierarchy",
        "Short prefixes tell categories of tokens apart: imposed:FILE (JSON) or emergent, found by clustering.", "KIND",
    ),
]  # fmt: skip
NestedOnly = Annotated[
    str | None,
    _option(_PREFIX, "--nested-only", "embeddings: every prefix predicts the next token, as a head cut there.", "NAME"),
]
Prefixes = Annotated[
    str | None,
    _option(
        _PREFIX,
        "--prefixes",
        "Their lengths. Default: the file's, those trained before, or 1/8, 1/4, 1/2 of the width.",
        "M,M,...",
    ),
]
Clusters = Annotated[
    str | None,
    _option(
        _PREFIX,
        "--clusters",
        "Categories to find, for all prefixes or each. Default: m/2 to m at a prefix of m, by silhouette.",
        "N,N,...",
    ),
]
PrefixWeight = Annotated[float, _option(_PREFIX, "--prefix-weight", "Of each prefix in the loss.", "X")]

EvalEvery = Annotated[int | None, _option(_RUN, "--eval-every", "Steps between evaluations. Default: a tenth.", min=1)]
EvalTokens = Annotated[int, _option(_RUN, "--eval-tokens", "Most tokens of an evaluation.", min=2)]
SaveEvery = Annotated[
    int | None, _option(_RUN, "--save-every", "Steps between saved states. Default: a tenth; 0: none.", min=0)
]
Resume = Annotated[
    bool, typer.Option("--resume", rich_help_panel=_RUN, help="Go on from the last saved state, bit for bit.")
]
Precision = Annotated[
    str, _option(_RUN, "--precision", "auto: bfloat16 products on an accelerator; or float32.", "NAME")
]
Compile = Annotated[
    bool, typer.Option("--compile/--no-compile", rich_help_panel=_RUN, help="torch.compile the model: slow to start.")
]
TensorBoard = Annotated[
    Path | None, _option(_RUN, "--tensorboard", "Write curves there too; needs the package tensorboard.", "DIR")
]


def train(
    source: Start = None,
    init: Init = None,
    data: Texts = None,
    eval_data: EvalData = None,
    held_out: HeldOut = 0.05,
    separator: Separator = None,
    field: Field = "text",
    mix: Mix = None,
    steps: Steps = None,
    epochs: Epochs = None,
    tokens: TokenCount = None,
    batch_size: Batch = None,
    batch_tokens: BatchTokens = None,
    micro_batch: MicroBatch = None,
    context: Context = None,
    lr: Rate = None,
    optimizer: Optimizer = "adamw",
    schedule: Schedule = "wsd",
    warm_up: WarmUp = None,
    decay: Decay = None,
    weight_decay: WeightDecay = None,
    clip: Clip = 1.0,
    only: Only = None,
    distill: Distill = None,
    distill_share: DistillShare = 1.0,
    lora: Lora = None,
    alpha: Alpha = None,
    rslora: Rslora = False,
    target: Targets = None,
    nested: Nested = None,
    nested_layers: NestedLayers = None,
    nested_heads: NestedHeads = None,
    nested_sample: NestedSample = False,
    fractal: FractalLevels = None,
    split: Split = 4,
    level_weights: LevelWeights = None,
    lora_tree: LoraTree = None,
    rank: Rank = 8,
    route: Route = "running",
    tree_nodes: TreeNodes = "path",
    leaf_devices: LeafDevices = None,
    regularizer: Regularizer = None,
    strength: Strength = 1.0,
    target_rank: TargetRank = None,
    regularize_every: RegularizeEvery = 1,
    regularize_only: RegularizeOnly = None,
    hierarchy: Hierarchy = None,
    nested_only: NestedOnly = None,
    prefixes: Prefixes = None,
    clusters: Clusters = None,
    prefix_weight: PrefixWeight = 1.0,
    eval_every: EvalEvery = None,
    eval_tokens: EvalTokens = 65536,
    save_every: SaveEvery = None,
    resume: Resume = False,
    precision: Precision = "auto",
    compile: Compile = False,
    tensorboard: TensorBoard = None,
    base: Base = None,
    tokenizer: TokenizerFrom = None,
    family: Family = None,
    axis: Axis = None,
    output: Output = None,
    force: Force = False,
    dry_run: DryRun = False,
    max_shard_size: MaxShardSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a model, a part of it, or adapters beside it, on text.

    The same command under `torchrun` trains on several devices. A state is saved on the way, so that --resume can go on
    after any interruption; every step is written to OUTPUT.log.jsonl.
    """
    from tlt_cli.cli.training import train_model
    from tlt_cli.cli.training_request import Request

    out = Out(json=json, quiet=quiet, verbose=verbose)
    request = Request(
        source=source, init=init, data=data or (), eval_data=eval_data or (), held_out=held_out, separator=separator,
        field=field, mix=mix, steps=steps, epochs=epochs, tokens=tokens, batch_size=batch_size,
        batch_tokens=batch_tokens, micro_batch=micro_batch, context=context, lr=lr, optimizer=optimizer,
        schedule=schedule, warm_up=warm_up, decay=decay, weight_decay=weight_decay, clip=clip, only=only or (),
        distill=distill, distill_share=distill_share, lora=lora, alpha=alpha, rslora=rslora, target=target or (),
        nested=nested, nested_layers=nested_layers, nested_heads=nested_heads, nested_sample=nested_sample,
        fractal=fractal, split=split, level_weights=level_weights, lora_tree=lora_tree, rank=rank,
        route=route, tree_nodes=tree_nodes, leaf_devices=leaf_devices,
        regularizer=regularizer, strength=strength, target_rank=target_rank, regularize_every=regularize_every,
        regularize_only=regularize_only or (), hierarchy=hierarchy, nested_only=nested_only, prefixes=prefixes,
        clusters=clusters, prefix_weight=prefix_weight, eval_every=eval_every, eval_tokens=eval_tokens,
        save_every=save_every, resume=resume, precision=precision, compile=compile, tensorboard=tensorboard, base=base,
        tokenizer=tokenizer, family=family, axes=axis or (), output=output, force=force, dry_run=dry_run,
        max_shard_size=max_shard_size, device=device, seed=seed, dtype=dtype,
    )  # fmt: skip
    train_model(request, out=out).show(out)
