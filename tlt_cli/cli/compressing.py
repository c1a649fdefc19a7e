"""A model compressed on a text and written: what `tlt factor` does where a text allows more than cutting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tlt_cli.calibration.blocks import Blocks, calibration_windows
from tlt_cli.calibration.compress import Compressed, install, refine, start_from, start_globally
from tlt_cli.calibration.pieces import Dense, Low
from tlt_cli.checkpoint.cast import torch_dtype
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.shards import is_single_file
from tlt_cli.cli.calibrating import calibration_text
from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome, Writing, carry_out, retyped
from tlt_cli.cli.factor_request import DENSE, Request
from tlt_cli.cli.factoring import Opened, chosen_ranks, decomposed, eval_text, factor_command, judge
from tlt_cli.cli.growing import table_files
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, fit
from tlt_cli.model.compare import compare
from tlt_cli.model.modeling import AUTO_MAP, MODELING, modeling_source
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.factor import GLOBAL
from tlt_cli.surgery.lowrank import Factored, dense_plan, factored_plan
from tlt_cli.surgery.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 200  # of tuning per block
_MOST_TOKENS = 1 << 18
_BOUND, _ROUNDINGS = 1e-4, 64


def compress_checkpoint(opened: Opened, request: Request, *, output: Path, kind: str | None, out: Output) -> Outcome:
    """Compress on the request's calibration text and write; what is written is run against what was fitted.

    Raises TltError, with nothing written, for whatever cannot be done.
    """
    fitted, tokens, context = calibration_text(opened, request, out=out)
    ids = calibration_windows(tokens.ids, context, max(1, _MOST_TOKENS // context))
    before = sum(matrix.size for matrix in opened.found)
    if request.sharing == GLOBAL:
        with out.progress("factor: what the text shows of each block") as progress:
            made = start_globally(
                opened.checkpoint, fitted, opened.found, ids, budget=int((request.keep or 1.0) * before),
                progress=progress,
            )  # fmt: skip
    else:
        made = _cut(opened, request, out=out)
    if request.refining != "none":
        with out.progress("factor: refitting block after block") as progress:
            steps = STEPS if request.refining == "block" else 0
            refine(
                made, opened.checkpoint, fitted, opened.found, ids, steps=steps, seed=request.seed, progress=progress
            )
    plan = retyped(_plan(opened, fitted, request, made, tokens.info, ids, before), kind)
    files = table_files(opened.checkpoint, request.family, output, out)
    if plan.config.get("auto_map") == AUTO_MAP and not is_single_file(output):
        files[MODELING] = modeling_source()
    writing = Writing(
        output=output, force=request.force, dry_run=request.dry_run, max_shard_size=request.max_shard_size,
        jobs=request.jobs,
    )  # fmt: skip
    text = eval_text(opened, request, out=out)

    def check(staged: Path) -> dict[str, Any]:
        output = open_checkpoint(staged)
        found = _verified(opened, fitted, made, output, ids[:2], plan) if request.verify else {}
        return found | judge(opened, request, text, output)

    return carry_out(
        plan, opened.checkpoint, out=out, writing=writing, command=factor_command(opened, request, kind, None),
        changes=_changes(opened, made, plan, before), files=files,
        verify=check if (request.verify or text is not None) and not request.dry_run else None,
    )  # fmt: skip


def _cut(opened: Opened, request: Request, *, out: Output) -> Compressed:
    """Ranks by the request's own rule and factors by its method, before any refinement."""
    factorizations = decomposed(opened, request, out=out)
    ranks = chosen_ranks(opened, request, factorizations, out=out)

    def factors(matrix: Any) -> tuple[Tensor, Tensor] | None:
        rank = ranks.by_slot[matrix.name]
        return None if rank is None else factorizations.factors(matrix, rank)

    return start_from(opened.checkpoint, opened.found, factors)


