"""Maps of an axis, new <- old: which old entry each new entry copies, with which weight, and what the rest holds.

A map is the matrix P of `W' = P_out W P_in+ + R (I - P_in P_in+)`, kept as one source and two weights per new entry:
`write[j] = P[j, source[j]]` and `read[j] = P+[source[j], j]`, so that P+ P = I. Entries without a source are fresh:

- ZERO  what writes there writes nothing, so what reads there may hold anything (the R of the formula);
- FREE  what writes there may write anything, so what reads there must hold zero;
- MEAN  what writes there writes the weighted mean of all old entries (LayerNorm's fill, new rows of a vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

COPY, ZERO, FREE, MEAN = range(4)


@dataclass(frozen=True)
class Run:
    """`length` new entries from `start` on that copy as many old ones from `source` on; fresh ones where it is -1."""

    start: int
    length: int
    source: int


@dataclass(frozen=True, eq=False)
class AxisMap:
    """One axis or a product of axes, `old` entries to `len(source)` new ones. All arrays have the new length."""

    old: int
    source: NDArray[np.int64]
    write: NDArray[np.float64]
    read: NDArray[np.float64]
    kind: NDArray[np.int8]

    @property
    def new(self) -> int:
        """Number of new entries."""
        return len(self.source)

    @property
    def plain(self) -> bool:
        """Whether nothing changes."""
        return self.new == self.old and bool(
            np.array_equal(self.source, np.arange(self.old)) and np.all(self.write == 1) and np.all(self.read == 1)
        )

    @property
    def copies(self) -> NDArray[np.int64]:
        """For each old entry, how many new entries copy it."""
        return np.bincount(self.source[self.source >= 0], minlength=self.old)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The copied entries, in stretches of consecutive sources."""
        return tuple(run for run in _runs(self.source, np.arange(self.new)) if run.source >= 0)

    @cached_property
    def null_runs(self) -> tuple[Run, ...]:
        """The null entries, in stretches: of consecutive sources, or of fresh entries."""
        entries = self.null_entries
        return tuple(_runs(self.source[entries], entries))

    @property
    def null_entries(self) -> NDArray[np.int64]:
        """New entries where a reader may hold noise: silent ones, and members of a group of copies."""
        several = np.zeros(self.new, dtype=bool)
        copied = self.source >= 0
        several[copied] = self.copies[self.source[copied]] > 1
        return np.flatnonzero((self.kind == ZERO) | (self.kind == MEAN) | several)

    def scaled(self, write: float | NDArray[np.float64]) -> AxisMap:
        """The same map with its writes multiplied, and its reads divided."""
        return replace(self, write=self.write * write, read=self.read / write)

    def dual(self, power: int = 1) -> AxisMap:
        """The map of gradients, (P+)T: reads and writes change places; `power=2` for their squares."""
        kind = np.where(self.kind == COPY, COPY, ZERO).astype(np.int8)
        return AxisMap(self.old, self.source, self.read**power, self.write**power, kind)

    def fresh(self, kind: int, weight: float = 1.0) -> AxisMap:
        """The same copies with every fresh entry of another kind."""
        new = self.kind != COPY
        return replace(self, kind=np.where(new, kind, COPY).astype(np.int8), write=np.where(new, weight, self.write))


def _runs(source: NDArray[np.int64], position: NDArray[np.int64]) -> Iterator[Run]:
    """Stretches in which positions follow each other, and sources do too or are all -1."""
    if not len(source):
        return
    fresh = source < 0
    together = (np.diff(position) == 1) & (fresh[1:] == fresh[:-1]) & (fresh[1:] | (np.diff(source) == 1))
    edges = [0, *(np.flatnonzero(~together) + 1).tolist(), len(source)]
    for start, stop in pairwise(edges):
        yield Run(int(position[start]), stop - start, int(source[start]))


def same(size: int) -> AxisMap:
    """The identity."""
    return pad(size, size, ZERO)


def pad(old: int, new: int, kind: int, *, weight: float = 1.0) -> AxisMap:
    """Old entries first, times `weight`; then fresh ones."""
    position = np.arange(new)
    copied = position < old
    return AxisMap(
        old,
        np.where(copied, position, -1),
        np.where(copied, weight, 1.0),
        np.where(copied, 1 / weight, 0.0),
        np.where(copied, COPY, kind).astype(np.int8),
    )


