"""A factorization carried out: opened, ranks chosen, planned, written, measured. What `tlt factor` does."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlt_cli.checkpoint.header import TensorInfo
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.record import source_name
from tlt_cli.checkpoint.shards import is_single_file
from tlt_cli.checkpoint.writer import check_target
from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome, Writing, carry_out, derived_output, retyped
from tlt_cli.cli.factor_request import DENSE, LOWRANK, Request
from tlt_cli.cli.growing import table_files
from tlt_cli.cli.measuring import USUAL_CONTEXT, positions, windows_at_once
from tlt_cli.cli.opening import load_decoder, opened_if_known, parse_dtype, tokenizer_for
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit, fit
from tlt_cli.families.factors import refuse_factored
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.modeling import AUTO_MAP, MODELING, modeling_source
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.text import Tokens, load_tokens
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
from tlt_cli.surgery.metrics import needs_text
from tlt_cli.surgery.plan import Plan


@dataclass(frozen=True)
class Opened:
    """A checkpoint, its family if it has one, its tensors without those that are computed anew, and its matrices."""

    checkpoint: Checkpoint
    fitted: Fit | None
    tensors: Mapping[str, TensorInfo]
    found: Sequence[Matrix]


def opened_matrices(source: str, request: Request, *, out: Output, values: bool) -> Opened:
    """Open the source and find its matrices. TltError where it has none."""
    checkpoint, fitted = opened_if_known(source, out=out, family=request.family, axes=request.axes, values=values)
    if fitted is not None:
        refuse_factored(fitted.lowrank, "factoring")
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

    return Factorizations(opened.checkpoint, request.weighing, seen_by_text(opened, request, out=out))


def chosen_ranks(opened: Opened, request: Request, made: Factorizations, *, out: Output) -> Ranks:
    """The rank of every matrix. Only shares of energy and the global allocation take decompositions."""
    found, saving = opened.found, request.format == LOWRANK
    if request.rank is not None:
        return at_rank(found, request.rank, saving=saving)
    if request.keep is not None and request.sharing == UNIFORM:
        return at_keep(found, request.keep, saving=saving)
    decompose_all(found, made, out=out)
    if request.keep is not None:
        return allocated(found, {matrix.name: made.losses(matrix) for matrix in found}, request.keep)
    assert request.energy is not None
    return at_energy(found, {matrix.name: made.spectrum(matrix) for matrix in found}, request.energy, saving=saving)


def decompose_all(found: Sequence[Matrix], made: Factorizations, *, out: Output) -> None:
    """Decompose every matrix once, with a progress bar."""
    total = sum(matrix.size for matrix in found)
    with out.progress(f"factor: decomposing {len(found)} matrices") as progress:
        done = 0
        for matrix in found:
            made.spectrum(matrix)
            done += matrix.size
            progress(done, total)


def factor_checkpoint(source: str, request: Request, *, plot: Path | None = None, out: Output) -> Outcome:
    """Factor `source` and write it; without an output under a name made of the source's and the size.

    Notes and progress go to `out`. Raises TltError, with nothing written, for whatever cannot be done, and where what
    was written is not what was computed.
    """
    if plot is not None:
        raise UsageError("--plot draws a sweep; give it with --rank-sweep")
    kind = None if request.dtype is None else parse_dtype(request.dtype)
    opened = opened_matrices(source, request, out=out, values=not request.dry_run or request.looks)
    sized = next(name for name in ("rank", "keep", "energy") if getattr(request, name) is not None)
    output = request.output or derived_output(opened.checkpoint, f"{sized}{getattr(request, sized)}")
    check_target(output, opened.checkpoint, force=request.force)
    if request.compresses:
        from tlt_cli.cli.compressing import compress_checkpoint

        return compress_checkpoint(opened, request, output=output, kind=kind, out=out)
    made = decomposed(opened, request, out=out)
    ranks = chosen_ranks(opened, request, made, out=out)
    return write_ranks(opened, request, ranks, made, output=output, kind=kind, out=out)


def eval_text(opened: Opened, request: Request, *, out: Output) -> Tokens | None:
    """The text to judge by, where one is wanted; it takes a family, for a model must run."""
    if not request.eval and request.max_perplexity is None:
        return None
    if opened.fitted is None:
        raise TltError(f"{opened.checkpoint.source}: no family fits, so nothing can run it; --eval needs one")
    tokenizer = tokenizer_for(opened.checkpoint, opened.fitted.sizes["vocab"], request.tokenizer)
    tokens = load_tokens(tokenizer, request.eval)
    for note in tokens.notes:
        out.note(note)
    return tokens


def read_with(decoder: Decoder, fitted: Fit, text: Tokens, request: Request) -> dict[str, Any]:
    """{perplexity, nll, tokens} of the text."""
    context = request.context or min(USUAL_CONTEXT, positions(fitted))
    return perplexity(decoder, text.ids, context, windows_at_once(fitted, context))


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
) -> Outcome:
    """Plan and write the checkpoint at these ranks. `size` is the option that gives them where the request has none.

    With `judged` the output reads the request's text, where it has one, before it takes its name.
    """
    check_some(ranks)
    by_matrix = {matrix: ranks.factored[matrix.name] for matrix in opened.found if matrix.name in ranks.factored}
    plan = retyped(_plan(opened, request, ranks, by_matrix, made), kind)
    writing = Writing(
        output=output, force=request.force, dry_run=request.dry_run, max_shard_size=request.max_shard_size,
        jobs=request.jobs,
    )  # fmt: skip
    files = table_files(opened.checkpoint, request.family, output, out)
    if plan.config.get("auto_map") == AUTO_MAP and not is_single_file(output):
        files[MODELING] = modeling_source()
    text = eval_text(opened, request, out=out) if judged else None
    checked = None
    if (request.verify or text is not None) and not request.dry_run:
        checked = lambda staged: _checked(opened, request, by_matrix, made, text, open_checkpoint(staged))  # noqa: E731
    return carry_out(
        plan, opened.checkpoint, out=out, writing=writing, command=factor_command(opened, request, kind, size),
        changes=_changes(opened, ranks, plan), files=files, verify=checked,
    )  # fmt: skip


def _plan(
    opened: Opened, request: Request, ranks: Ranks, by_matrix: Mapping[Matrix, int], made: Factorizations
) -> Plan:
    details = {
        "method": request.weighing, "format": request.format, "ranks": dict(ranks.by_slot),
        "linear_parameters": {"from": ranks.before, "to": ranks.parameters}, "keep": ranks.keep,
    }  # fmt: skip
    stay = [slot for slot, rank in ranks.by_slot.items() if rank is None]
    notes = [f"{len(stay)} of {len(ranks.by_slot)} matrices stay dense: {_some(stay)}"] if stay else []
    if request.format == DENSE:
        return multiplied_plan(
            opened.tensors, opened.checkpoint.config, by_matrix, made.factors, details=details, notes=notes
        )
    if opened.fitted is None:
        notes.append("no family fits: the factors are stored side by side, for a loader of your own")
        return separate_plan(
            opened.tensors, opened.checkpoint.config, by_matrix, made.factors, details=details, notes=notes
        )
    slots = {matrix.name: matrix for matrix in by_matrix}
    return factored_plan(
        opened.fitted, {name: info.dtype for name, info in opened.tensors.items()},
        [Factored(matrix, rank) for matrix, rank in by_matrix.items()],
        lambda slot: made.factors(slots[slot], by_matrix[slots[slot]]), details=details, notes=notes,
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
    words += ["--context", str(request.context)] if request.context and needs_text(request.weighing) else []
    for glob in request.only:
        words += ["--only", glob]
    words += ["--format", request.format]
    words += ["--dtype", kind.lower()] if kind else []
    words += ["--family", Path(request.family).name] if request.family else []
    for axis in request.axes or ():
        words += ["--axis", axis]
    words += ["--max-shard-size", request.max_shard_size] if request.max_shard_size else []
    return shlex.join(words)


def _changes(opened: Opened, ranks: Ranks, plan: Plan) -> list[tuple[str, str, str]]:
    count = sum(math.prod(info.shape) for info in opened.tensors.values())
    return [
        ("matrices", str(len(ranks.by_slot)), f"{len(ranks.factored)} factored"),
        ("their parameters", f"{ranks.before:,}", f"{ranks.parameters:,} ({ranks.keep:.1%})"),
        ("parameters", f"{count:,}", f"{plan.parameters:,} ({plan.parameters / count:.1%})"),
    ]


def _checked(
    opened: Opened,
    request: Request,
    by_matrix: Mapping[Matrix, int],
    made: Factorizations,
    text: Tokens | None,
    staged: Checkpoint,
) -> dict[str, Any]:
    """What is known of the output before it takes its name. TltError where it is not as it should be."""
    found = _verified(by_matrix, made, opened.checkpoint, staged, request) if request.verify else {}
    return found | judge(opened, request, text, staged)


def judge(opened: Opened, request: Request, text: Tokens | None, staged: Checkpoint) -> dict[str, Any]:
    """How well the output reads the text; nothing without one. TltError beyond the request's bound."""
    found: dict[str, Any] = {}
    if text is not None:
        assert opened.fitted is not None
        written = fit({name: info.shape for name, info in staged.tensors.items()}, staged.config, family=request.family)
        read = read_with(load_decoder(staged, written, device=request.device), opened.fitted, text, request)
        found |= {**read, "corpus": text.info["source"], "corpus_sha256": text.info["sha256"]}
        if request.max_perplexity is not None and read["perplexity"] > request.max_perplexity:
            raise TltError(
                f"the perplexity is {read['perplexity']:.6g}, and --max-perplexity allows {request.max_perplexity:g}; "
                "nothing was written"
            )
    return found