def _plan(
    opened: Opened, fitted: Fit, request: Request, made: Compressed, corpus: Mapping[str, Any], ids: Tensor, before: int
) -> Plan:
    factored, factors, changed = _parts(opened, made)
    parameters = made.parameters(opened.found)
    ranks = {one.matrix.name: one.rank for one in factored}
    details = {
        "method": request.weighing, "allocate": request.sharing, "refine": request.refining, "format": request.format,
        "ranks": {matrix.name: ranks.get(matrix.name) for matrix in opened.found},
        "shared": {one.matrix.name: one.shared_with for one in factored if one.shared_with},
        "neurons": {str(layer): len(kept) for layer, kept in sorted(made.kept.items())},
        "linear_parameters": {"from": before, "to": parameters}, "keep": parameters / before,
        "calibration": {**corpus, "source": Path(str(corpus["source"])).name, "tokens": ids.numel()},
    }  # fmt: skip
    notes = ["tuned weights: perplexity on other texts than the calibration's may tell another story; measure it"]
    build = dense_plan if request.format == DENSE else factored_plan
    dtypes = {name: info.dtype for name, info in opened.tensors.items()}
    return build(
        fitted, dtypes, factored, factors, ffn=made.kept, changed=changed, details=details,
        notes=notes if request.refining == "block" else (),
    )  # fmt: skip


def _parts(
    opened: Opened, made: Compressed
) -> tuple[list[Factored], Callable[[str], tuple[Tensor, Tensor]], dict[str, Callable[[], Tensor]]]:
    """What is factored, its factors by slot, and every other tensor that changed, as the output stores it."""
    factored, pairs, owners = [], {}, dict[int, str]()
    whole = {matrix.tensor for matrix in opened.found}
    for matrix in opened.found:
        assert matrix.layer is not None and matrix.role is not None
        piece = made.pieces[matrix.layer, matrix.role]
        if isinstance(piece, Low):
            owner = owners.setdefault(id(piece.a), matrix.name)
            shared = owner if owner != matrix.name else None
            factored.append(Factored(matrix, len(piece.a), shared_with=shared, pivoted=True))
            pairs[matrix.name] = piece.a, piece.b
            whole.discard(matrix.tensor)
    changed: dict[str, Callable[[], Tensor]] = {name: lambda value=value: value for name, value in made.norms.items()}  # type: ignore[misc]
    stored: dict[str, list[tuple[int, Tensor, bool]]] = {}
    for matrix in opened.found:
        assert matrix.layer is not None and matrix.role is not None
        piece = made.pieces[matrix.layer, matrix.role]
        if isinstance(piece, Dense) and matrix.tensor in whole:
            stored.setdefault(matrix.tensor, []).append((matrix.part or 0, piece.value, matrix.transposed))
        elif isinstance(piece, Dense):
            changed[f"{matrix.name}.weight"] = lambda value=piece.value: value  # type: ignore[misc]
    for name, parts in stored.items():
        value = torch.cat([part for _, part, _ in sorted(parts, key=lambda part: part[0])])
        stored_as = value.T.contiguous() if parts[0][2] else value
        changed[name] = lambda value=stored_as: value  # type: ignore[misc]
    return factored, pairs.__getitem__, changed


def _verified(
    opened: Opened, fitted: Fit, made: Compressed, staged: Checkpoint, ids: Tensor, plan: Plan
) -> dict[str, Any]:
    """What was written, run against the pieces as they were fitted. TltError where more than rounding differs."""
    pieces = Blocks(opened.checkpoint, fitted)
    for layer in range(pieces.layers):
        install(made, pieces, fitted, opened.found, layer)
    shapes = {name: info.shape for name, info in staged.tensors.items()}
    written = load_checkpoint(staged, fit(shapes, staged.config, family=fitted.family), stream=True)
    found = compare(pieces.decoder, written, ids)
    precision = max(torch.finfo(torch_dtype(t.dtype)).eps for t in plan.tensors if t.dtype[0] in "FB")
    bound = max(_BOUND, _ROUNDINGS * precision)
    if found.relative > bound:
        raise TltError(
            f"verification failed: what was written gives logits {found.relative:.1e} of their deviation from what was "
            f"fitted, and {bound:.1e} is allowed; nothing was written"
        )
    source = compare(load_checkpoint(opened.checkpoint, fitted, stream=True), written, ids)
    return {
        "relative": found.relative, "bound": bound, **asdict(found),
        "source": {"relative": source.relative, **asdict(source)},
    }  # fmt: skip


def _changes(opened: Opened, made: Compressed, plan: Plan, before: int) -> list[tuple[str, str, str]]:
    import math

    count = sum(math.prod(info.shape) for info in opened.tensors.values())
    parameters = made.parameters(opened.found)
    factored = sum(isinstance(piece, Low) for piece in made.pieces.values())
    return [
        ("matrices", str(len(opened.found)), f"{factored} factored"),
        ("their parameters", f"{before:,}", f"{parameters:,} ({parameters / before:.1%})"),
        ("parameters", f"{count:,}", f"{plan.parameters:,} ({plan.parameters / count:.1%})"),
    ]