def repeat(old: int, new: int, *, split: float = 0.5) -> AxisMap:
    """New entry j copies old entry j mod old; readers give the first copy the share `split`, the rest share the rest.

    With split 0.5 all copies of an entry share evenly (Net2Net); other splits are LEMON's uneven ones (2310.07999).
    """
    return shared(old, np.arange(new) % old, split=split)


def shared(old: int, source: NDArray[np.int64], *, split: float = 0.5, fresh: int = FREE) -> AxisMap:
    """A map from sources (-1: fresh): writers copy, readers divide each old entry's weight among its copies."""
    copied = source >= 0
    counts = np.bincount(source[copied], minlength=old)
    assert counts.min() >= 1
    read = np.zeros(len(source))
    first = np.full(old, len(source))
    np.minimum.at(first, source[copied], np.flatnonzero(copied))
    for entry in np.flatnonzero(copied):
        count = counts[source[entry]]
        is_first = first[source[entry]] == entry
        even = 1 / count
        share = even if count == 1 or split == 0.5 else (split if is_first else (1 - split) / (count - 1))
        read[entry] = share
    kind = np.where(copied, COPY, fresh).astype(np.int8)
    return AxisMap(old, source.astype(np.int64), np.ones(len(source)), read, kind)


def isometric(mapped: AxisMap) -> AxisMap:
    """Reweigh copies so that PT P = (new/old) I: RMSNorm then sees the same mean square, for any new >= old."""
    copied = mapped.source >= 0
    weight = np.ones(mapped.new)
    weight[copied] = np.sqrt(mapped.new / (mapped.old * mapped.copies[mapped.source[copied]]))
    return mapped.scaled(weight)


def product(maps: Sequence[AxisMap]) -> AxisMap:
    """The map of a product of axes, outermost first. An entry is fresh where any factor is; ZERO outranks FREE."""
    total = maps[0]
    for inner in maps[1:]:
        source = np.where(
            (total.source[:, None] >= 0) & (inner.source[None] >= 0),
            total.source[:, None] * inner.old + inner.source[None],
            -1,
        )
        kinds = np.stack(np.broadcast_arrays(total.kind[:, None], inner.kind[None]))
        kind = np.where((kinds == ZERO).any(0), ZERO, np.where((kinds == FREE).any(0), FREE, kinds.max(0)))
        write = total.write[:, None] * inner.write[None]
        read = total.read[:, None] * inner.read[None]
        total = AxisMap(
            total.old * inner.old, source.ravel(), write.ravel(), read.ravel(), kind.ravel().astype(np.int8)
        )
    return total


def concatenate(maps: Sequence[AxisMap]) -> AxisMap:
    """The map of fused slices that lie one after the other in one dim."""
    offsets = np.cumsum([0] + [mapped.old for mapped in maps[:-1]])
    sources = [
        np.where(mapped.source >= 0, mapped.source + offset, -1) for mapped, offset in zip(maps, offsets, strict=True)
    ]
    return AxisMap(
        sum(mapped.old for mapped in maps),
        np.concatenate(sources),
        np.concatenate([mapped.write for mapped in maps]),
        np.concatenate([mapped.read for mapped in maps]),
        np.concatenate([mapped.kind for mapped in maps]),
    )


def has_head_slots(kv: int, group: int, new_kv: int, new_group: int) -> bool:
    """Whether `head_slots` finds a layout: every old key/value head needs copies enough for its whole group."""
    return kv * -(-group // new_group) <= new_kv


def head_slots(
    kv: int, group: int, new_kv: int, new_group: int, *, copy: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Sources of the new key/value heads and of the new query heads; None where no exact layout exists.

    Query head t reads key/value head t // group, so a query head may only move among copies of its own key/value
    head: every source needs enough slots for its whole group. With `copy` spare slots repeat heads, else they are -1.
    """
    if not has_head_slots(kv, group, new_kv, new_group):
        return None
    needed = -(-group // new_group)
    slots = np.arange(new_kv)
    kv_source = slots % kv if copy else np.where(slots < kv * needed, slots % kv, -1)
    query = np.full((new_kv, new_group), -1)
    taken = np.zeros(kv, dtype=np.int64)
    for slot, head in enumerate(kv_source):
        if head < 0:
            continue
        for position in range(new_group):
            if copy or taken[head] < group:
                query[slot, position] = head * group + taken[head] % group
            taken[head] += 1
    return kv_source, query.ravel()
