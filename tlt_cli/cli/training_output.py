"""What a training leaves behind: a checkpoint like the one it started from, or an adapter's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tlt_cli.checkpoint.shards import is_single_file
from tlt_cli.cli import execute
from tlt_cli.cli.console import Output
from tlt_cli.cli.growing import table_files
from tlt_cli.cli.opening import parse_dtype
from tlt_cli.cli.training_request import Request
from tlt_cli.cli.training_start import Subject
from tlt_cli.model.lora import Lora
from tlt_cli.model.peft_write import write_peft
from tlt_cli.training.saving import save
from tlt_cli.training.world import World

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def derived_output(request: Request, subject: Subject) -> Path:
    """A name in the current directory: of the source and what was trained, or of the family."""
    if subject.source is None:
        return Path(f"{subject.fitted.family.name}-trained")
    if subject.adapter is not None:
        name = str(subject.name).rpartition("/")[2].removesuffix(".safetensors").removesuffix(".st")
        fresh = "lora" if request.lora is not None else "tree"
        return Path(f"{name}-{fresh if subject.before is None else 'trained'}")
    return execute.derived_output(subject.source, "trained")


def write_model(
    request: Request, subject: Subject, trained: Mapping[str, nn.Parameter], output: Path, *,
    details: Mapping[str, Any], world: World, changes: Sequence[tuple[str, str, str]], force: bool, out: Output,
) -> None:  # fmt: skip
    """The whole model, in the dtypes of the source unless --dtype says another; float32 where there was no source."""
    tensors: dict[str, Tensor] = {**subject.decoder.stored, **trained}
    dtypes = {} if subject.source is None else {name: info.dtype for name, info in subject.source.tensors.items()}
    config = dict(subject.config)
    if request.dtype is not None:
        kind = parse_dtype(request.dtype)
        dtypes = {name: kind for name, tensor in tensors.items() if tensor.is_floating_point()}
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config.update(dict.fromkeys(keys, _NAMES[kind]))
    files = dict(subject.files)
    if subject.source is not None:
        files |= table_files(subject.source, request.family, output, out)
    execute.put_code(files, config, output, out)
    save(
        tensors, output, config=config, command=request.command(subject.name), source=subject.source, details=details,
        dtypes=dtypes, files={} if is_single_file(output) else files, changes=changes, force=force, world=world,
        max_shard_size=None if request.max_shard_size is None else execute.shard_size(request.max_shard_size),
    )  # fmt: skip


def write_adapter(
    request: Request, subject: Subject, trained: Mapping[str, nn.Parameter], output: Path, *,
    details: Mapping[str, Any], world: World, changes: Sequence[tuple[str, str, str]], force: bool, out: Output,
) -> None:  # fmt: skip
    """A LoRA as PEFT has it, or a tree in its own format."""
    assert subject.source is not None
    command = request.command(subject.name)
    if isinstance(subject.adapter, Lora):
        write_peft(
            subject.adapter, output, base=subject.source, prefix=subject.fitted.family.prefix, command=command,
            before=subject.before, details=details, force=force,
        )  # fmt: skip
        return
    from tlt_cli.model.tree_files import write_tree

    assert subject.adapter is not None
    write_tree(
        subject.adapter, output, base=subject.source, command=command, before=subject.before, details=details,
        force=force,
    )  # fmt: skip
