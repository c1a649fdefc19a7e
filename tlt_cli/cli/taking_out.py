"""One model of a merged checkpoint as a checkpoint of its own, for as long as a command works on it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from tlt_cli.checkpoint.foretold import foretold
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.ranks import joined
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.record import source_name
from tlt_cli.checkpoint.staging import Stage, absolute, plain_errors, staged
from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome, Writing, carry_out
from tlt_cli.cli.growing import table_files
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit
from tlt_cli.families.groups import Groups
from tlt_cli.surgery.unmerge import block

_QUIET = Output(quiet=True)


def label(groups: Groups, number: int) -> str:
    """What part `number`, from 0, is called in messages."""
    return f"part {number + 1} of {len(groups.parts)} ({groups.parts[number].name})"


def refuse_glued(groups: Groups, operation: str, participle: str) -> None:
    """TltError where the parts are no models by themselves any more, for a command that works on each of them."""
    if groups.joint is not None:
        raise TltError(
            f"the {len(groups.parts)} models of this checkpoint are {groups.joint}, so none of them can be "
            f"{participle} by itself; {operation} the models that it was merged from, and merge again"
        )


def nowhere(output: Path) -> Path:
    """Where parts stand in a dry run: nothing is there, and nothing will be."""
    return _stage(output).folder / "planned"


@contextmanager
def room_for_parts(output: Path) -> Iterator[Path]:
    """A folder for parts on the disk of `output`, for all ranks; gone in the end, whatever happens."""
    stage = _stage(output)
    with joined() as team, ExitStack() as cleanup:
        with team.together():
            if team.rank == 0:
                cleanup.enter_context(staged(stage.output, force=True))
                with plain_errors(stage.path):
                    stage.path.mkdir()
        yield stage.path


def _stage(output: Path) -> Stage:
    target = absolute(output)
    return Stage(target.with_name(f"{target.name}.parts"))


def taken_out(
    checkpoint: Checkpoint, fitted: Fit, number: int, output: Path, *, dry: bool, family: str | None, jobs: int | None
) -> tuple[Checkpoint, int]:
    """Part `number`, from 0, written to the folder `output`, or foretold; and its bytes."""
    assert fitted.groups is not None
    plan = block(fitted, {name: info.dtype for name, info in checkpoint.tensors.items()}, number)
    which = f"{number + 1}/{len(fitted.groups.parts)}"
    outcome = carry_out(
        plan, checkpoint, out=_QUIET, writing=Writing(output=output, dry_run=dry, jobs=jobs),
        command=shlex.join(["tlt", "slice", source_name(checkpoint), "--block", which]), changes=(),
        files=table_files(checkpoint, family, output, _QUIET),
    )  # fmt: skip
    return opened_or_foretold(outcome, output, checkpoint, label(fitted.groups, number), dry=dry), outcome.report[
        "bytes"
    ]


def opened_or_foretold(outcome: Outcome, output: Path, values: Checkpoint, name: str, *, dry: bool) -> Checkpoint:
    """What was written to `output`, or would be, of `values`; called `name` in messages."""
    if not dry:
        return replace(open_checkpoint(output), source=name)
    plan, lineage = outcome.plan, outcome.report["lineage"]
    assert plan is not None
    return foretold(output, plan.tensors, values, config=plan.config, lineage=lineage, name=name)


def refuse_dry(options: str) -> UsageError:
    """What is said where a dry run would have to read values of parts."""
    return UsageError(
        f"--dry-run knows headers alone, and {options} decides by values of parts that are not taken out yet; leave "
        "one of the two out"
    )


@contextmanager
def blaming(part: str) -> Iterator[None]:
    """What is refused of a part says of which; what is wrong with the options is wrong with them for all."""
    try:
        yield
    except UsageError:
        raise
    except TltError as error:
        text = str(error)
        raise type(error)(text if text.startswith(part) else f"{part}: {text}") from error
