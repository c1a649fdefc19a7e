"""A factorization carried out: opened, ranks chosen, planned, written, measured. What `tlt factor` does."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_cli.checkpoint.header import TensorInfo, tensor_bytes
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.record import source_name
from tlt_cli.checkpoint.writer import check_target
from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome, Writing, carry_out, derived_output, retyped
from tlt_cli.cli.factor_request import DENSE, LOWRANK, Request
from tlt_cli.cli.growing import table_files
from tlt_cli.cli.judging import eval_text, judge
from tlt_cli.cli.opening import opened_if_known, parse_dtype
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit
from tlt_cli.families.factors import LEFT, RIGHT, read_lowrank, refuse_factored
from tlt_cli.families.groups import read_groups, refuse_grouped
from tlt_cli.model.text import Tokens
from tlt_cli.surgery.factor import (
    UNIFORM,
    Ranks,
    allocated,
    at_energy,
    at_keep,
    at_rank,
    check_some,
)
from tlt_cli.surgery.factored_file import multiplied_plan, separate_plan
from tlt_cli.surgery.factorizations import Factorizations
from tlt_cli.surgery.lowrank import Factored, factored_plan
from tlt_cli.surgery.matrices import FLOATS, Matrix, matrices, read_matrix
from tlt_cli.surgery.measured import Error, error_of, reported, shaken
from tlt_cli.surgery.metrics import needs_text
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.quantize import PRECISION, read_factor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Opened:
    """A checkpoint, its family if it has one, its tensors without those that are computed anew, and its matrices."""

    checkpoint: Checkpoint
    fitted: Fit | None
    tensors: Mapping[str, TensorInfo]
    found: Sequence[Matrix]


def opened_matrices(source: str, request: Request, *, out: Output, values: bool) -> Opened:
    """Open one model and find its matrices. TltError where it has none."""
    checkpoint, fitted = opened_if_known(source, out=out, family=request.family, axes=request.axes, values=values)
    refuse_grouped(read_groups(checkpoint.config) if fitted is None else fitted.groups, "a sweep of ranks")
    return with_matrices(checkpoint, fitted, request)


def with_matrices(checkpoint: Checkpoint, fitted: Fit | None, request: Request) -> Opened:
    """The matrices of one model. TltError where it has none."""
    refuse_factored(read_lowrank(checkpoint.config) if fitted is None else fitted.lowrank, "factoring")
    dropped = set(fitted.dropped) if fitted else set[str]()
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in dropped}
    shapes = {name: info.shape for name, info in tensors.items() if fitted or info.dtype in FLOATS}
    found = matrices(shapes, fitted, only=request.only)
    for matrix in found:
        if tensors[matrix.tensor].dtype not in FLOATS:
            raise TltError(
                f"{matrix.tensor} is stored as {tensors[matrix.tensor].dtype}; only matrices in {', '.join(FLOATS)} "
                "can be factored"
            )
    if not found:
        raise TltError(f"{checkpoint.source} holds no matrix: no floating-point tensor has two dims above 1")
    return Opened(checkpoint, fitted, tensors, found)


def decomposed(opened: Opened, request: Request, *, out: Output) -> Factorizations:
    """The decompositions by the request's method, after a look at its calibration text where it weighs by one."""
    if not needs_text(request.weighing):
        return Factorizations(opened.checkpoint, request.weighing, lambda matrix: None)
    from tlt_cli.cli.calibrating import seen_by_text

    seen, corpus = seen_by_text(opened, request, out=out)
    return Factorizations(opened.checkpoint, request.weighing, seen, corpus=corpus)


def chosen_ranks(opened: Opened, request: Request, made: Factorizations, *, out: Output) -> Ranks:
    """The rank of every matrix. Only shares of energy and the global allocation take decompositions."""
    found, saving = opened.found, request.format == LOWRANK
    if request.rank is not None:
        return at_rank(found, request.rank, saving=saving, align=request.align)
    if request.keep is not None and request.sharing == UNIFORM:
        return at_keep(found, request.keep, saving=saving, align=request.align)
    decompose_all(found, made, out=out)
    if request.keep is not None:
        losses = {matrix.name: made.losses(matrix) for matrix in found}
        return allocated(found, losses, request.keep, align=request.align)
    assert request.energy is not None
    spectra = {matrix.name: made.spectrum(matrix) for matrix in found}
    return at_energy(found, spectra, request.energy, saving=saving, align=request.align)


