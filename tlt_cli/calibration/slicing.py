"""Which part of a model to keep, by what a text shows, and its weights moved to make up for the rest.

    importance  entries of every axis by how much they matter on the text, in their old order
    pca         the stream turned onto its principal directions, the first of which stay; other axes by importance
    prefix      the first entries, as without a text; for a refit

Without `norm` the gains of norms over fewer entries are calibrated: E[rms of those that stay / rms of all].
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlt_cli.calibration.blocks import Blocks
from tlt_cli.calibration.drift import STAGES
from tlt_cli.calibration.head_refit import refit_head
from tlt_cli.calibration.importance import ENERGY, REFIT, Importance, channels, importance, layers_by
from tlt_cli.calibration.moments import Progress, streams
from tlt_cli.calibration.principal import Piece, directions, turned_cuts, untied
from tlt_cli.calibration.slice_refit import Refitted, check_enough
from tlt_cli.calibration.slice_refit import refit as refit_blocks
from tlt_cli.calibration.survey import look, normed
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families import Fit
from tlt_cli.families.place import named
from tlt_cli.model.cut import Cut, Index
from tlt_cli.model.decoder import HEAD_NORMS
from tlt_cli.model.nested import prefix, sizes_of, without_levels
from tlt_cli.model.part import Part, child
from tlt_cli.surgery.slice import ORDERS, planned_cut

PREFIX, IMPORTANCE, PCA = ORDERS


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What to write: `part` alone where its cuts are all there is to it, else every tensor as `plan_tensors`."""

    part: Part
    plan_tensors: tuple[PlannedTensor, ...] | None
    config: dict[str, Any]
    details: dict[str, Any]
    notes: tuple[str, ...]


def calibrated(
    fit: Fit, values: Checkpoint, windows: Tensor, sizes: Mapping[str, int], *, order: str, refit: bool,
    norm: str | None, by: str | None = None, progress: Progress | None = None,
) -> Calibrated:  # fmt: skip
    """Choose on windows [N, T] of a text what stays at `sizes` (nested.SIZES; what is not named is whole), and refit.

    `order` is one of ORDERS, `norm` "sliced", "masked" or None for calibrated gains. `by` overrides the ranking: one of
    importance.RANKINGS. Raises TltError for sizes the model does not have and for texts that cannot tell.
    """
    assert order in ORDERS and norm in (None, "sliced", "masked")
    first = prefix(fit, sizes, norm=norm or "sliced")
    wanted = {**sizes_of(fit), **sizes}
    parent, stored = untied(fit) if order == PCA else (fit, {})
    small = child(parent, first).fit  # of the same sizes: what cannot be is refused before the text is run
    if refit:
        check_enough(windows, small)
    source = Blocks(values, fit)
    longest = source.decoder.longest
    if longest is not None and windows.shape[1] > longest:
        raise UsageError(f"--context {windows.shape[1]} is more than the model's {longest} positions")
    by = by or (REFIT if refit else ENERGY)
    gaining = norm is None and _narrower(parent, first)
    passes = (order != PREFIX) + gaining
    ahead = _Ahead(progress, fit.sizes["layer"] * passes + (len(STAGES) * wanted["layers"] if refit else 0))
    part, details, rotation = first, dict[str, Any](), None
    if order != PREFIX:
        axes = _ordered(sizes_of(fit), wanted)
        looks = look(source, windows, stream="dim" in axes or order == PCA, progress=ahead.each)
        seen = importance(looks, fit, values, wanted, axes, by=by)
        part, details = _chosen(parent, first, seen, wanted, axes - ({"dim"} if order == PCA else set()), by)
        if order == PCA:
            assert seen.unit is not None
            rotation = directions(seen.unit, wanted["dim"], layer_norm=fit.family.rules["norm"] == "layer")
            kept_share = float(((rotation @ seen.unit) * rotation).sum() / seen.unit.trace())
            details["shares"]["stream"] = {"energy": kept_share}
    kept = _kept_stream(part, rotation)
    if gaining:
        gains = _gains(source, windows, part, kept, ahead.each)
        part = replace(part, gains=gains)
        details["gains"] = {role if at is None else f"{at}.{role}": gain for (role, at), gain in gains.items()}
    made = child(parent, part)
    pieces: Mapping[str, Piece] = made.cuts
    if rotation is not None:
        pieces = turned_cuts(parent, made.fit, made.cuts, rotation, stored)
    notes = _notes(fit, made.fit, part, refit)
    config = without_levels(made.fit.config)
    if not refit:
        planned = None if rotation is None else _planned(pieces, values, None, made.fit)
        return Calibrated(part, planned, config, details, notes)
    view = View(values, pieces)
    blocks = Blocks(view, made.fit)
    found, original, stream = refit_blocks(
        source, blocks, made.fit, made.cuts, part.layers, windows, kept, advance=ahead.one
    )
    refit_head(source, blocks, fit, made.fit, values, view, original, stream, found)
    details["errors"] = {slot: {"cut": before, "refit": after} for slot, (before, after) in found.errors.items()}
    return Calibrated(part, _planned(pieces, values, found, made.fit), config, details, notes)