def _verified(
    by_matrix: Mapping[Matrix, int],
    made: Factorizations,
    source: Checkpoint,
    staged: Checkpoint,
    request: Request,
) -> dict[str, Any]:
    """What was written against the source: ||W - W'|| / ||W|| of every factored matrix, and of all of them together.

    Plain SVD must lose what its spectrum says, up to the rounding of the dtype written. TltError where it does not.
    """
    import torch

    from tlt_cli.checkpoint.cast import torch_dtype

    lost = total = 0.0
    errors = {}
    for matrix, rank in by_matrix.items():
        weight = read_matrix(source, matrix).double()
        name = matrix.tensor if request.format == DENSE else f"{matrix.name}.lowrank_a.weight"
        precision = torch.finfo(torch_dtype(staged.tensors[name].dtype)).eps
        if request.format == DENSE:
            written = read_matrix(staged, matrix).double()
        else:
            a, b = (staged.read(f"{matrix.name}.lowrank_{side}.weight").double() for side in "ab")
            product = b @ a  # a table of embeddings is stored words by entries
            written = product if product.shape == weight.shape else product.T
        norm, error = float(weight.norm()), float((weight - written).norm())
        lost, total = lost + error**2, total + norm**2
        errors[matrix.name] = error / norm if norm else 0.0
        if request.weighing == "svd":
            expected = math.sqrt(float(made.losses(matrix)[rank]))
            if abs(error - expected) > 1e-5 * expected + 16 * precision * norm:
                raise TltError(
                    f"verification failed: {matrix.name} at rank {rank} is off by {error:.4e}, and its spectrum says "
                    f"{expected:.4e}; nothing was written; report it, with the command"
                )
    relative = math.sqrt(lost / total) if total else 0.0
    return {"error": relative, "errors": errors}
