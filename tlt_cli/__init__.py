"""tlt: model surgery on transformer checkpoints.

For notebooks, what the commands do as functions:

    import tlt_cli as tlt
    report = tlt.grow("small.safetensors", "large.safetensors", to_dim=512)
    logits = tlt.load("large.safetensors")(ids)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlt_cli.model.decoder import Decoder

__all__ = ["fold", "grow", "load"]
__version__ = "0.1.0"


def load(
    source: str | PathLike[str],
    *,
    family: str | None = None,
    axes: Mapping[str, int] | None = None,
    dtype: str = "float32",
    device: str = "auto",
    stream: bool = False,
    base: str | None = None,
    level: int | None = None,
    block: str | None = None,
    quiet: bool = False,
) -> Decoder:
    """A checkpoint as a torch module: ids [B, T] in, logits [B, T, V] out.

    `source` is a .safetensors file, a folder, a repository of the hub, or an adapter's folder, which is run beside its
    base: the one that it names, or `base`. `axes` gives what shapes cannot tell, such as {"kv": 4}. Parameters have the
    names of the file. With `stream` nothing is held in memory and nothing can be trained. `level` and `block`, such as
    "2/4", name a part of the model to run in its place. Notes go to stderr, unless `quiet`. Raises TltError for
    whatever cannot be read.
    """
    from tlt_cli.cli.console import Output
    from tlt_cli.cli.opening import load_decoder, opened_with_adapter, part_of, run_part

    found = opened_with_adapter(
        fspath(source), out=Output(quiet=quiet), base=base, family=family, axes=_typed(axes)
    )  # fmt: skip
    found = part_of(found, level, block)
    decoder = load_decoder(
        found.checkpoint, found.fit, adapter=found.adapter, device=device, dtype=dtype, stream=stream
    )  # fmt: skip
    return run_part(decoder, found)


def grow(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    to_dim: int | None = None,
    to_ffn: int | None = None,
    to_heads: int | None = None,
    to_kv_heads: int | None = None,
    to_head_dim: int | None = None,
    to_layers: int | None = None,
    to_vocab: int | None = None,
    method: str = "duplicate",
    fill: str | None = None,
    noise: float = 1.0,
    split: float = 0.5,
    depth: str = "identity",
    optimizer_state: str | PathLike[str] | None = None,
    data: Sequence[str | PathLike[str]] | None = None,
    tokenizer: str | None = None,
    family: str | None = None,
    axes: Mapping[str, int] | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    verify: bool = True,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Make a model larger without changing what it computes: `tlt grow`, and what it prints with --json as a dict.

    `output` is a .safetensors file or a folder. Sizes are those of the grown model, in entries, heads, blocks and
    tokens; `noise` is in standard deviations of each matrix. The dict has, among others, path, from, to, parameters,
    bytes, notes, and verification: max_logit, relative (in deviations of the logits), bound, and kl (nats per token).
    Raises TltError, with nothing written, for what cannot be done and where the function would not be kept.
    """
    from tlt_cli.cli.console import Output
    from tlt_cli.cli.growing import grow_checkpoint
    from tlt_cli.surgery.grow import Recipe
    from tlt_cli.surgery.targets import Sizes

    sizes = Sizes(
        dim=to_dim, ffn=to_ffn, heads=to_heads, kv_heads=to_kv_heads, head_dim=to_head_dim, layers=to_layers,
        vocab=to_vocab,
    )  # fmt: skip
    outcome = grow_checkpoint(
        fspath(source), Path(output), sizes,
        Recipe(method=method, fill=fill, noise=noise, split=split, depth=depth, seed=seed),
        out=Output(quiet=quiet), optimizer_state=None if optimizer_state is None else Path(optimizer_state),
        data=None if data is None else [Path(text) for text in data], tokenizer=tokenizer, family=family,
        axes=_typed(axes), dtype=dtype, force=force, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs,
        verify=verify,
    )  # fmt: skip
    return outcome.report


