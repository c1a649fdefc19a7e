"""What is there already of a training run: its output, the states of an unfinished one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tlt_cli.checkpoint.local import open_file
from tlt_cli.checkpoint.shards import is_single_file
from tlt_cli.checkpoint.writer import check_target
from tlt_cli.cli.console import Output, Table
from tlt_cli.cli.execute import Outcome, shard_size
from tlt_cli.cli.training_log import check_curves
from tlt_cli.cli.training_prefixes import hierarchy_of
from tlt_cli.cli.training_request import Request
from tlt_cli.cli.training_start import Subject, read_texts
from tlt_cli.errors import UsageError
from tlt_cli.training.saving import NOTHING
from tlt_cli.training.state import latest, read_extra


def check_run(request: Request, subject: Subject, output: Path, states: Path, out: Output) -> Outcome | None:
    """Refuse an output that must not be written; where --resume finds the run's output there, that is the outcome."""
    if subject.adapter is not None and is_single_file(output):
        raise UsageError(f"-o {output}: an adapter is a folder of several files; give a name without a suffix")
    if request.max_shard_size is not None:
        shard_size(request.max_shard_size)
    if request.tensorboard is not None:
        check_curves()
    if request.resume and not request.force and not states.exists() and _is_of(output, request, subject):
        out.note(f"{output} is there, and no state of an unfinished run: nothing is left to do")
        report = {"operation": "train", "path": str(output), "finished": True}
        return Outcome(report, Table(("", "value"), [("steps left", 0)]))
    force = request.force or (request.resume and _done(states))
    for source in (subject.source or NOTHING, *([subject.before] if subject.before is not None else [])):
        check_target(output, source, force=force)
    if latest(states) is not None and not (request.resume or request.force or request.dry_run):
        raise UsageError(
            f"{states} holds the state of an unfinished run: --resume goes on with it, --force begins anew"
        )
    return None


def _is_of(output: Path, request: Request, subject: Subject) -> bool:
    """Whether an output is what this command makes of this model and these texts, as its weights tell."""
    path = next(iter((output,) if output.is_file() else sorted(output.glob("*.safetensors"))), None)
    lineage = None if path is None else open_file(path, str(path)).lineage
    if lineage is None or lineage.get("command") != request.command(subject.name):
        return False
    if [parent["sha256"] for parent in lineage["parents"]] != subject.digests:
        return False
    texts = read_texts(request, subject, out=Output(quiet=True))
    _, hierarchy = hierarchy_of(request, subject, texts, out=Output(quiet=True))
    if lineage["details"].get("hierarchy", {}) != hierarchy:
        return False
    return bool(lineage["details"]["data"] == json.loads(json.dumps(texts.info)))


def _done(states: Path) -> bool:
    """Whether the last state is that of a run whose output was being written."""
    last = latest(states)
    return last is not None and bool(read_extra(last).get("done"))


def forget(states: Path) -> None:
    """Delete the states of a run: under another name, so that none is seen while their files go one by one."""
    gone = states.with_name(f".{states.name}.gone")
    if gone.exists():  # what a kill has left
        shutil.rmtree(gone)
    if states.exists():
        states.rename(gone)
        shutil.rmtree(gone)