def decompose_all(found: Sequence[Matrix], made: Factorizations, *, out: Output) -> None:
    """Decompose every matrix once, with a progress bar."""
    total = sum(matrix.size for matrix in found)
    with out.progress(f"factor: decomposing {len(found)} matrices") as progress:
        done = 0
        for matrix in found:
            made.spectrum(matrix)
            done += matrix.size
            progress(done, total)


def factor_checkpoint(source: str | Checkpoint, request: Request, *, plot: Path | None = None, out: Output) -> Outcome:
    """Factor `source` and write it; without an output under a name made of the source's and the size.

    Notes and progress go to `out`. Raises TltError, with nothing written, for whatever cannot be done, and where what
    was written is not what was computed.
    """
    if plot is not None:
        raise UsageError("--plot draws a sweep; give it with --rank-sweep")
    kind = None if request.dtype is None else parse_dtype(request.dtype)
    checkpoint, fitted = opened_if_known(
        source, out=out, family=request.family, axes=request.axes, values=not request.dry_run or request.looks
    )
    sized = next(name for name in ("rank", "keep", "energy") if getattr(request, name) is not None)
    output = request.output or derived_output(checkpoint, f"{sized}{getattr(request, sized)}")
    check_target(output, checkpoint, force=request.force)
    if fitted is not None and fitted.groups is not None:
        from tlt_cli.cli.factoring_parts import factor_parts

        return factor_parts(checkpoint, fitted, request, output=output, kind=kind, out=out)
    refuse_grouped(read_groups(checkpoint.config), "factoring")
    opened = with_matrices(checkpoint, fitted, request)
    if request.compresses:
        from tlt_cli.cli.compressing import compress_checkpoint

        return compress_checkpoint(opened, request, output=output, kind=kind, out=out)
    begun = time.perf_counter()
    made = decomposed(opened, request, out=out)
    ranks = chosen_ranks(opened, request, made, out=out)
    return write_ranks(opened, request, ranks, made, output=output, kind=kind, out=out, begun=begun)


def write_ranks(
    opened: Opened,
    request: Request,
    ranks: Ranks,
    made: Factorizations,
    *,
    output: Path,
    kind: str | None,
    out: Output,
    size: tuple[str, Any] | None = None,
    judged: bool = True,
    begun: float | None = None,
) -> Outcome:
    """Plan and write the checkpoint at these ranks. `size` is the option that gives them where the request has none.

    With `judged` the output reads the request's text, where it has one, before it takes its name.
    """
    begun = time.perf_counter() if begun is None else begun
    check_some(ranks)
    by_matrix = {matrix: ranks.factored[matrix.name] for matrix in opened.found if matrix.name in ranks.factored}
    plan = measured(retyped(_plan(typed(opened, kind), request, ranks, by_matrix, made), kind), opened, request)
    writing = Writing(
        output=output, force=request.force, dry_run=request.dry_run, max_shard_size=request.max_shard_size,
        jobs=request.jobs,
    )  # fmt: skip
    files = table_files(opened.checkpoint, request.family, output, out)
    text = eval_text(opened, request, out=out) if judged else None
    checked = None
    if (request.verify or text is not None) and not request.dry_run:
        checked = lambda staged: _checked(opened, request, by_matrix, made, text, open_checkpoint(staged))  # noqa: E731
    outcome = carry_out(
        plan, opened.checkpoint, out=out, writing=writing, command=factor_command(opened, request, kind, size),
        changes=_changes(opened, ranks, plan), files=files, verify=checked,
    )  # fmt: skip
    return with_seconds(outcome, made.seconds, begun)


