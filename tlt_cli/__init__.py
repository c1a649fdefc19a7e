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
    quiet: bool = False,
) -> Decoder:
    """A checkpoint as a torch module: ids [B, T] in, logits [B, T, V] out.

    `source` is a .safetensors file, a folder or a repository of the hub; `axes` gives what shapes cannot tell, such as
    {"kv": 4}. Its parameters are named as in the file. With `stream` nothing is held in memory and nothing can be
    trained. Notes go to stderr, unless `quiet`. Raises TltError for whatever cannot be read.
    """
    from tlt_cli.cli.console import Output
    from tlt_cli.cli.opening import load_decoder, opened

    checkpoint, fitted = opened(fspath(source), out=Output(quiet=quiet), family=family, axes=_typed(axes))
    return load_decoder(checkpoint, fitted, device=device, dtype=dtype, stream=stream)


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


def fold(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
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
    """Multiply low-rank factors out into plain matrices: `tlt fold`, and what it prints with --json as a dict.

    `output` is a .safetensors file or a folder. The dict has, among others, path, parameters, bytes, and verification:
    max_logit, relative (in deviations of the logits), bound, and kl (nats per token). Raises TltError, with nothing
    written, where there is nothing to fold or the folded model would compute something else.
    """
    from tlt_cli.cli.console import Output
    from tlt_cli.cli.fold import fold_checkpoint

    outcome = fold_checkpoint(
        fspath(source), Path(output), out=Output(quiet=quiet), family=family, axes=_typed(axes), dtype=dtype,
        force=force, dry_run=dry_run, max_shard_size=max_shard_size, jobs=jobs, verify=verify, seed=seed,
    )  # fmt: skip
    return outcome.report


def _typed(axes: Mapping[str, int] | None) -> list[str] | None:
    """Sizes of axes as they are typed on the command line."""
    return None if axes is None else [f"{axis}={size}" for axis, size in axes.items()]
