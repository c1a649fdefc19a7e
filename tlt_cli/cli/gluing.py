"""Glue put into a merge: what `tlt merge --glue` asks for, and where it starts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import Tensors
from tlt_cli.cli.calibrating import MOST_TOKENS, recorded
from tlt_cli.cli.console import Output
from tlt_cli.cli.measuring import USUAL_CONTEXT, positions
from tlt_cli.cli.opening import tokenizer_for
from tlt_cli.errors import UsageError
from tlt_cli.families import Fit, fit
from tlt_cli.model.describe import describe
from tlt_cli.model.grouped import Grouped
from tlt_cli.model.text import load_tokens
from tlt_cli.model.weights import load
from tlt_cli.surgery.glue import NONE, check_kind, glued
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.verify import planned_values

IDENTITY, FITTED = "identity", "fit"
_TEXT_TOKENS = MOST_TOKENS // 4  # of the calibration text


@dataclass(frozen=True)
class Gluing:
    """The options of `tlt merge` that are about glue."""

    kind: str = NONE
    rank: int | None = None
    init: str = IDENTITY

    def __post_init__(self) -> None:
        check_kind(self.kind, self.rank)
        if self.init not in (IDENTITY, FITTED):
            raise UsageError(f"--glue-init {self.init} is not known; take {IDENTITY} or {FITTED}")
        if self.init == FITTED and self.kind == NONE:
            raise UsageError("--glue-init says how glue starts, and there is none; add --glue lowrank")

    @property
    def present(self) -> bool:
        """Whether there is any."""
        return self.kind != NONE

    @property
    def fits(self) -> bool:
        """Whether it starts from a text."""
        return self.init == FITTED


NO_GLUE = Gluing()


def glue_words(gluing: Gluing, calibration: Sequence[str | Path] | None, seed: int) -> str:
    """The options as typed, behind a space; nothing where there is no glue."""
    if not gluing.present:
        return ""
    words = ["--glue", gluing.kind]
    words += [] if gluing.rank is None else ["--glue-rank", str(gluing.rank)]
    words += ["--glue-init", gluing.init] if gluing.fits else []
    for text in (calibration or ()) if gluing.fits else ():
        words += ["--calibration", Path(text).name]
    return " " + shlex.join([*words, *(["--seed", str(seed)] if seed else [])])


def glue(
    plan: Plan,
    gluing: Gluing,
    values: Tensors,
    found: Sequence[tuple[Checkpoint, Fit]],
    *,
    calibration: Sequence[str | Path] | None = None,
    seed: int,
    out: Output,
) -> Plan:
    """The plan of a merge with the glue that was asked for; where it is fitted, all models are run."""
    started = glued(plan, gluing.kind, rank=gluing.rank, seed=seed)
    if not gluing.fits:  # and where there is none it never does
        return started
    from tlt_cli.calibration.blocks import calibration_windows
    from tlt_cli.calibration.stitch import stitch

    whole = fit(started.shapes, started.config, family=found[0][1].family)
    tokens = load_tokens(
        tokenizer_for(found[0][0], whole.sizes["vocab"], None), [Path(text) for text in calibration or ()] or None
    )
    for note in tokens.notes:
        out.note(note)
    context = min(USUAL_CONTEXT, *(positions(fitted) for _, fitted in found), max(2, len(tokens.ids) // 8))
    ids = calibration_windows(tokens.ids, context, max(4, _TEXT_TOKENS // context))
    decoder = load(planned_values(started, values), whole.places, describe(whole))
    assert isinstance(decoder, Grouped)
    with out.progress(f"stitching on {tokens.info['source']}") as progress:
        stitched = stitch(decoder, ids, progress=progress)
    start, best = stitched.losses[0.0], stitched.losses[stitched.share]
    out.note(
        f"--glue-init fit: s={stitched.share:g} of {', '.join(f'{share:g}' for share in stitched.losses)}; at step 0 "
        f"the loss on windows held out is {best:.4f} nats, and {start:.4f} from the identity"
    )
    details = {**stitched.data(), "calibration": recorded(tokens, ids.numel())}
    made = glued(plan, gluing.kind, rank=gluing.rank, seed=seed, starts=stitched.starts)
    return replace(made, details={**made.details, "glue": {**made.details["glue"], "fit": details}})
