"""A merge carried out: opened, planned, written, verified. What `tlt merge` does, and `merge` in a notebook."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from tlt_cli.checkpoint.filling import one_thread_each
from tlt_cli.checkpoint.header import tensor_bytes
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.ranks import joined
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.record import source_name
from tlt_cli.checkpoint.shards import is_single_file
from tlt_cli.checkpoint.staging import check_room
from tlt_cli.checkpoint.together import together
from tlt_cli.checkpoint.writer import check_target
from tlt_cli.cli.console import Output
from tlt_cli.cli.execute import Outcome, Writing, carry_out, derived_output, retyped
from tlt_cli.cli.gluing import NO_GLUE, Gluing, glue, glue_words
from tlt_cli.cli.growing import table_files
from tlt_cli.cli.merging_stock import Merging, damage_rows, damaged, stock_plan
from tlt_cli.cli.opening import opened, parse_dtype
from tlt_cli.cli.vocabularies import check_vocabularies
from tlt_cli.errors import UsageError
from tlt_cli.families import Fit
from tlt_cli.families.groups import check_weights
from tlt_cli.surgery.merge import Source, counted, merge
from tlt_cli.surgery.verify import check, sample_tokens
from tlt_cli.surgery.verify_merge import shared_tokens, shortened, verify_merge
from tlt_cli.surgery.verify_slice import verify_written


def merge_checkpoints(
    sources: Sequence[str | Checkpoint],
    output: Path | None,
    *,
    out: Output,
    weights: Sequence[float] | None = None,
    gluing: Gluing = NO_GLUE,
    family: str | None = None,
    axes: Sequence[str] | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    verify: bool = True,
    seed: int = 0,
    layout: str = "grouped",
    vocab: str = "same",
    calibration: Sequence[str | Path] | None = None,
) -> Outcome:
    """Merge `sources` and write the result; without an `output` under a name made of the first one's.

    `layout` is "grouped", or "stock" for a dense model of the family itself, which only comes near their mean; then
    `calibration` are texts to fit its norms on. `vocab` is "same", or "union" to join tokenizers that differ.
    Notes and progress go to `out`. Raises TltError, with nothing written, for models that cannot lie side by side, and
    where the output does not compute their mean, or what was planned where that is another function. `seed` is that of
    the tokens to verify on and of glue's right factors.
    """
    _check_options(layout, vocab, None if gluing.fits else calibration)
    if gluing.present and layout != "grouped":
        raise UsageError("--glue stands between models that lie side by side: --layout grouped")
    if len(sources) < 2 and not gluing.present and layout == "grouped":
        raise UsageError(
            f"tlt merge takes two or more models, and {len(sources)} was given; one that is merged already takes "
            "--glue or --layout stock"
        )
    with joined() as team:
        with team.together():  # what one of several ranks refuses, all do
            kind = None if dtype is None else parse_dtype(dtype)
            found = [opened(source, out=out, family=family, axes=axes, values=not dry_run) for source in sources]
            shares = [1 / len(found)] * len(found) if weights is None else list(weights)
            check_weights(shares, len(found))
            first, values = found[0][0], together([checkpoint for checkpoint, _ in found])
            writing = Writing(
                output=output or derived_output(first, f"merged{len(found)}"), force=force, dry_run=dry_run,
                max_shard_size=max_shard_size, jobs=jobs,
            )  # fmt: skip
            check_target(writing.output, values, force=force)
            vocabulary = check_vocabularies(found, out=out, union=vocab == "union")
            bare = [_source(*one, tokens) for one, tokens in zip(found, vocabulary.rows, strict=True)]
            counted(bare, shares)
            if not dry_run:
                check_room(writing.output, _bytes(found, kind))
            # what can be refused was: hashing reads all of every file
            sources_of = [
                replace(source, sha256=checkpoint.digest()) for source, (checkpoint, _) in zip(bare, found, strict=True)
            ]
            ids = verification_ids(found, vocabulary.rows, seed)
            merging = Merging(found, sources_of, values, shares, vocabulary.rows)
            if layout == "stock":
                stored = stock_plan(merging, calibration=calibration, random=ids, measure=not dry_run, out=out)
            else:
                stored = merge(sources_of, shares)
            stored = glue(stored, gluing, values, found, calibration=calibration, seed=seed, out=out)
            if layout == "grouped" and not stored.exact:
                stored = damaged(merging, stored, ids)
            plan = retyped(stored, kind)
            plan = replace(plan, config={**plan.config, **vocabulary.config}, notes=(*vocabulary.notes, *plan.notes))
            kept = [path for path in first.companions if path.name not in vocabulary.replaced]
            values = replace(values, companions=tuple(kept))
            files = table_files(first, family, writing.output, out)
            if not is_single_file(writing.output):
                files.update(vocabulary.files)

        def compared(staged: Path) -> dict[str, Any]:
            written = open_checkpoint(staged)
            if not plan.exact:  # then it is not the mean, but what was planned it must be
                with one_thread_each():
                    proof = verify_written(plan, values, written, merging.fit(plan), seed=seed)
                check(replace(plan, exact=True), proof.found)
                return proof.report()
            coarse = any(_coarser(new.dtype, old.dtype) for new, old in zip(plan.tensors, stored.tensors, strict=True))
            result = verify_merge(plan, values, written, found, shares, ids, coarse=coarse, rows=vocabulary.rows)
            check(plan, result)
            return result.report()

        local = all(checkpoint.location is not None for checkpoint, _ in found)
        return carry_out(
            plan, values, out=out, writing=writing,
            command=_command(found, weights, kind, family, axes, max_shard_size, layout, vocab, calibration)
            + glue_words(gluing, calibration, seed),
            changes=[*_changes(found, plan.parameters), *damage_rows(plan)], files=files,
            verify=compared if verify and local else None,
        )  # fmt: skip


def parse_weights(text: str) -> list[float]:
    """ "1/4,0.75" -> [0.25, 0.75].

    >>> parse_weights("1/4,0.75")
    [0.25, 0.75]
    """
    try:
        return [float(Fraction(word.strip())) for word in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise UsageError(f"--weights {text}: expected a number for each model, such as 0.25,0.75 or 1/4,3/4") from error


def _check_options(layout: str, vocab: str, calibration: Sequence[str | Path] | None) -> None:
    for option, given, known in (("--layout", layout, ("grouped", "stock")), ("--vocab", vocab, ("same", "union"))):
        if given not in known:
            raise UsageError(f"{option} {given}: expected {' or '.join(known)}")
    if calibration and layout != "stock":
        raise UsageError("--calibration fits the norms of --layout stock, or with --glue-init fit what glue starts as")
    if layout == "stock" and vocab == "union":
        raise UsageError("--layout stock takes models of one vocabulary; --vocab union goes with --layout grouped")


def _source(checkpoint: Checkpoint, fitted: Fit, tokens: Sequence[int] | None) -> Source:
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
    return Source(fitted, dtypes, source_name(checkpoint), "", tokens)


def verification_ids(
    found: Sequence[tuple[Checkpoint, Fit]], rows: Sequence[Sequence[int] | None] | None, seed: int
) -> Tensor:
    """Ids [2, T] of tokens that all models know; `rows` are each one's own numbers of them, where it has others."""
    smallest = _smallest(found)
    ids = shortened(sample_tokens(smallest, seed=seed), smallest.sizes["vocab"])
    known = shared_tokens(rows)
    return ids if isinstance(known, slice) else known[ids % len(known)]


