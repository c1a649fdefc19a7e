"""A command for one model carried out on several that lie side by side: on each by itself, and merged again.

A merged model computes the mean of functions that do not read one another, so whatever keeps or changes each of them
does so to their mean. Every part is taken out, the command is run on it, and what becomes of all is merged with the
same names, weights and order. Until then parts stand in a folder beside the output, which goes in the end whatever
happens. Before any of it is written the whole is planned from headers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.staging import check_room
from tlt_cli.checkpoint.together import in_place_of
from tlt_cli.cli.console import Meter, Output
from tlt_cli.cli.execute import Outcome, Writing, carry_out
from tlt_cli.cli.growing import table_files
from tlt_cli.cli.merging import verification_ids
from tlt_cli.cli.opening import fitted_like, own_table
from tlt_cli.cli.taking_out import (
    blaming,
    label,
    nowhere,
    opened_or_foretold,
    refuse_dry,
    refuse_glued,
    room_for_parts,
    taken_out,
)
from tlt_cli.families import Fit
from tlt_cli.families.groups import Groups
from tlt_cli.surgery.merge import Source, merge
from tlt_cli.surgery.verify import check
from tlt_cli.surgery.verify_merge import verify_merge

# A part, where it goes, the family's own table if it has one, where words go, whether it is a dry run.
Run = Callable[[Checkpoint, Path, str | None, Output, bool], Outcome]
_OF_THE_WHOLE = ("path", "source", "command", "lineage", "files", "bytes", "tensors", "dry_run", "free_bytes")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is done to every part: the `operation` and its participle ("grow", "grown"), the whole command for the
    record, and how it is run on one of them.

    `reads` are options that decide by values, which a dry run has not. `judge` looks at the merged output before it
    takes its name.
    """

    operation: str
    participle: str
    words: str
    run: Run
    reads: str | None = None
    judge: Callable[[Path], Mapping[str, Any]] | None = None


@dataclass(frozen=True, eq=False)
class _Made:
    """What became of one part: its checkpoint, written or foretold, and what is said of it."""

    checkpoint: Checkpoint
    before: int
    report: dict[str, Any]
    details: dict[str, Any]
    exact: bool
    taken: int  # bytes of the part as it was, which go before the next one is taken out
    made: int


