"""One leaf of a tree of LoRAs: found, and written as an adapter that PEFT loads."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tlt_cli.checkpoint.ranks import joined
from tlt_cli.checkpoint.writer import check_target
from tlt_cli.cli.adapters import AdapterFolder
from tlt_cli.cli.console import Output, Table
from tlt_cli.cli.execute import Outcome
from tlt_cli.cli.opening import beside_its_base
from tlt_cli.errors import UsageError
from tlt_cli.model.tree_files import LeafFolder, TreeFolder

FORMATS = ("model", "peft")


def one_leaf(adapter: AdapterFolder, leaf: int | None) -> AdapterFolder:
    """The leaf that --leaf says of a tree; any other adapter as it is. UsageError where one is there without the other.

    TltError where the tree's leaves are no models of their own.
    """
    if not isinstance(adapter, TreeFolder):
        if leaf is not None:
            raise UsageError(f"--leaf goes with a tree of LoRAs, and {adapter.source} is a {adapter.kind}")
        return adapter
    if leaf is None:
        adapter.shape.check_leaf(0)
        raise UsageError(f"{adapter.source} is a tree of LoRAs: say which leaf, --leaf 0 to {adapter.shape.leaves - 1}")
    return LeafFolder(adapter, leaf)


def export_leaf(
    leaf: LeafFolder,
    output: Path | None,
    *,
    out: Output,
    base: str | None = None,
    family: str | None = None,
    axes: Sequence[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Outcome:
    """Write the leaf as a PEFT adapter of the tree's base; without an `output` under a name made of the tree's.

    Raises TltError, with nothing written, where the tree does not fit its base or the output must not be written.
    """
    import torch

    from tlt_cli.model.peft_write import write_peft
    from tlt_cli.model.weights import load_checkpoint

    with joined() as team:
        with team.together():  # what one of several ranks refuses, all do
            model = beside_its_base(leaf, out=out, base=base, family=family, axes=axes)
            decoder = load_checkpoint(model.checkpoint, model.fit, stream=True)
            lora = leaf.load(decoder, dtype=torch.float32)
            name = leaf.folder.resolve().name
            output = output or Path(f"{name}-leaf{leaf.leaf}")
            for source in (model.checkpoint, leaf.tensors):
                check_target(output, source, force=force)
        words = ["tlt", "fold", name, "--leaf", str(leaf.leaf), "--format", "peft"]
        words += ["--base", Path(base).name] if base else []
        command, count = shlex.join(words), sum(parameter.numel() for parameter in lora.parameters())
        details = {"tree": {"source": name, "sha256": leaf.tensors.digest()}, "leaf": leaf.leaf}
        report: dict[str, Any] = {
            "operation": "fold", "command": command, "source": leaf.source, "path": os.fspath(output), **details,
            "base": model.checkpoint.source, "rank": leaf.tree.shape.active, "parameters": count,
        }  # fmt: skip
        if dry_run:
            report["dry_run"] = True
        else:
            written = write_peft(
                lora, output, base=model.checkpoint, prefix=model.fit.family.prefix, command=command, operation="fold",
                details=details, force=force,
            )  # fmt: skip
            report.update(bytes=written.bytes, files=list(written.files))
    tree = leaf.tree.shape
    stored = sum(info.nbytes for info in leaf.tensors.tensors.values())
    rows = [
        ("rank of each update", str(tree.nodes * tree.rank), str(tree.active)),
        ("bytes of tensors", f"{stored:,}", f"{4 * count:,}"),
    ]
    return Outcome(report, Table(("", "before", "after"), rows))
