"""A model compressed on a text and written: what `tlt factor` does where a text allows more than cutting."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tlt_cli.calibration.blocks import Blocks, calibration_windows
from tlt_cli.calibration.compress import Compressed, install, refine, start_from, start_globally
from tlt_cli.calibration.pieces import Low, put_together, slot_of
from tlt_cli.checkpoint.cast import torch_dtype
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.cli.calibrating import MOST_TOKENS, calibration_text, recorded
from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome, Writing, carry_out, retyped
from tlt_cli.cli.factor_request import DENSE, Request
from tlt_cli.cli.factoring import (
    Opened,
    chosen_ranks,
    counted_as,
    decomposed,
    factor_command,
    measured,
    typed,
    with_seconds,
)
from tlt_cli.cli.growing import table_files
from tlt_cli.cli.judging import eval_text, judge
from tlt_cli.cli.opening import fitted_like
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit
from tlt_cli.model.compare import compare
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery.factor import GLOBAL
from tlt_cli.surgery.fold import product
from tlt_cli.surgery.lowrank import Factored, dense_plan, factored_plan
from tlt_cli.surgery.matrices import Matrix, read_matrix
from tlt_cli.surgery.measured import error_of, multiplied, reported
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.quantize import PRECISION

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 200  # of tuning per block
_BOUND, _ROUNDINGS = 1e-4, 64


def compress_checkpoint(opened: Opened, request: Request, *, output: Path, kind: str | None, out: Output) -> Outcome:
    """Compress on the request's calibration text and write; what is written is run against what was fitted.

    Raises TltError, with nothing written, for whatever cannot be done.
    """
    begun = time.perf_counter()
    _check_whole(opened.found)
    fitted, tokens, context = calibration_text(opened, request, out=out)
    ids = calibration_windows(tokens.ids, context, max(1, MOST_TOKENS // context))
    before = sum(matrix.size for matrix in opened.found)
    if request.sharing == GLOBAL and request.weighing == "kfac":
        with out.progress("factor: what the text shows of each block") as progress:
            made = start_globally(
                opened.checkpoint, fitted, opened.found, ids, budget=int((request.keep or 1.0) * before),
                align=request.align, progress=progress,
            )  # fmt: skip
    else:
        made = _cut(opened, request, out=out)
    if request.refining != "none":
        with out.progress("factor: refitting block after block") as progress:
            steps = STEPS if request.refining == "block" else 0
            refine(
                made, opened.checkpoint, fitted, opened.found, ids, steps=steps, seed=request.seed, progress=progress
            )
    corpus = recorded(tokens, ids.numel())
    plan = _plan(typed(opened, kind), fitted, request, made, corpus, before)
    plan = measured(retyped(plan, kind), opened, request)
    files = table_files(opened.checkpoint, request.family, output, out)
    writing = Writing(
        output=output, force=request.force, dry_run=request.dry_run, max_shard_size=request.max_shard_size,
        jobs=request.jobs,
    )  # fmt: skip
    text = eval_text(opened, request, out=out)

    def check(staged: Path) -> dict[str, Any]:
        output = open_checkpoint(staged)
        found = _verified(opened, request, fitted, made, output, ids[:2], plan) if request.verify else {}
        return found | judge(opened, request, text, output)

    outcome = carry_out(
        plan, opened.checkpoint, out=out, writing=writing, command=factor_command(opened, request, kind, None),
        changes=_changes(opened, made, plan, before), files=files,
        verify=check if (request.verify or text is not None) and not request.dry_run else None,
    )  # fmt: skip
    return with_seconds(outcome, made.seconds, begun)


def _check_whole(found: Sequence[Matrix]) -> None:
    """UsageError where some matrices of a fused tensor are to be compressed and others of it are not."""
    for matrix in found:
        together = [other for other in found if other.tensor == matrix.tensor]
        if matrix.parts is not None and len(together) < matrix.parts:
            raise UsageError(
                f"--only names {len(together)} of the {matrix.parts} matrices that {matrix.tensor} holds; fitting to a "
                "text takes all of them: name the whole tensor, or add --method whiten --allocate uniform --refine none"
            )


def _cut(opened: Opened, request: Request, *, out: Output) -> Compressed:
    """Ranks by the request's own rule and factors by its method, before any refinement."""
    factorizations = decomposed(opened, request, out=out)
    ranks = chosen_ranks(opened, request, factorizations, out=out)

    def factors(matrix: Any) -> tuple[Tensor, Tensor] | None:
        rank = ranks.by_slot[matrix.name]
        pair = None if rank is None else factorizations.factors(matrix, rank)
        factorizations.forget(matrix)
        return pair

    made = start_from(opened.checkpoint, opened.found, factors, factorizations.seen)
    made.seconds.update(factorizations.seconds)
    return made


def _plan(
    opened: Opened, fitted: Fit, request: Request, made: Compressed, corpus: Mapping[str, Any], before: int
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
        "calibration": corpus,
    }  # fmt: skip
    notes = ["tuned weights: perplexity on other texts than the calibration's may tell another story; measure it"]
    by_name = {matrix.name: matrix for matrix in opened.found}

    def metric(slot: str) -> Tensor | None:
        """The second moment of what the matrix reads, without the neurons that went."""
        matrix = by_name[slot]
        seen, stays = made.seen(matrix), made.kept.get(slot_of(matrix)[0])
        if seen is None or seen.inputs is None or stays is None or matrix.role != "down":
            return None if seen is None else seen.inputs
        return seen.inputs[stays][:, stays]

    coded = partial(factored_plan, bits=request.bits, metric=metric)
    build = dense_plan if request.format == DENSE else coded
    dtypes = {name: info.dtype for name, info in opened.tensors.items()}
    return build(
        fitted, dtypes, factored, factors, ffn=made.kept, changed=changed, details=details,
        notes=notes if request.refining == "block" else (),
    )  # fmt: skip


