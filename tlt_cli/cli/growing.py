"""A growth carried out: opened, planned, verified, written. What `tlt grow` does, and `grow` in a notebook."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from tlt_cli.axes import shape
from tlt_cli.checkpoint.header import tensor_bytes
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.ranks import joined
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.record import source_name
from tlt_cli.checkpoint.shards import is_single_file
from tlt_cli.checkpoint.staging import check_room
from tlt_cli.checkpoint.writer import check_target
from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome, Writing, carry_out, derived_output, retyped
from tlt_cli.cli.opening import OWN_TABLE, opened, own_table, parse_dtype, tokenizer_for
from tlt_cli.errors import UsageError
from tlt_cli.families import Fit
from tlt_cli.model.text import load_tokens
from tlt_cli.surgery.grow import Growth, Recipe, grown
from tlt_cli.surgery.optimizer import ADVICE, STATE, advice, grow_moments
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.targets import Sizes
from tlt_cli.surgery.verify import check, sample_tokens, verify


def grow_checkpoint(
    source: str | Checkpoint,
    output: Path | None,
    sizes: Sizes,
    recipe: Recipe,
    *,
    out: Output,
    optimizer_state: Path | None = None,
    data: Sequence[Path] | None = None,
    tokenizer: str | None = None,
    family: str | None = None,
    axes: Sequence[str] | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    verify: bool = True,
) -> Outcome:
    """Grow `source` to `sizes` and write it; without an `output` under a name made of the source's and the sizes.

    Notes and progress go to `out`. Raises TltError, with nothing written, for whatever cannot be done, and where a
    method that keeps the function misses its bound.
    """
    with joined() as team:
        with team.together():  # what one of several ranks refuses, all do
            kind = None if dtype is None else parse_dtype(dtype)
            if data and not verify:
                raise UsageError("--data is a text to verify on, and --no-verify verifies nothing; drop one of the two")
            checkpoint, fitted = opened(source, out=out, family=family, axes=axes, values=not dry_run)
            named = "-".join(f"{name.replace('_', '')}{size}" for name, size in sizes.named().items()) or recipe.method
            writing = Writing(
                output=output or derived_output(checkpoint, named), force=force, dry_run=dry_run,
                max_shard_size=max_shard_size, jobs=jobs,
            )  # fmt: skip
            check_target(writing.output, checkpoint, force=force)
            words = _command(checkpoint, sizes.named(), recipe, kind, family, axes, max_shard_size)
        if fitted.groups is not None:
            if optimizer_state is not None:
                raise UsageError("--optimizer-state grows the moments of one model, and this is several side by side")

            def run(part: Checkpoint, output: Path, table: str | None, out: Output, dry: bool) -> Outcome:
                return grow_checkpoint(
                    part, output, sizes, recipe, out=out, data=data, tokenizer=tokenizer, family=table, dtype=dtype,
                    dry_run=dry, jobs=jobs, verify=verify,
                )  # fmt: skip

            from tlt_cli.cli.part_by_part import Command, part_by_part

            return part_by_part(
                checkpoint, fitted, Command(operation="grow", participle="grown", words=words, run=run),
                out=out, writing=writing, family=family, verify=verify, seed=recipe.seed,
            )  # fmt: skip
        with team.together():
            dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
            room = lambda new: check_room(writing.output, _bytes(fitted, new, dtypes, kind))  # noqa: E731
            growth, plan = grown(fitted, dtypes, sizes, recipe, room=room)
            plan = retyped(plan, kind)
            files = table_files(checkpoint, family, writing.output, out)
            if optimizer_state is not None:
                if is_single_file(writing.output):
                    raise UsageError("--optimizer-state writes files beside the model: let -o name a folder")
                plan, advised = _with_moments(plan, growth, optimizer_state)
                files |= advised
            checked = None
            if verify and checkpoint.location is not None:  # what a dry run reads of the hub has no tokenizer
                ids = _tokens(checkpoint, fitted, data, tokenizer, recipe.seed)
                checked = lambda staged: _verified(fitted, plan, checkpoint, ids, open_checkpoint(staged))  # noqa: E731
        return carry_out(
            plan, checkpoint, out=out, writing=writing, command=words, changes=size_changes(plan, checkpoint),
            files=files, verify=checked,
        )  # fmt: skip


def table_files(checkpoint: Checkpoint, family: str | None, output: Path, out: Output) -> dict[str, bytes]:
    """A family table of the user's own as a file of the output, which nobody could open without it."""
    table = own_table(checkpoint) if family is None else family if family.endswith(".toml") else None
    if table is None:
        return {}
    if is_single_file(output):
        out.note(f"{output} has no place for the family table: keep {table} and pass --family with it")
        return {}
    return {OWN_TABLE: Path(table).read_bytes()}


