"""A slice carried out: opened, chosen, planned, written, verified. What `tlt slice` does, and `slice` in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.ranks import joined
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.record import source_name
from tlt_cli.checkpoint.writer import check_target
from tlt_cli.cli.calibrating import MOST_TOKENS, recorded
from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome, Writing, carry_out, derived_output, retyped
from tlt_cli.cli.growing import size_changes, table_files
from tlt_cli.cli.measuring import USUAL_CONTEXT, positions
from tlt_cli.cli.opening import opened, parse_dtype, tokenizer_for
from tlt_cli.cli.slice_request import Request, command, named
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit
from tlt_cli.families.factors import refuse_factored
from tlt_cli.model.part import Child, Part
from tlt_cli.model.text import load_tokens
from tlt_cli.surgery.glue import idle
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.slice import Chosen, Wanted, chosen, sliced, wanted_sizes
from tlt_cli.surgery.slice_sizes import smaller
from tlt_cli.surgery.targets import current
from tlt_cli.surgery.ungrow import Record, last_growth, ungrown
from tlt_cli.surgery.unmerge import block as block_of
from tlt_cli.surgery.verify_slice import Proof, check_slice, verify_slice, verify_written

if TYPE_CHECKING:
    from torch import Tensor

Checked = Callable[[Plan, Checkpoint], Proof]  # of the plan in the dtype that is written, and what was written


@dataclass(frozen=True, eq=False)
class Made:
    """A plan, and how what it writes is proved."""

    plan: Plan
    checked: Checked


def slice_checkpoint(source: str | Checkpoint, request: Request, *, out: Output) -> Outcome:
    """Slice `source` and write it; without an output under a name made of the source's and of what is kept.

    Notes and progress go to `out`. Raises TltError, with nothing written, for whatever cannot be kept exactly, and
    where the output does not compute what it does inside its parent.
    """
    if not request.cuts_a_block:
        _ = request.wanted  # what can never work is said before anything is opened
    with joined() as team:
        with team.together():  # what one of several ranks refuses, all do
            kind = None if request.dtype is None else parse_dtype(request.dtype)
            checkpoint, fitted = opened(
                source, out=out, family=request.family, axes=request.axes, values=not request.dry_run
            )
            output = request.output or derived_output(checkpoint, named(request))
            writing = Writing(
                output=output, force=request.force, dry_run=request.dry_run, max_shard_size=request.max_shard_size,
                jobs=request.jobs,
            )  # fmt: skip
            check_target(output, checkpoint, force=request.force)
            words = command(source_name(checkpoint), request, kind)
            of_parts = fitted.groups is not None and (request.cuts_a_block or request.block is None)
        if of_parts:
            from tlt_cli.cli.slicing_parts import slice_one, slice_parts

            if request.block is None:
                return slice_parts(checkpoint, fitted, request, writing, words, out=out)
            return slice_one(checkpoint, fitted, request, writing, words, kind, out=out)
        return slice_opened(checkpoint, fitted, request, writing, words, kind, out=out)


def slice_opened(
    checkpoint: Checkpoint,
    fitted: Fit,
    request: Request,
    writing: Writing,
    words: str,
    kind: str | None,
    *,
    out: Output,
    block: str | None = None,
) -> Outcome:
    """One model sliced, or one of several taken out. `words` are the command and `kind` the dtype it is written in;
    `block` says which of merged models it was."""
    with joined() as team:
        with team.together():
            wanted = request.wanted
            refuse_factored(fitted.lowrank, "slicing")
            local = checkpoint.location is not None  # what a dry run reads of the hub has no values
            text = text_of(checkpoint, fitted, request) if request.verify and local else None
            made = _made(checkpoint, fitted, wanted, request, text, out)
            plan = retyped(made.plan, kind)
            plan = plan if block is None else replace(plan, details={**plan.details, "block": block})
            files = table_files(checkpoint, request.family, writing.output, out)

        def compared(staged: Path) -> Mapping[str, Any]:
            proof = made.checked(plan, open_checkpoint(staged))
            check_slice(plan, proof)
            return proof.report()

        return carry_out(
            plan, checkpoint, out=out, writing=writing, command=words, changes=size_changes(plan, checkpoint),
            files=files, verify=compared if request.verify and local else None,
        )  # fmt: skip


def _made(
    checkpoint: Checkpoint, fitted: Fit, wanted: Wanted, request: Request, text: Tensor | None, out: Output
) -> Made:
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
    if fitted.groups is not None:
        return _one_of_several(checkpoint, fitted, dtypes, wanted, request, text)
    record = last_growth(checkpoint.lineage, fitted)
    if record is not None and not request.calibrates and _undoes(fitted, wanted, record, out):
        small, plan = ungrown(fitted, dtypes, record)
        whole = checkpoint, fitted
        of, lost = (whole, None) if plan.exact else (None, whole)
        return Made(
            plan,
            lambda plan, written: verify_written(
                plan, checkpoint, written, small, of=of, lost=lost, text=text, seed=request.seed
            ),
        )
    if request.calibrates:
        return _calibrated(checkpoint, fitted, dtypes, wanted, request, text, out)
    found = chosen(fitted, wanted)
    child, plan = sliced(fitted, dtypes, found)
    return _proved(checkpoint, fitted, found.part, child, plan, request, text)


def _proved(
    checkpoint: Checkpoint, fitted: Fit, part: Part, child: Child, plan: Plan, request: Request, text: Tensor | None
) -> Made:
    return Made(
        plan,
        lambda plan, written: verify_slice(
            fitted, part, child, plan, checkpoint, written, text=text, seed=request.seed
        ),
    )


def _one_of_several(
    checkpoint: Checkpoint,
    fitted: Fit,
    dtypes: Mapping[str, str],
    wanted: Wanted,
    request: Request,
    text: Tensor | None,
) -> Made:
    """One of the models that lie side by side in a merged checkpoint."""
    assert fitted.groups is not None and wanted.block is not None
    if wanted.level is not None:
        raise TltError("--block is one of the models side by side here: take it out, then slice its level")
    number = which(fitted, wanted.block)
    readable = fitted.groups.glue is not None and checkpoint.location is not None
    still = readable and idle(checkpoint.read, fitted.places)
    plan = block_of(fitted, dtypes, number, idle=still)
    own = fitted.part(number)
    return Made(
        plan, lambda plan, written: verify_written(plan, checkpoint, written, own, text=text, seed=request.seed)
    )


def which(fitted: Fit, block: tuple[int, int]) -> int:
    """The part, from 0, that --block K/N names. TltError unless there are N."""
    assert fitted.groups is not None
    count = len(fitted.groups.parts)
    if block[1] != count:
        raise TltError(f"this checkpoint is {count} models side by side: take one out with --block 1/{count}, then cut")
    return block[0] - 1


def _undoes(fitted: Fit, wanted: Wanted, record: Record, out: Output) -> bool:
    """Whether the sizes asked for are those that the model grew from."""
    named, before, now = wanted.sizes.named(), record.before, current(fitted)
    changed = {name for name, size in before.items() if now[name] != size}
    asked = {name for name in named if name in changed and named[name] == before[name]}
    if wanted.size or not asked or any(size != before[name] for name, size in named.items()):
        return False
    if changed <= named.keys() or smaller(fitted, wanted.sizes)[0] == before:
        return True
    options = " ".join(f"--{name.replace('_', '-')} {before[name]}" for name in before if name in changed)
    out.note(f"this cuts what was grown as if it had not been; to undo the growth name all that it changed: {options}")
    return False


def _calibrated(
    checkpoint: Checkpoint,
    fitted: Fit,
    dtypes: Mapping[str, str],
    wanted: Wanted,
    request: Request,
    text: Tensor | None,
    out: Output,
) -> Made:
    """What a text chooses and refits."""
    from tlt_cli.calibration.blocks import calibration_windows
    from tlt_cli.calibration.slicing import calibrated

    sizes, notes = wanted_sizes(fitted, wanted)
    if sizes["vocab"] != fitted.sizes["vocab"]:
        raise UsageError("--vocab keeps the first tokens; cut it in a second slice, without --order and --refit")
    tokens = load_tokens(tokenizer_for(checkpoint, fitted.sizes["vocab"], request.tokenizer), request.calibration)
    for note in tokens.notes:
        out.note(note)
    context = request.context or min(USUAL_CONTEXT, positions(fitted))
    ids = calibration_windows(tokens.ids, context, max(1, MOST_TOKENS // context))
    with out.progress(f"slice: reading {tokens.info['source']}") as progress:
        made = calibrated(
            fitted, checkpoint, ids, {name: size for name, size in sizes.items() if name != "vocab"},
            order=request.order, refit=request.refit, norm=wanted.norm, progress=progress,
        )  # fmt: skip
    told = {
        "order": request.order, "refit": request.refit, "context": context,
        "calibration": recorded(tokens, ids.numel()), "calibrated": made.details,
    }  # fmt: skip
    found = Chosen(made.part, notes=(*notes, *made.notes))
    child, plan = sliced(fitted, dtypes, found, tensors=made.plan_tensors, config=made.config, details=told)
    if made.plan_tensors is None:
        return _proved(checkpoint, fitted, made.part, child, plan, request, text)
    return Made(
        plan,
        lambda plan, written: verify_written(
            plan, checkpoint, written, child.fit, lost=(checkpoint, fitted), text=text, seed=request.seed
        ),
    )


def text_of(checkpoint: Checkpoint, fitted: Fit, request: Request) -> Tensor | None:
    """The text to verify on, as ids; None where none is given."""
    if not request.data:
        return None
    return load_tokens(tokenizer_for(checkpoint, fitted.sizes["vocab"], request.tokenizer), request.data).ids