def _coarser(dtype: str, before: str) -> bool:
    return dtype != before and dtype not in ("F32", "F64")


def _bytes(found: Sequence[tuple[Checkpoint, Fit]], dtype: str | None) -> int:
    """Bytes of all tensors of all sources: no less is written."""
    return sum(
        tensor_bytes(dtype or checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)
        for checkpoint, fitted in found
        for name in fitted.places
    )


def _smallest(found: Sequence[tuple[Checkpoint, Fit]]) -> Fit:
    """The fit of the model with the fewest positions: what it can read, all can."""
    return min((part for _, fitted in found for part in fitted.parts), key=lambda part: part.sizes.get("position", 0))


def _command(
    found: Sequence[tuple[Checkpoint, Fit]],
    weights: Sequence[float] | None,
    dtype: str | None,
    family: str | None,
    axes: Sequence[str] | None,
    max_shard_size: str | None,
    layout: str,
    vocab: str,
    calibration: Sequence[str | Path] | None,
) -> str:
    """The command that makes the same bytes from the same sources: no paths, no words on how to print."""
    words = ["tlt", "merge", *(source_name(checkpoint) for checkpoint, _ in found)]
    words += ["--weights", ",".join(f"{weight!r}" for weight in weights)] if weights is not None else []
    words += ["--dtype", dtype.lower()] if dtype else []
    words += ["--family", Path(family).name] if family else []
    for axis in axes or ():
        words += ["--axis", axis]
    words += ["--layout", layout] if layout != "grouped" else []
    words += ["--vocab", vocab] if vocab != "same" else []
    for text in (calibration or ()) if layout == "stock" else ():
        words += ["--calibration", Path(text).name]
    words += ["--max-shard-size", max_shard_size] if max_shard_size else []
    return shlex.join(words)


def _changes(found: Sequence[tuple[Checkpoint, Fit]], parameters: int) -> list[tuple[str, str, str]]:
    before = sum(prod(checkpoint.tensors[name].shape) for checkpoint, fitted in found for name in fitted.places)
    return [("models", str(len(found)), "1"), ("parameters", f"{before:,}", f"{parameters:,}")]