@dataclass(frozen=True, eq=False)
class View:
    """The tensors of a cut model, computed when they are read."""

    values: Tensors
    pieces: Mapping[str, Piece]

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return torch.cat(list(self.pieces[name](self.values)))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop, of which there is one at least."""
        return torch.cat(list(self.pieces[name].between(start, stop)(self.values)))


def _ordered(own: Mapping[str, int], wanted: Mapping[str, int]) -> set[str]:
    """The axes that are put in order: those that shrink, or, where none does, all, so that prefixes can be cut."""
    shrink = {axis for axis, size in own.items() if wanted[axis] < size}
    return shrink or set(own)


def _chosen(
    fit: Fit, first: Part, seen: Importance, wanted: Mapping[str, int], axes: Collection[str], by: str
) -> tuple[Part, dict[str, Any]]:
    """The part that importance picks, and what is told of the choice."""
    layers = layers_by(seen.influence, wanted["layers"])
    shares: dict[str, Any] = {str(layer): seen.shares[layer] for layer in layers if seen.shares[layer]}
    hidden = first.hidden
    if "dim" in axes:
        hidden, shares["stream"] = channels(seen, wanted["dim"], by)
    part = replace(
        first, layers=layers, hidden=hidden, ffn=tuple(seen.ffn[layer] for layer in layers),
        kv=tuple(seen.kv[layer] for layer in layers), heads=tuple(seen.heads[layer] for layer in layers),
    )  # fmt: skip
    details = {"by": by, "layers": list(layers), "influence": seen.influence, "shares": shares}
    if wanted["head_dim"] < fit.head_dim:
        part = replace(part, entries=_entries(fit, part, seen.entries))
        details["entries"] = part.entries.tolist()
    return part, details


def _entries(fit: Fit, part: Part, scores: Tensor) -> Index:
    """The entries of a head that stay: of rotary pairs neighbours or every nth, for only those turn as they did; of all
    such choices that config.json can state, the one of the highest score."""
    count, size = len(part.entries), len(scores)
    if "rotary" not in fit.sizes:
        return np.sort(scores.argsort(descending=True, stable=True)[:count].numpy())
    choices = [np.arange(count) + start for start in range(size - count + 1)]
    if size % count == 0:
        choices += [np.arange(count) * (size // count) + start for start in range(size // count)]
    choices.sort(key=lambda entries: -float(scores[torch.from_numpy(entries)].sum()))
    for entries in choices:
        try:
            child(fit, replace(part, entries=entries))
        except TltError:
            continue
        return entries
    return part.entries


def _kept_stream(part: Part, rotation: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What the part keeps of a stream [..., H]."""
    if rotation is not None:
        matrix = rotation.T.float()
        return lambda stream: stream @ matrix
    index = torch.from_numpy(part.hidden)
    return lambda stream: stream[..., index]