def with_seconds(outcome: Outcome, seconds: Mapping[str, float], begun: float) -> Outcome:
    """The outcome with what the matrices took, each and all together, beside the whole since `begun`. None of it goes
    into the files."""
    passed = {"seconds": sum(seconds.values()), "matrix_seconds": dict(seconds)}
    rows = [*outcome.table.rows]
    if seconds:
        rows.append((f"seconds for {len(seconds)} matrices", "", f"{passed['seconds']:.1f}"))
    report = {**outcome.report, **passed, "total_seconds": time.perf_counter() - begun}
    return replace(outcome, report=report, table=replace(outcome.table, rows=rows))


def typed(opened: Opened, kind: str | None) -> Opened:
    """The same with its floating-point tensors in another dtype: codes are made for scales as they will be stored."""
    if kind is None:
        return opened
    infos = {n: replace(info, dtype=kind) if info.dtype in FLOATS else info for n, info in opened.tensors.items()}
    return replace(opened, tensors=infos)


def measured(plan: Plan, opened: Opened, request: Request) -> Plan:
    """The plan with the bytes of all tensors before and after in its details, and a note on what has no codes."""
    size = {
        "from": sum(info.nbytes for info in opened.tensors.values()),
        "to": sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in plan.tensors),
    }
    details, notes = {**plan.details, "tensor_bytes": size}, plan.notes
    if request.bits is not None:
        details["bits"] = request.bits
        notes = (*notes, f"--bits {request.bits} is for factors: what is not factored keeps its dtype")
    return replace(plan, details=details, notes=notes)


def _plan(
    opened: Opened, request: Request, ranks: Ranks, by_matrix: Mapping[Matrix, int], made: Factorizations
) -> Plan:
    details = {
        "method": request.weighing, "format": request.format, "ranks": dict(ranks.by_slot),
        "linear_parameters": {"from": ranks.before, "to": ranks.parameters}, "keep": ranks.keep,
        **({} if made.corpus is None else {"calibration": made.corpus}),
    }  # fmt: skip
    stay = [slot for slot, rank in ranks.by_slot.items() if rank is None]
    notes = [f"{len(stay)} of {len(ranks.by_slot)} matrices stay dense: {_some(stay)}"] if stay else []
    if request.keep is not None and ranks.keep > request.keep:
        notes.append(f"--keep {request.keep:g} is less than the smallest rank takes: {ranks.keep:.1%} is kept")
    if request.format == DENSE:
        return multiplied_plan(
            opened.tensors, opened.checkpoint.config, by_matrix, made.factors, details=details, notes=notes
        )
    if opened.fitted is None:
        notes.append("no family fits: the factors are stored side by side, for a loader of your own")
        return separate_plan(
            opened.tensors, opened.checkpoint.config, by_matrix, made.factors, details=details, notes=notes,
            bits=request.bits,
        )  # fmt: skip
    slots = {matrix.name: matrix for matrix in by_matrix}

    def metric(slot: str) -> Tensor | None:
        seen = made.seen(slots[slot])
        return None if seen is None else seen.inputs

    return factored_plan(
        opened.fitted, {name: info.dtype for name, info in opened.tensors.items()},
        [Factored(matrix, rank) for matrix, rank in by_matrix.items()],
        lambda slot: made.factors(slots[slot], by_matrix[slots[slot]]), details=details, notes=notes,
        bits=request.bits, metric=metric,
    )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def factor_command(opened: Opened, request: Request, kind: str | None, size: tuple[str, Any] | None) -> str:
    """The command that makes the same bytes from the same source: no paths, no words on how to print."""
    words = ["tlt", "factor", source_name(opened.checkpoint)]
    for name in ("rank", "keep", "energy"):
        value = size[1] if size is not None and size[0] == name else getattr(request, name)
        words += [f"--{name}", str(value)] if value is not None else []
    words += ["--method", request.weighing]
    for text in request.calibration or ():
        words += ["--calibration", text.name]
    if request.keep is not None:
        words += ["--allocate", request.sharing]
    words += ["--refine", request.refining] if needs_text(request.weighing) else []
    words += ["--align", str(request.align)] if request.align > 1 else []
    words += ["--context", str(request.context)] if request.context and needs_text(request.weighing) else []
    for glob in request.only:
        words += ["--only", glob]
    words += ["--format", request.format]
    words += ["--bits", str(request.bits)] if request.bits is not None else []
    words += ["--dtype", kind.lower()] if kind else []
    words += ["--family", Path(request.family).name] if request.family else []
    for axis in request.axes or ():
        words += ["--axis", axis]
    words += ["--max-shard-size", request.max_shard_size] if request.max_shard_size else []
    words += ["--seed", str(request.seed)] if request.seed and request.refining == "block" else []
    return shlex.join(words)