@dataclass(frozen=True)
class _Told(Output):
    """How a command speaks of one part: its notes are kept, its progress says which part it is."""

    label: str = ""
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def meter(self, label: str) -> Iterator[Meter]:
        with super().meter(f"{self.label}: {label}") as update:
            yield update


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """The merged source, the command, and how the output is written."""

    checkpoint: Checkpoint
    fitted: Fit
    groups: Groups
    command: Command
    out: Output
    writing: Writing
    family: str | None
    verify: bool
    seed: int

    @property
    def labels(self) -> list[str]:
        """What parts are called in messages."""
        return [label(self.groups, number) for number in range(len(self.groups.parts))]

    def each(self, folder: Path, *, dry: bool) -> list[_Made]:
        """Every part taken out, and the command run on it, inside of `folder`."""
        found, told = [], []
        for number, name in enumerate(self.labels):
            said = _Told(self.out.json, self.out.quiet, self.out.verbose, name)
            with blaming(name):
                found.append(self._one(folder, number, said, dry=dry))
            told.append([note for note in said.notes if note not in found[-1].report["notes"]])
        if not dry:
            for note in _shared(told, self.labels):
                self.out.note(note)
        return found

    def _one(self, folder: Path, number: int, said: _Told, *, dry: bool) -> _Made:
        taken, made = (folder / kind / str(number + 1) for kind in ("taken", "made"))
        part, size = taken_out(
            self.checkpoint, self.fitted, number, taken, dry=dry, family=self.family, jobs=self.writing.jobs
        )
        outcome = self.command.run(part, made, self.family or own_table(self.checkpoint), said, dry)
        plan, report = outcome.plan, outcome.report
        assert plan is not None
        opened = opened_or_foretold(outcome, made, part, said.label, dry=dry)
        if not dry:
            shutil.rmtree(taken, ignore_errors=True)  # of several ranks the first one may be ahead
        kept = {key: value for key, value in report.items() if key not in _OF_THE_WHOLE}
        own = self.groups.parts[number]
        before = sum(prod(info.shape) for info in part.tensors.values())
        return _Made(
            opened, before, {"name": own.name, "weight": own.weight, **kept}, plan.details, plan.exact,
            size, report["bytes"],
        )  # fmt: skip

    def merged(self, parts: Sequence[_Made], *, dry: bool, out: Output) -> Outcome:
        """What became of the parts, side by side again."""
        found = [(part.checkpoint, fitted_like(part.checkpoint, self.fitted)) for part in parts]
        sources = [
            Source(own, {name: info.dtype for name, info in checkpoint.tensors.items()}, part.name, part.sha256)
            for (checkpoint, own), part in zip(found, self.groups.parts, strict=True)
        ]
        plan, values = merge(sources, self.groups.weights), in_place_of(self.checkpoint, [one for one, _ in found])
        count, done = len(parts), self.command.participle
        notes = [
            f"each of the {count} models is {done} by itself; sizes and shares are those of each",
            *_shared([part.report["notes"] for part in parts], self.labels),
        ]

        def looked_at(staged: Path) -> dict[str, Any]:
            seen: dict[str, Any] = {}
            if self.verify:
                ids, written = verification_ids(found, None, self.seed), open_checkpoint(staged)
                result = verify_merge(plan, values, written, found, self.groups.weights, ids)
                check(plan, result)
                seen = result.report()
            return seen if self.command.judge is None else {**seen, **self.command.judge(staged)}

        whole = replace(
            plan, operation=self.command.operation, exact=all(part.exact for part in parts),
            details={**plan.details, "parts": [part.details for part in parts]}, notes=(*notes, *plan.notes),
        )  # fmt: skip
        outcome = carry_out(
            whole, values, out=out, writing=replace(self.writing, dry_run=dry), command=self.command.words,
            changes=self._changes(parts, whole.parameters),
            files=table_files(self.checkpoint, self.family, self.writing.output, out),
            verify=looked_at if self.verify or self.command.judge is not None else None,
        )  # fmt: skip
        return replace(outcome, report={**outcome.report, "parts": [part.report for part in parts]})

    def _changes(self, parts: Sequence[_Made], parameters: int) -> list[tuple[str, str, str]]:
        """Every size that changes in some part, the parameters of each, and those of all: rows of a table."""
        both = [(part.details.get("from"), part.details.get("to")) for part in parts]
        sizes = [(one, other) for one, other in both if isinstance(one, dict) and isinstance(other, dict)]
        rows = [
            (name.replace("_", " "), _several(one[name] for one, _ in sizes), _several(new[name] for _, new in sizes))
            for name in (sizes[0][0] if sizes else ())
            if any(one[name] != new[name] for one, new in sizes)
        ]
        for name, part in zip(self.labels, parts, strict=True):
            rows.append((f"parameters, {name}", f"{part.before:,}", f"{part.report['parameters']:,}"))
        before = sum(prod(info.shape) for info in self.checkpoint.tensors.values())
        return [*rows, ("parameters", f"{before:,}", f"{parameters:,}")]


def part_by_part(
    checkpoint: Checkpoint,
    fitted: Fit,
    command: Command,
    *,
    out: Output,
    writing: Writing,
    family: str | None,
    verify: bool,
    seed: int,
) -> Outcome:
    """Carry out the command on every model of a merged checkpoint and write them merged again.

    The report is the merge's, and its "parts" are what the command says of each. Raises TltError, with nothing written,
    where the models are no longer models by themselves, where the command refuses one of them, and where the output
    does not compute the mean of what became of them.
    """
    groups = fitted.groups
    assert groups is not None
    refuse_glued(groups, command.operation, command.participle)
    work = _Work(
        checkpoint=checkpoint, fitted=fitted, groups=groups, command=command, out=out, writing=writing, family=family,
        verify=verify, seed=seed,
    )  # fmt: skip
    if command.reads is None:
        planned = work.each(nowhere(writing.output), dry=True)
        told = work.merged(planned, dry=True, out=out if writing.dry_run else Output(quiet=True))
        if writing.dry_run:
            return told
        room = sum(part.made for part in planned) + max(part.taken for part in planned)
        check_room(writing.output, told.report["bytes"] + room)
    elif writing.dry_run:
        raise refuse_dry(command.reads)
    with room_for_parts(writing.output) as folder:
        return work.merged(work.each(folder, dry=False), dry=False, out=out)


def _shared(notes: Sequence[Sequence[str]], labels: Sequence[str]) -> list[str]:
    """The notes of all parts: those that every part has once, the others under its name."""
    alike = [text for text in notes[0] if all(text in other for other in notes[1:])]
    own = [
        text if text.startswith(f"{name}:") else f"{name}: {text}"
        for name, texts in zip(labels, notes, strict=True)
        for text in texts
        if text not in alike
    ]
    return [*alike, *own]


def _several(sizes: Iterator[int]) -> str:
    """One size for all, or each one's."""
    found = [f"{size:,}" for size in sizes]
    return found[0] if len(set(found)) == 1 else " / ".join(found)