def _parts(
    opened: Opened, made: Compressed
) -> tuple[list[Factored], Callable[[str], tuple[Tensor, Tensor]], dict[str, Callable[[], Tensor]]]:
    """What is factored, its factors by slot, and every other tensor that changed, as the output stores it: all of them
    read from where they lie when they are written."""
    pieces, factored = made.pieces, []
    slots = {matrix.name: slot_of(matrix) for matrix in opened.found}
    names = {slot: name for name, slot in slots.items()}
    whole = {matrix.tensor for matrix in opened.found}
    for matrix in opened.found:
        part = pieces.parts[slots[matrix.name]]
        if part.rank is not None:
            owner = names[part.owner]
            shared = owner if owner != matrix.name else None
            factored.append(Factored(matrix, part.rank, shared_with=shared, pivoted=True))
            whole.discard(matrix.tensor)
    changed: dict[str, Callable[[], Tensor]] = {name: lambda value=value: value for name, value in made.norms.items()}  # type: ignore[misc]
    stored: dict[str, list[Matrix]] = {}
    for matrix in opened.found:
        if matrix.tensor in whole:
            stored.setdefault(matrix.tensor, []).append(matrix)
        elif pieces.parts[slots[matrix.name]].rank is None:
            changed[f"{matrix.name}.weight"] = lambda slot=slots[matrix.name]: pieces.piece(slot).weight()  # type: ignore[misc]
    for name, parts in stored.items():
        together = put_together(parts, pieces.piece)
        changed[name] = lambda together=together: together().contiguous()  # type: ignore[misc]

    def factors(name: str) -> tuple[Tensor, Tensor]:
        piece = pieces.piece(slots[name])
        assert isinstance(piece, Low)
        return piece.a, piece.b

    return factored, factors, changed


def _verified(
    opened: Opened, request: Request, fitted: Fit, made: Compressed, staged: Checkpoint, ids: Tensor, plan: Plan
) -> dict[str, Any]:
    """What was written, run against the pieces as they were fitted, and its matrices held against the source's.
    TltError where more than rounding differs.

    Rows of neurons that went do not count as errors in the metric: `down` answers for those. With bits "rounding" is
    what they cost; each matrix is bounded then, not the logits, which rounding by 8 bits does move.
    """
    pieces = Blocks(opened.checkpoint, fitted, keeps=False)
    for layer in range(pieces.layers):
        install(made, pieces, fitted, opened.found, layer)
    fit_written = fitted_like(staged, fitted)
    written = load_checkpoint(staged, fit_written, stream=True)
    found = compare(pieces.decoder, written, ids)
    precision = max(torch.finfo(torch_dtype(t.dtype)).eps for t in plan.tensors if t.dtype[0] in "FB")
    bound = max(_BOUND, _ROUNDINGS * precision) if request.bits is None else None
    cost = {} if request.bits is None else {"rounding": _rounding(opened, made, staged, fit_written)}
    if bound is not None and found.relative > bound:
        raise TltError(
            f"verification failed: what was written gives logits {found.relative:.1e} of their deviation from what was "
            f"fitted, and {bound:.1e} is allowed; nothing was written"
        )
    source = compare(load_checkpoint(opened.checkpoint, fitted, stream=True), written, ids)
    read, errors = multiplied(staged, fit_written, opened.found, made.kept), {}
    for matrix in opened.found:
        counted = made.kept.get(slot_of(matrix)[0]) if matrix.role in ("gate", "up") else None
        weight, seen = read_matrix(opened.checkpoint, matrix), made.seen(matrix)
        errors[matrix.name] = error_of(weight, read(matrix), request.weighing, seen, counted=counted)
    return {
        **reported(errors, request.weighing), **cost, "relative": found.relative, "bound": bound, **asdict(found),
        "source": {"relative": source.relative, **asdict(source)},
    }  # fmt: skip


def _rounding(opened: Opened, made: Compressed, staged: Checkpoint, written: Fit) -> float:
    """||W - W'|| / ||W|| of all factored matrices as they were fitted and as their codes say. TltError for one that is
    off by more than rounding."""
    lost = total = 0.0
    for matrix in opened.found:
        piece = made.pieces.piece(slot_of(matrix))
        if isinstance(piece, Low):
            weight = piece.weight().double()
            error, norm = float((weight - product(staged, written, matrix.name)).norm()), float(weight.norm())
            lost, total = lost + error**2, total + norm**2
            if error > _ROUNDINGS * PRECISION * norm:
                raise TltError(
                    f"verification failed: the codes of {matrix.name} are off by {error / norm:.1e} of it; nothing was "
                    "written; report it, with the command"
                )
    return math.sqrt(lost / total) if total else 0.0


def _changes(opened: Opened, made: Compressed, plan: Plan, before: int) -> list[tuple[str, str, str]]:
    count = sum(math.prod(info.shape) for info in opened.tensors.values())
    parameters = made.parameters(opened.found)
    factored = sum(part.rank is not None for part in made.pieces.parts.values())
    return [
        ("matrices", str(len(opened.found)), f"{factored} factored"),
        (counted_as(plan), f"{before:,}", f"{parameters:,} ({parameters / before:.1%})"),
        ("parameters", f"{count:,}", f"{plan.parameters:,} ({plan.parameters / count:.1%})"),
    ]
