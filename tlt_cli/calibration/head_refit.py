"""What reads the last norm moved by least squares, so that a cut model's logits stay as close as they can on a text.

A head of its own is refit as any matrix, some rows of it at a time. A head that is the embedding stays, for it would be
another embedding; the gain of the norm in front of it moves instead. With x the original's normed stream, z the cut
model's, W and V the two heads, the best factors s of that gain solve

    ((VT V) * E[z zT]) s = diag(VT W E[x zT])      (* entry by entry)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tlt_cli.calibration.blocks import Blocks
from tlt_cli.calibration.moments import outer
from tlt_cli.calibration.slice_refit import SAME, Refitted, best_ridge, held_out, solve
from tlt_cli.checkpoint.planned import Tensors
from tlt_cli.families import Fit
from tlt_cli.families.place import named
from tlt_cli.surgery.matrices import head_name

_ROWS = 4096  # of the vocabulary at a time


@dataclass(frozen=True, eq=False)
class _Seen:
    """Of x, the original's normed stream, and z, the cut model's, the second moments, held out ones apart."""

    own: Tensor
    gram: tuple[Tensor, Tensor]
    cross: tuple[Tensor, Tensor]


def refit_head(
    source: Blocks, made: Blocks, parent: Fit, child: Fit, values: Tensors, cut: Tensors, original: Tensor,
    stream: Tensor, found: Refitted, *, batch: int = 16,
) -> None:  # fmt: skip
    """Add the refit head, or the refit gain of the last norm, to `found`. `original` and `stream` [N, T, H] are both
    models' behind all blocks, `values` and `cut` their tensors."""
    seen = _moments(source, made, original, stream, batch)
    for blocks in (source, made):
        blocks.release()
    pairs = _Rows(head_name(parent), head_name(child), values, cut, parent.sizes["vocab"])
    wanted, before = 0.0, 0.0
    whole, crossed = seen.gram[0] + seen.gram[1], seen.cross[0] + seen.cross[1]
    for _, w, v in pairs:
        wanted += float(((w @ seen.own) * w).sum())
        before += float(((v @ whole) * v).sum() - 2 * ((w @ crossed) * v).sum())
    before = max((before + wanted) / wanted, 0.0) if wanted else 0.0
    slot = head_name(child).removesuffix(".weight")
    found.errors[slot] = before, before
    if before <= SAME:
        return
    if child.tied:
        _gain(seen, pairs, child, cut, found, slot, wanted)
        return
    share = best_ridge(
        seen.gram, ([w @ c - v @ g for c, g in zip(seen.cross, seen.gram, strict=True)] for _, w, v in pairs)
    )
    if share is None:
        return
    after = before
    for first, w, v in pairs:
        r = w @ crossed - v @ whole
        change = solve(whole, r, share)
        after += float(((change @ whole) * change).sum() - 2 * (change * r).sum()) / wanted
        found.head[first] = (v + change).float()
    found.errors[slot] = before, max(after, 0.0)


def _gain(seen: _Seen, pairs: _Rows, child: Fit, cut: Tensors, found: Refitted, slot: str, wanted: float) -> None:
    """The last norm's gain times what brings the logits closest."""
    own = other = torch.zeros(())
    for _, w, v in pairs:
        own, other = own + v.T @ v, other + v.T @ w
    grams = [own * gram for gram in seen.gram]
    missing = [((other @ cross).diagonal() - gram.sum(1))[None] for cross, gram in zip(seen.cross, grams, strict=True)]
    share = best_ridge(grams, [missing])
    if share is None:
        return
    whole, r = grams[0] + grams[1], missing[0] + missing[1]
    change = solve(whole, r, share)
    name = named(child.places, "final_norm")
    assert name is not None
    offset = float(child.family.rules.get("gain_offset", 0.0))
    found.tensors[name] = (cut.read(name).double() + offset) * (1 + change[0]) - offset
    before = found.errors[slot][0]
    after = before + float(((change @ whole) * change).sum() - 2 * (change * r).sum()) / wanted
    found.errors[slot] = before, max(after, 0.0)


@dataclass(frozen=True)
class _Rows:
    """Rows of both heads, [n, H] and [n, H'], with the number of the first."""

    name: str
    child: str
    values: Tensors
    cut: Tensors
    count: int

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for start in range(0, self.count, _ROWS):
            stop = min(self.count, start + _ROWS)
            both = self.values.read_rows(self.name, start, stop), self.cut.read_rows(self.child, start, stop)
            yield start, both[0].double(), both[1].double()


def _moments(source: Blocks, made: Blocks, original: Tensor, stream: Tensor, batch: int) -> _Seen:
    own: Tensor | float = 0.0
    grams: list[Tensor | float] = [0.0, 0.0]
    crosses: list[Tensor | float] = [0.0, 0.0]
    start = 0
    for some, other in zip(torch.split(original, batch), torch.split(stream, batch), strict=True):
        held = held_out(start, some.shape[0], some.shape[1])
        start += some.shape[0]
        with torch.no_grad():
            x = source.decoder.normalize(some, "final_norm").flatten(0, -2).double()
            z = made.decoder.normalize(other, "final_norm").flatten(0, -2).double()
        own = own + outer(x)
        for at, part in enumerate((~held, held)):
            grams[at] = grams[at] + z[part].T @ z[part]
            crosses[at] = crosses[at] + x[part].T @ z[part]
    return _Seen(own, (grams[0], grams[1]), (crosses[0], crosses[1]))  # type: ignore[arg-type]