def slice(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    dim: int | None = None,
    ffn: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    layers: int | None = None,
    vocab: int | None = None,
    size: str | None = None,
    level: int | None = None,
    block: str | None = None,
    norm: str | None = None,
    order: str = "prefix",
    calibration: Sequence[str | PathLike[str]] | None = None,
    refit: bool = False,
    context: int | None = None,
    data: Sequence[str | PathLike[str]] | None = None,
    tokenizer: str | None = None,
    family: str | None = None,
    axes: Mapping[str, int] | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    verify: bool = True,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Cut a smaller model out of a larger one: `tlt slice`, and what it prints with --json as a dict.

    Sizes are those of the part; `size` is a budget ("1/4" of the parameters, or "160000"), `level` and `block` ("2/4")
    name a part whole. The dict has, among others, path, from, to, norm, rules, parameters, bytes, notes, and
    verification: max_logit, relative (in deviations of the logits), bound, kl (nats per token), and with `data` lost,
    how far the part is from the whole. Raises TltError, with nothing written, for what cannot be kept exactly.
    """
    from tlt_cli.cli.console import Output
    from tlt_cli.cli.slice_request import Request
    from tlt_cli.cli.slicing import slice_checkpoint
    from tlt_cli.surgery.targets import Sizes

    sizes = Sizes(
        dim=dim, ffn=ffn, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=layers, vocab=vocab
    )  # fmt: skip
    request = Request(
        sizes=sizes, size=size, level=level, block=block, norm=norm, order=order, calibration=_paths(calibration),
        refit=refit, context=context, data=_paths(data), tokenizer=tokenizer, family=family, axes=_typed(axes),
        output=Path(output), force=force, dry_run=dry_run, max_shard_size=max_shard_size, verify=verify, jobs=jobs,
        seed=seed, dtype=dtype,
    )  # fmt: skip
    return slice_checkpoint(fspath(source), request, out=Output(quiet=quiet)).report


def factor(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    rank: int | None = None,
    keep: float | None = None,
    energy: float | None = None,
    method: str | None = None,
    calibration: Sequence[str | PathLike[str]] | None = None,
    allocate: str | None = None,
    refine: str | None = None,
    align: int = 1,
    only: Sequence[str] = (),
    format: str = "lowrank",
    bits: int | None = None,
    eval: Sequence[str | PathLike[str]] | None = None,
    context: int | None = None,
    max_perplexity: float | None = None,
    tokenizer: str | None = None,
    family: str | None = None,
    axes: Mapping[str, int] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    verify: bool = True,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Cut matrices to low rank: `tlt factor`, and what it prints with --json as a dict.

    One of `rank`, `keep` (a share of the matrices' parameters) and `energy` (a share of each one's squared singular
    values) says how small. `calibration` are texts to fit to; `eval` texts to read afterwards. The dict has, among
    others, path, ranks, keep, parameters, bytes, errors, and verification. Raises TltError, with nothing written, for
    what cannot be done.
    """
    from tlt_cli.cli.console import Output
    from tlt_cli.cli.factor_request import Request
    from tlt_cli.cli.factoring import factor_checkpoint

    request = Request(
        rank=rank, keep=keep, energy=energy, method=method, calibration=_paths(calibration), allocate=allocate,
        refine=refine, align=align, only=only, format=format, bits=bits, eval=_paths(eval), context=context,
        max_perplexity=max_perplexity, tokenizer=tokenizer, family=family, axes=_typed(axes), output=Path(output),
        force=force, dry_run=dry_run, max_shard_size=max_shard_size, verify=verify, jobs=jobs, seed=seed,
        device=device, dtype=dtype,
    )  # fmt: skip
    return factor_checkpoint(fspath(source), request, out=Output(quiet=quiet)).report


def merge(
    sources: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    layout: str = "grouped",
    vocab: str = "same",
    glue: str = "none",
    glue_rank: int | None = None,
    glue_init: str = "identity",
    calibration: Sequence[str | PathLike[str]] | None = None,
    family: str | None = None,
    axes: Mapping[str, int] | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    verify: bool = True,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Lay models side by side as one that says the mean of their logits: `tlt merge`, and what it prints with --json.

    `layout` is "grouped", or "stock" for a dense model near that mean; `vocab` is "same", or "union" for tokenizers
    that differ. `glue` (lowrank, full or blocks) is put between the models and starts as `glue_init` says: as the
    identity, or fitted on the texts of `calibration`. `weights` are each one's share, and add up to 1; all alike where
    none are given. The dict has, among others, path, models, sizes, parameters, bytes, notes, and verification:
    max_logit, relative (in deviations of the logits), bound, and kl (nats per token). Raises TltError, with nothing
    written, for models that cannot lie side by side.
    """
    from tlt_cli.cli.console import Output
    from tlt_cli.cli.gluing import Gluing
    from tlt_cli.cli.merging import merge_checkpoints

    outcome = merge_checkpoints(
        [fspath(source) for source in sources], Path(output), out=Output(quiet=quiet), weights=weights,
        gluing=Gluing(glue, glue_rank, glue_init), calibration=_paths(calibration), family=family,
        axes=_typed(axes), dtype=dtype, force=force, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs,
        verify=verify, seed=seed, layout=layout, vocab=vocab,
    )  # fmt: skip
    return outcome.report


def train(
    source: str | PathLike[str] | None,
    output: str | PathLike[str],
    *,
    data: Sequence[str | PathLike[str]] | None = None,
    axes: Mapping[str, int] | None = None,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train a model, a part of it, or an adapter: `tlt train`, and what it prints with --json as a dict.

    `source` is None with `init="llama:dim=256,layers=4"`. `options` are those of the command under their own names,
    such as steps, lr, batch_size, context, lora, only, regularizer, distill, resume, seed. The dict has, among others,
    path, recipe, trained, data, and evaluation: the loss on the text held out, nats per token. Raises TltError for what
    cannot be done.
    """
    from tlt_cli.cli.console import Output
    from tlt_cli.cli.training import train_model
    from tlt_cli.cli.training_request import Request

    request = Request(
        source=None if source is None else fspath(source), output=Path(output), data=_paths(data) or (),
        axes=_typed(axes) or (), **options,
    )  # fmt: skip
    return train_model(request, out=Output(quiet=quiet)).report


def fold(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    leaf: int | None = None,
    base: str | None = None,
    family: str | None = None,
    axes: Mapping[str, int] | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    verify: bool = True,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Multiply low-rank factors or an adapter out into plain matrices: `tlt fold`, and what it prints with --json.

    Of a tree of LoRAs `leaf` says which; `base` is an adapter's where it names none. `output` is a .safetensors file or
    a folder. The dict has, among others, path, parameters, bytes, and verification: max_logit, relative (in deviations
    of the logits), bound, and kl (nats per token). Raises TltError, with nothing written, where there is nothing to
    fold or the folded model would compute something else.
    """
    from tlt_cli.cli.console import Output
    from tlt_cli.cli.fold import fold_checkpoint

    outcome = fold_checkpoint(
        fspath(source), Path(output), out=Output(quiet=quiet), leaf=leaf, base=base, family=family, axes=_typed(axes),
        dtype=dtype, force=force, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs, verify=verify, seed=seed,
    )  # fmt: skip
    return outcome.report


def _typed(axes: Mapping[str, int] | None) -> list[str] | None:
    """Sizes of axes as they are typed on the command line."""
    return None if axes is None else [f"{axis}={size}" for axis, size in axes.items()]


def _paths(texts: Sequence[str | PathLike[str]] | None) -> list[Path] | None:
    return None if texts is None else [Path(text) for text in texts]