def _bytes(fitted: Fit, sizes: Mapping[str, int], dtypes: Mapping[str, str], dtype: str | None) -> int:
    """Bytes of all tensors at the new sizes, found without any map."""
    total = Fraction(0)
    for name, place in fitted.places.items():
        size = tensor_bytes(dtype or dtypes[name], shape(place.arrow, sizes))
        total += size if place.layer is None else Fraction(size * sizes["layer"], fitted.sizes["layer"])
    return int(total)


def _command(
    checkpoint: Checkpoint,
    sizes: Mapping[str, int],
    recipe: Recipe,
    dtype: str | None,
    family: str | None,
    axes: Sequence[str] | None,
    max_shard_size: str | None,
) -> str:
    """The command that makes the same bytes from the same source: no paths, no words on how to print."""
    words = ["tlt", "grow", source_name(checkpoint)]
    for name, size in sizes.items():
        words += [f"--to-{name.replace('_', '-')}", str(size)]
    defaults = type(recipe)()
    words += ["--method", recipe.method]
    for name in ("fill", "noise", "split", "depth", "seed"):
        if getattr(recipe, name) != getattr(defaults, name):
            words += [f"--{name}", str(getattr(recipe, name))]
    words += ["--dtype", dtype.lower()] if dtype else []
    words += ["--family", Path(family).name] if family else []
    for axis in axes or ():
        words += ["--axis", axis]
    words += ["--max-shard-size", max_shard_size] if max_shard_size else []
    return shlex.join(words)


def size_changes(plan: Plan, checkpoint: Checkpoint) -> list[tuple[str, str, str]]:
    """Every size before and after, where the plan tells them, and the number of parameters: rows of a table."""
    before, after = plan.details.get("from", {}), plan.details.get("to", {})
    rows = [(name.replace("_", " "), f"{before[name]:,}", f"{after[name]:,}") for name in before]
    whole = checkpoint.parents or (checkpoint,)
    count = sum(prod(info.shape) for one in whole for info in one.tensors.values())
    return [*rows, ("parameters", f"{count:,}", f"{plan.parameters:,}")]


def _tokens(checkpoint: Checkpoint, fitted: Fit, data: Sequence[Path] | None, tokenizer: str | None, seed: int) -> Any:
    if not data:
        return sample_tokens(fitted, seed=seed)
    text = load_tokens(tokenizer_for(checkpoint, fitted.sizes["vocab"], tokenizer), data)
    return sample_tokens(fitted, text.ids, seed=seed)


def _verified(fitted: Fit, plan: Plan, checkpoint: Checkpoint, ids: Any, staged: Checkpoint) -> dict[str, Any]:
    found = verify(fitted, plan, checkpoint, ids, written=staged)
    check(plan, found)
    return found.report()


def _with_moments(plan: Plan, growth: Growth, state: Path) -> tuple[Plan, dict[str, bytes]]:
    """The plan with the optimizer's state beside the model, and the advice on its hyperparameters as a file."""
    moments = grow_moments(growth, open_checkpoint(state / STATE))
    told = advice(growth)
    text = json.dumps(told, indent=2) + "\n"
    details = {**plan.details, "optimizer": {"file": STATE, "advice": told}}
    return replace(plan, tensors=(*plan.tensors, *moments), details=details), {ADVICE: text.encode()}
