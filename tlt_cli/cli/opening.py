"""From what the user typed to what code works on: a checkpoint fitted to its family, a device, a dtype, a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tlt_cli.axes import bindings
from tlt_cli.checkpoint.ranks import world_size
from tlt_cli.checkpoint.reader import Checkpoint, open_checkpoint
from tlt_cli.cli.adapters import AdapterFolder, adapter_of
from tlt_cli.cli.console import Output
from tlt_cli.errors import TltError, UsageError, nearest
from tlt_cli.families.fit import Fit, fit
from tlt_cli.families.groups import refuse_grouped
from tlt_cli.families.ties import check_ties

if TYPE_CHECKING:
    import torch

    from tlt_cli.model.decoder import Decoder
    from tlt_cli.model.nested import Level
    from tlt_cli.model.text import Tokenizer

OWN_TABLE = "tlt.toml"
_DTYPES = {
    "float32": "F32", "f32": "F32", "fp32": "F32",
    "float64": "F64", "f64": "F64", "fp64": "F64",
    "float16": "F16", "f16": "F16", "fp16": "F16",
    "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip


def opened(
    source: str | Checkpoint,
    *,
    out: Output,
    family: str | None = None,
    axes: Sequence[str] | None = None,
    values: bool = True,
) -> tuple[Checkpoint, Fit]:
    """The checkpoint, its headers read and fitted to `family`, to the folder's own tlt.toml, or to the one that fits.

    `axes` are as typed, "kv=4" each. With `values=False` of a repository of the hub only headers are fetched. What the
    user should know is noted on `out`. Raises TltError naming the source and the first tensor that does not fit.
    """
    named = source if isinstance(source, str) else source.source
    adapter = adapter_of(named)
    if adapter is not None:
        raise TltError(
            f"{named} is a {adapter.kind}, and a model is wanted: fold it into its base first, `tlt fold SRC`"
        )
    sizes = parse_axes(axes or ())
    checkpoint = open_checkpoint(source, values=values, bars=out.draws) if isinstance(source, str) else source
    fitted = _fitted(checkpoint, out=out, family=family, sizes=sizes)
    if checkpoint.location is not None:
        check_ties(checkpoint, fitted)
    return checkpoint, fitted


@dataclass(frozen=True)
class Source:
    """What SRC names: a checkpoint fitted to its family, and the adapter beside it, if SRC is one."""

    source: str
    checkpoint: Checkpoint
    fit: Fit
    adapter: AdapterFolder | None = None
    part: Level | None = None


def part_of(source: Source, level: int | None, block: str | None) -> Source:
    """The source with the part that --level and --block name, to be run in its place; as it is where they name none.

    Raises TltError where the model holds no such part.
    """
    from tlt_cli.model.nested import block_part, level_at, parse_block

    if level is None and block is None:
        return source
    if source.adapter is not None:
        raise UsageError(f"--level and --block name a part of a model, and {source.source} is a {source.adapter.kind}")
    refuse_grouped(source.fit.groups, "running a part")
    found = None if block is None else parse_block(block)
    chosen = block_part(source.fit, *found) if level is None and found else level_at(source.fit, level, found)
    return replace(source, part=chosen)


def opened_with_adapter(
    source: str,
    *,
    out: Output,
    base: str | None = None,
    family: str | None = None,
    axes: Sequence[str] | None = None,
    values: bool = True,
) -> Source:
    """As `opened`, of a checkpoint or of an adapter and its base; `base` is the --base that the user gave.

    Raises TltError where the base is not found, or is another one than the adapter was made for.
    """
    adapter = adapter_of(source)
    if adapter is not None:
        return beside_its_base(adapter, out=out, base=base, family=family, axes=axes, values=values)
    if base is not None:
        raise UsageError(f"--base goes with an adapter, and {source} is none")
    return Source(source, *opened(source, out=out, family=family, axes=axes, values=values))


def beside_its_base(
    adapter: AdapterFolder,
    *,
    out: Output,
    base: str | None = None,
    family: str | None = None,
    axes: Sequence[str] | None = None,
    values: bool = True,
) -> Source:
    """The adapter with its base, opened as `opened` does. TltError where that is not the one it was made for."""
    place = _base(adapter) if base is None else base
    try:
        checkpoint, fitted = opened(place, out=out, family=family, axes=axes, values=values)
    except TltError as error:
        if base is not None:
            raise
        raise type(error)(
            f"{adapter.source}: its base cannot be opened: {error}; name another place: --base SRC"
        ) from error
    if adapter.base_digest is not None and checkpoint.digest() != adapter.base_digest:
        raise TltError(
            f"{adapter.source}: was made for a base with the sha256 {adapter.base_digest}, but {place} has "
            f"{checkpoint.digest()}; name its own base: --base SRC"
        )
    return Source(adapter.source, checkpoint, fitted, adapter)


def _base(adapter: AdapterFolder) -> str:
    """Where the base is: as the config says it, or else as seen from the adapter's folder or from beside it."""
    if adapter.base is None:
        raise TltError(f"{adapter.source}: does not say what it adapts; name its base: --base SRC")
    for place in ("", adapter.folder, adapter.folder.parent):
        path = Path(place) / Path(adapter.base).expanduser()
        if path.exists():
            return str(path)
    return adapter.base