def _changes(opened: Opened, ranks: Ranks, plan: Plan) -> list[tuple[str, str, str]]:
    count = sum(math.prod(info.shape) for info in opened.tensors.values())
    return [
        ("matrices", str(len(ranks.by_slot)), f"{len(ranks.factored)} factored"),
        (counted_as(plan), f"{ranks.before:,}", f"{ranks.parameters:,} ({ranks.keep:.1%})"),
        ("parameters", f"{count:,}", f"{plan.parameters:,} ({plan.parameters / count:.1%})"),
    ]


def counted_as(plan: Plan) -> str:
    """What the table calls the matrices' parameters: a dense file holds more than the factors that it was made of."""
    return "their parameters, as factors" if plan.details["format"] == DENSE else "their parameters"


def _checked(
    opened: Opened,
    request: Request,
    by_matrix: Mapping[Matrix, int],
    made: Factorizations,
    text: Tokens | None,
    staged: Checkpoint,
) -> dict[str, Any]:
    """What is known of the output before it takes its name. TltError where it is not as it should be."""
    found = _verified(opened, request, by_matrix, made, staged) if request.verify else {}
    return found | judge(opened, request, text, staged)


def _verified(
    opened: Opened,
    request: Request,
    by_matrix: Mapping[Matrix, int],
    made: Factorizations,
    staged: Checkpoint,
) -> dict[str, Any]:
    """What was written against the source: ||W - W'|| / ||W|| of every matrix and of all of them together, and the same
    in the method's metric.

    In its metric every factored matrix must lose what its factors say, up to the rounding of what is written. TltError
    where it does not. With bits "rounding" is what they alone cost: ||b a - b' a'|| / ||W|| of all of them together.
    """
    import torch

    from tlt_cli.checkpoint.cast import torch_dtype

    rounding, method, errors = 0.0, request.weighing, dict[str, Error]()
    for matrix in opened.found:
        weight, seen = read_matrix(opened.checkpoint, matrix).double(), made.seen(matrix)
        if matrix not in by_matrix:
            whole = matrix.tensor in staged.tensors  # else it is stored apart from the matrices it was fused with
            same = read_matrix(staged, matrix) if whole else staged.read(f"{matrix.name}.weight")
            errors[matrix.name] = error_of(weight, same, method, seen)
            continue
        rank = by_matrix[matrix]
        name = matrix.tensor if request.format == DENSE else f"{matrix.name}.lowrank_a.weight"
        stored = torch_dtype(staged.tensors[name].dtype)
        precision = PRECISION if request.bits is not None else torch.finfo(stored).eps
        if request.format == DENSE:
            written = read_matrix(staged, matrix).double()
        else:
            a, b = (read_factor(staged, matrix.name, kind, request.bits) for kind in (RIGHT, LEFT))
            product = b @ a  # a table of embeddings is stored words by entries
            written = product if product.shape == weight.shape else product.T
        a, b = made.factors(matrix, rank)
        if request.bits is not None:
            rounding += float((b.double() @ a.double() - written).square().sum())
        errors[matrix.name] = one = error_of(weight, written, method, seen)
        error, expected = math.sqrt(one.metric_lost), made.error(matrix, rank)
        if abs(error - expected) > 1e-5 * expected + 16 * precision * shaken(a, b, method, seen):
            raise TltError(
                f"verification failed: {matrix.name} at rank {rank} is off by {error:.4e} in the metric of --method "
                f"{method}, and its factors say {expected:.4e}; nothing was written; report it, with the command"
            )
    total = math.fsum(one.whole for one in errors.values())
    cost = {} if request.bits is None or not total else {"rounding": math.sqrt(rounding / total)}
    return {**reported(errors, method), **cost}
