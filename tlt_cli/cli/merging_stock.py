"""`tlt merge --layout stock`: the plan of a dense stock model, calibrated where there is text, and what it has lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tlt_cli.calibration.blocks import calibration_windows
from tlt_cli.calibration.stock_gains import stock_gains
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.cli.calibrating import recorded
from tlt_cli.cli.console import Output
from tlt_cli.cli.opening import tokenizer_for
from tlt_cli.errors import TltError
from tlt_cli.families import Fit, fit
from tlt_cli.model.compare import Distance, distance
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.text import Tokens, load_tokens
from tlt_cli.surgery.merge import Source
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.stock_layout import check_head_norms, stock_layout
from tlt_cli.surgery.verify import planned_decoder
from tlt_cli.surgery.verify_merge import mean_logits, shared_tokens

_CONTEXT, _WINDOWS, _MOST_LOGITS = 128, 32, 1 << 23


@dataclass(frozen=True)
class Merging:
    """What is merged: the opened checkpoints and what a surgery reads of them, their shares, the rows of tokens."""

    found: Sequence[tuple[Checkpoint, Fit]]
    sources: Sequence[Source]
    values: Checkpoint
    weights: Sequence[float]
    rows: Sequence[Sequence[int] | None]

    def mean(self, ids: Tensor) -> Tensor:
        """Logits of the exact merge."""
        return mean_logits(self.found, self.weights, ids, rows=self.rows)

    def planned(self, plan: Plan) -> Decoder:
        """What the plan will write, streamed."""
        return planned_decoder(plan, self.fit(plan), self.values, dtype=torch.float32)

    def fit(self, plan: Plan) -> Fit:
        """What the plan will write, fitted."""
        return fit(plan.shapes, plan.config, family=self.found[0][1].family)


def stock_plan(
    merging: Merging, *, calibration: Sequence[str | Path] | None, random: Tensor, measure: bool, out: Output
) -> Plan:
    """The Plan, its gains fitted to every other window of the calibration text, and its damage in "details": how far
    it is from the mean of the models on `random` ids [B, T] and on the other windows. Without `measure` neither."""
    plan = stock_layout(merging.sources, merging.weights)
    if not measure:
        out.note("gains and damage of --layout stock are found when it is written")
        return plan
    check_head_norms(merging.sources, merging.values)
    text, gains = None, None
    if calibration:
        decoder = merging.planned(plan)
        tokens, fitted, text = _text(merging, decoder.longest, calibration, out=out)
        with out.progress("calibrating the norms"):
            gains = stock_gains(decoder, fitted, len(plan.details["models"]))
        plan = stock_layout(merging.sources, merging.weights, gains)
        plan.details["calibration"] = recorded(tokens, fitted.numel())
        spread = max(abs(gain) for each in gains.values() for gain in each)
        out.detail(f"largest |log gain| {spread:.3g}")
    plan = damaged(merging, plan, random)
    damage = plan.details["damage"]
    found = damage["random"]
    notes = [
        "A stock model has one norm for the whole width, and these models had one each: it is not the mean of their "
        f"logits. On random tokens it differs by {found['relative']:.3g} of the logits' deviation and KL "
        f"{found['kl']:.3g}" + ("." if calibration else "; no text was given to calibrate on.")
    ]
    if text is not None:
        found, perplexities = _lost(merging, plan, text)
        damage["text"] = {**_report(found), "perplexity": perplexities}
        notes.append(
            f"On windows of the text that it was not calibrated on: {found.relative:.3g} of the deviation, KL "
            f"{found.kl:.3g}, perplexity {perplexities['stock']:.6g} where the mean of the models has "
            f"{perplexities['mean']:.6g}."
        )
    return replace(plan, notes=(*plan.notes, *notes))


def damaged(merging: Merging, plan: Plan, ids: Tensor) -> Plan:
    """The plan with how far it is from the mean of the models, on random ids [B, T], as "damage" in its details."""
    return replace(plan, details={**plan.details, "damage": {"random": _report(_lost(merging, plan, ids)[0])}})


def damage_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """What was lost, as rows of (what, before, after)."""
    rows = []
    for where, found in plan.details.get("damage", {}).items():
        rows.append((f"max |Δlogit| / deviation from the mean, {where}", "", f"{found['relative']:.4g}"))
        rows.append((f"KL from the mean, {where}", "", f"{found['kl']:.4g}"))
        if "perplexity" in found:
            both = found["perplexity"]
            rows.append((f"perplexity, {where}", f"{both['mean']:.6g}", f"{both['stock']:.6g}"))
    return rows


def _text(
    merging: Merging, longest: int | None, calibration: Sequence[str | Path], *, out: Output
) -> tuple[Tokens, Tensor, Tensor]:
    """The text as ids, and its windows [N, T], no longer than `longest`: even ones to calibrate on, odd ones to measure
    on."""
    vocab = min(fitted.sizes["vocab"] for _, fitted in merging.found)
    tokens = load_tokens(tokenizer_for(merging.found[0][0], vocab, None), calibration)
    for note in tokens.notes:
        out.note(note)
    context = min(limit for limit in (longest, _CONTEXT, len(tokens.ids) // 2) if limit is not None)
    if context < 2:
        raise TltError(f"{tokens.info['source']} has {len(tokens.ids)} tokens; calibration takes 4 or more")
    windows = calibration_windows(tokens.ids, context, _WINDOWS)
    most = max(1, _MOST_LOGITS // (context * vocab))
    return tokens, windows[::2], windows[1::2][:most]


@torch.no_grad()
def _lost(merging: Merging, plan: Plan, ids: Tensor) -> tuple[Distance, dict[str, float]]:
    mean, made = merging.mean(ids), merging.planned(plan)(ids)
    known = shared_tokens(merging.rows)
    nats = {
        name: functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
        for name, logits in (("mean", mean), ("stock", made))
    } if isinstance(known, slice) else {}  # fmt: skip
    return distance(mean, made[..., known]), {name: math.exp(value) for name, value in nats.items()}


def _report(found: Distance) -> dict[str, Any]:
    return {"relative": found.relative, **asdict(found)}
