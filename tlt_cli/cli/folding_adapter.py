"""An adapter folded into its base, and written: the work behind `tlt fold ADAPTER`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tlt_cli.checkpoint.ranks import joined
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.writer import check_target
from tlt_cli.cli.adapters import AdapterFolder
from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome, Writing, carry_out, retyped
from tlt_cli.cli.opening import beside_its_base, parse_dtype
from tlt_cli.errors import TltError
from tlt_cli.model.lora import Lora
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.fold_adapter import Update, fold_updates
from tlt_cli.surgery.verify import check, sample_tokens, verify

if TYPE_CHECKING:
    from tlt_cli.model.decoder import Decoder


def fold_adapter(
    adapter: AdapterFolder,
    output: Path | None,
    *,
    out: Output,
    base: str | None = None,
    family: str | None = None,
    axes: Sequence[str] | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    verified: bool = True,
    seed: int = 0,
    words: Sequence[str] = (),
) -> Outcome:
    """Write the base with the adapter in it; `base` is the --base that the user gave, `words` more of the command.

    Raises TltError, with nothing written, where the adapter does not load as one LoRA, and where the result does not
    compute what base and adapter compute side by side.
    """
    with joined() as team:
        with team.together():  # what one of several ranks refuses, all do
            kind = None if dtype is None else parse_dtype(dtype)
            model = beside_its_base(adapter, out=out, base=base, family=family, axes=axes, values=not dry_run)
            checkpoint, fitted = model.checkpoint, model.fit

            def loaded(decoder: Decoder, dtype: torch.dtype) -> Lora:
                lora = adapter.load(decoder, fitted.family.prefix, dtype=dtype)
                if not isinstance(lora, Lora):
                    raise TltError(
                        f"{adapter.source}: a {adapter.kind} is no single update of each matrix: nothing to fold"
                    )
                return lora

            lora = loaded(load_checkpoint(checkpoint, fitted, stream=True), torch.float64)
            updates = [
                Update(site.module, a, b, update.scale, site.transposed) for site, update, a, b in lora.matrices()
            ]
            name = adapter.folder.resolve().name
            record = {"adapter": {"source": name, "kind": adapter.kind, "sha256": adapter.tensors.digest()}}
            dtypes = {tensor: info.dtype for tensor, info in checkpoint.tensors.items()}
            plan = retyped(fold_updates(fitted, dtypes, updates, details=record), kind)
            writing = Writing(
                output=output or Path(f"{name}-folded"), force=force, dry_run=dry_run, max_shard_size=max_shard_size,
                jobs=jobs,
            )  # fmt: skip
            for source in (checkpoint, adapter.tensors):
                check_target(writing.output, source, force=force)

        def compared(staged: Path) -> dict[str, Any]:
            ids, written = sample_tokens(fitted, seed=seed), open_checkpoint(staged)
            found = verify(fitted, plan, checkpoint, ids, written=written, adapted=loaded)
            check(plan, found)
            return found.report()

        command = ["tlt", "fold", name, *words, *(["--base", Path(base).name] if base else [])]
        command += ["--dtype", kind.lower()] if kind else []
        command += ["--family", Path(family).name] if family else []
        command += ["--max-shard-size", max_shard_size] if max_shard_size else []
        return carry_out(
            plan, checkpoint, out=out, writing=writing, command=shlex.join(command),
            changes=[("matrices with an update beside them", str(len(updates)), "0")],
            verify=compared if verified and checkpoint.location is not None else None,
        )  # fmt: skip