def hashing(source: str) -> str | Checkpoint:
    """The checkpoint of a local path, its digest already under way: a second per GB, about what importing torch takes.
    Several ranks open theirs together, later; what is on the hub has its digests from there."""
    if world_size() > 1 or not Path(source).expanduser().exists():
        return source
    checkpoint = open_checkpoint(source)
    checkpoint.begin_digest()
    return checkpoint


def opened_if_known(
    source: str | Checkpoint, *, out: Output, family: str | None, axes: Sequence[str] | None, values: bool = False
) -> tuple[Checkpoint, Fit | None]:
    """As `opened`, or headers alone; where no family fits that is noted, unless the user or the folder named one."""
    sizes = parse_axes(axes or ())
    checkpoint = open_checkpoint(source, values=values, bars=out.draws) if isinstance(source, str) else source
    try:
        return checkpoint, _fitted(checkpoint, out=out, family=family, sizes=sizes)
    except TltError as error:
        if family or sizes or own_table(checkpoint):
            raise
        out.note(str(error))
        return checkpoint, None


def fitted_like(made: Checkpoint, source: Fit) -> Fit:
    """The fit of a checkpoint that was made of a fitted one, by the same table."""
    return fit({name: info.shape for name, info in made.tensors.items()}, made.config, family=source.family)


def _fitted(checkpoint: Checkpoint, *, out: Output, family: str | None, sizes: Mapping[str, int]) -> Fit:
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    try:
        fitted = fit(shapes, checkpoint.config, family=family or own_table(checkpoint), axes=sizes)
    except TltError as error:
        raise type(error)(f"{checkpoint.source}: {error}") from error
    for note in fitted.notes:
        out.note(f"{checkpoint.source}: {note}")
    out.detail(f"{checkpoint.source}: {fitted.family.name} with {bindings(fitted.sizes)}")
    return fitted


def own_table(checkpoint: Checkpoint) -> str | None:
    """The family table that lies beside the checkpoint's config.json, if one does."""
    if checkpoint.location is None or checkpoint.config is None:
        return None
    folder = checkpoint.location if checkpoint.location.is_dir() else checkpoint.location.parent
    table = folder / OWN_TABLE
    return str(table) if table.is_file() else None


def parse_axes(axes: Sequence[str]) -> dict[str, int]:
    """["kv=4", "ffn=172"] -> {"kv": 4, "ffn": 172}.

    >>> parse_axes(["kv=4", "ffn=172"])
    {'kv': 4, 'ffn': 172}
    """
    sizes: dict[str, int] = {}
    for text in axes:
        name, sign, size = text.partition("=")
        if not sign or not name.isidentifier() or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise UsageError(f"--axis {text}: expected a name and a size of at least 1, such as --axis kv=4")
        if sizes.setdefault(name, int(size)) != int(size):
            raise UsageError(f"--axis {name} is given twice, as {sizes[name]} and as {size}")
    return sizes


def parse_dtype(name: str) -> str:
    """The dtype as safetensors spells it: "bfloat16" and "bf16" are "BF16"."""
    if name.lower() not in _DTYPES:
        raise UsageError(
            f"--dtype {name}: not a dtype to compute or write in{nearest(name, _DTYPES)}; "
            "expected bfloat16, float16, float32 or float64"
        )
    return _DTYPES[name.lower()]


def parse_device(name: str) -> torch.device:
    """The device; "auto" is the accelerator where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: {reason}; expected auto, cpu, cuda or cuda:N") from error
    return device


def load_decoder(
    checkpoint: Checkpoint,
    fitted: Fit,
    *,
    adapter: AdapterFolder | None = None,
    device: str = "auto",
    dtype: str | None = None,
    stream: bool = False,
) -> Decoder:
    """The model ready to run, in float32 where no dtype is given, with its adapter beside it."""
    from tlt_cli.checkpoint.cast import torch_dtype
    from tlt_cli.model.weights import load_checkpoint

    kind, place = torch_dtype(parse_dtype(dtype or "float32")), parse_device(device)
    decoder = load_checkpoint(checkpoint, fitted, stream=stream, dtype=kind, device=place)
    if adapter is not None:
        decoder.adapter = adapter.load(decoder, fitted.family.prefix, dtype=kind)
    return decoder


def run_part(decoder: Decoder, source: Source) -> Decoder:
    """What runs the source's part inside its decoder; the decoder itself where that is all of it."""
    from tlt_cli.model.part import child, inside

    if source.part is None or source.part.level == 0:
        return decoder
    return inside(decoder, child(source.fit, source.part.part))


def tokenizer_for(checkpoint: Checkpoint, vocab: int, given: str | None) -> Tokenizer:
    """The tokenizer beside the checkpoint, or the one of `given`: a tokenizer.json, a folder, another checkpoint."""
    from tlt_cli.model.text import load_tokenizer, read_tokenizer

    if given is None:
        return load_tokenizer(checkpoint.companions, vocab)
    path = Path(given).expanduser()
    if path.is_dir():
        return load_tokenizer(sorted(path.iterdir()), vocab, required=True)
    if path.suffix == ".json":
        return read_tokenizer(path, vocab)
    return load_tokenizer(open_checkpoint(given).companions, vocab, required=True)