def _narrower(fit: Fit, part: Part) -> bool:
    """Whether any norm sees fewer entries than it did."""
    heads = "query_norm" in fit.family.roles and len(part.entries) < fit.sizes[fit.family.head_size_axis]
    return len(part.hidden) < fit.sizes["hidden"] or heads


def _gains(
    blocks: Blocks, ids: Tensor, part: Part, kept: Callable[[Tensor], Tensor], progress: Progress
) -> dict[tuple[str, int | None], float]:
    """E[rms of what stays / rms of all] of every norm, by role and layer: by least squares the best constant that
    undoes what a norm over fewer entries makes too large or too small."""
    layer_norm = blocks.decoder.description["norm"] == "layer"
    halves = 2 if blocks.decoder.description["ropes"] else 1
    sums: dict[tuple[str, int | None], tuple[float, int]] = {}

    def see(role: str, layer: int, x: Tensor) -> None:
        if role in HEAD_NORMS:
            size = x.shape[-1] // halves
            inside = torch.from_numpy(np.concatenate([part.entries + size * half for half in range(halves)]))
            y = x[..., inside]
        else:
            y = kept(x)
        ratio = _rms(y, layer_norm) / _rms(x, layer_norm).clamp_min(1e-30)
        at = role, None if role == "final_norm" else layer
        total, count = sums.get(at, (0.0, 0))
        sums[at] = total + float(ratio.double().sum()), count + ratio.numel()

    with normed(blocks.decoder, see):
        ((_, last),) = deque(streams(blocks, ids, progress=progress), maxlen=1)
        for some in torch.split(last, 16):
            blocks.decoder.normalize(some, "final_norm")
    blocks.release()
    return {at: total / count for at, (total, count) in sums.items()}


def _rms(x: Tensor, layer_norm: bool) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if layer_norm else x
    return x.square().mean(-1).sqrt()


def _planned(
    pieces: Mapping[str, Piece], values: Checkpoint, found: Refitted | None, made: Fit
) -> tuple[PlannedTensor, ...]:
    """Every tensor of the cut model, in the dtype of the one it comes from."""
    head = named(made.places, "head")
    planned = []
    for name, piece in pieces.items():
        compute: Callable[[Tensors], Iterable[Tensor]] = piece
        if found is not None and name in found.tensors:
            compute = _stored(found, name)
        elif found is not None and name == head and len(found.head):
            compute = lambda _: (found.head[start] for start in sorted(found.head))  # noqa: E731
        dtype = values.tensors[piece.source].dtype
        if isinstance(piece, Cut) and compute is piece:
            planned.append(planned_cut(name, piece, dtype))
            continue
        work = 8 * (math.prod(piece.shape) + math.prod(values.tensors[piece.source].shape))
        planned.append(PlannedTensor(name, piece.shape, dtype, piece.source, compute, work))
    return tuple(planned)


def _stored(found: Refitted, name: str) -> Callable[[Tensors], Iterator[Tensor]]:
    def compute(_: Tensors) -> Iterator[Tensor]:
        yield found.tensors[name]

    return compute


def _notes(fit: Fit, made: Fit, part: Part, refit: bool) -> tuple[str, ...]:
    notes = []
    if part.gains:
        notes.append(
            "norms over fewer entries: their gains are calibrated on the text (--norm sliced or masked take a rule)"
        )
    if fit.tied and not made.tied:
        notes.append("the rotation folds the last norm's gain into the head, so head and embedding are no longer tied")
    if refit:
        notes.append("refit weights: perplexity on other texts than the calibration's may tell another story; measure")
    return tuple(notes)


class _Ahead:
    """Steps of several passes as one count."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def one(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def each(self, done: int, total: int) -> None:
        self.one()
