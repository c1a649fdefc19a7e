"""Token streams as windows in an endless order: which one comes when is a pure function of the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tlt_cli.errors import TltError
from tlt_cli.model import perplexity
from tlt_cli.training.corpus import Stream

IGNORED = -100  # what cross_entropy skips
_ROUND = 1000  # windows over which weights are kept at least, so that rounding costs less than a thousandth


@dataclass(frozen=True)
class Batch:
    """B rows of T + 1 tokens: inputs are rows[:, :-1], targets(batch) what they are to predict.

    `rows` [B, T + 1] int64; `documents` [B, T + 1] int32 numbers the documents of each row from 0, None where every row
    lies within one; `streams` [B] int64 says which stream a row comes from, `numbers` [B] int64 which it is in the
    endless order of windows.
    """

    rows: Tensor
    documents: Tensor | None
    streams: Tensor
    numbers: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Rows and documents on a device; streams and numbers only say which they are."""
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.rows.to(device), documents, self.streams, self.numbers)

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """Some of the rows: a slice of them, or those numbered by a tensor [n]."""
        documents = None if self.documents is None or not self.documents[rows].any() else self.documents[rows]
        return Batch(self.rows[rows], documents, self.streams[rows], self.numbers[rows])


def targets(batch: Batch) -> Tensor:
    """What each position is to predict, [B, T] int64: the next token, IGNORED where that starts another document."""
    following = batch.rows[:, 1:]
    if batch.documents is None:
        return following
    return following.masked_fill(batch.documents[:, 1:] != batch.documents[:, :-1], IGNORED)


@dataclass(frozen=True)
class Windows:
    """Streams cut into windows of `context` tokens, in an endless order: epoch by epoch, shuffled anew each time.

    A stream of N tokens is a ring whose ends are a document's end. An epoch cuts it from a place drawn anew into
    N // context windows one behind the other, so that every token is a target once, but for the N % context left over;
    the windows of all streams come in one permutation. `weights`, one per stream, ask for other shares than their
    sizes: then each stream goes through epochs of its own, as fast as its share wants.
    Raises TltError for a stream shorter than a window, and for weights that are none.
    """

    streams: tuple[Stream, ...]
    context: int
    seed: int = 0
    weights: tuple[float, ...] | None = None
    _rounds: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.context < 1:
            raise TltError(f"a context of {self.context} predicts nothing; it must be at least 1 token")
        for stream in self.streams:
            if stream.tokens < self.context:
                raise TltError(
                    f"{stream.source} has {stream.tokens} tokens, less than one window of {self.context}; "
                    "give more text or a smaller context"
                )
        if self.weights is not None:
            if len(self.weights) != len(self.streams):
                raise TltError(f"{len(self.weights)} weights for {len(self.streams)} streams; give one for each")
            for weight in self.weights:
                if not (weight > 0 and math.isfinite(weight)):
                    raise TltError(f"a stream's weight is {weight:g}; it must be a positive number")

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many windows each stream holds."""
        return tuple(stream.tokens // self.context for stream in self.streams)

    @property
    def per_epoch(self) -> int:
        """How many windows all streams hold: as many are an epoch, whatever the weights."""
        return sum(self.sizes)

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """How many windows of each stream are shuffled together into one round: all of them, or as the weights ask."""
        if self.weights is None:
            return self.sizes
        length, total = max(self.per_epoch, _ROUND), sum(self.weights)
        return tuple(max(1, round(length * weight / total)) for weight in self.weights)

    def batch(self, first: int, count: int) -> Batch:
        """Windows number `first` to `first + count - 1` of the endless order; nothing is remembered in between."""
        rows = np.empty((count, self.context + 1), dtype=np.int64)
        changes = np.zeros(rows.shape, dtype=np.int32)
        streams = np.empty(count, dtype=np.int64)
        for row in range(count):
            turn, place = divmod(first + row, sum(self.shares))
            of, starts = self._round(turn)
            stream, start = self.streams[of[place]], int(starts[place])
            rows[row] = stream.take(start, self.context + 1)
            changes[row, stream.boundaries(start, self.context + 1)] = 1
            streams[row] = of[place]
        documents = torch.from_numpy(changes.cumsum(axis=1, dtype=np.int32)) if changes.any() else None
        return Batch(
            torch.from_numpy(rows), documents, torch.from_numpy(streams), torch.arange(first, first + count)
        )  # fmt: skip

    def _round(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of round `turn`: the stream of each window, and the token at which it starts in it."""
        known = self._rounds.get(turn)
        if known is not None:
            return known
        own = [self._starts(number, turn * share, share) for number, share in enumerate(self.shares)]
        of = np.repeat(np.arange(len(own), dtype=np.int32), self.shares)
        order = _random(self.seed, len(own), turn).permutation(len(of))
        found = self._rounds[turn] = of[order], np.concatenate(own)[order]
        for old in sorted(self._rounds)[:-2]:  # a batch may lie across two rounds
            self._rounds.pop(old, None)
        return found

    def _starts(self, number: int, first: int, count: int) -> np.ndarray:
        """Where windows `first` to `first + count - 1` of one stream's own endless order start in it."""
        size, tokens = self.sizes[number], self.streams[number].tokens
        found = []
        for epoch in range(first // size, (first + count - 1) // size + 1):
            random = _random(self.seed, number, epoch)
            begin = random.integers(tokens)
            starts = (begin + random.permutation(size) * self.context) % tokens
            found.append(starts[max(first - epoch * size, 0) : first + count - epoch * size])
        return np.concatenate(found)


def _random(seed: int, number: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng((seed % 2**64, number, epoch))


def hold_out(streams: Sequence[Stream], share: float) -> tuple[tuple[Stream, ...], tuple[Stream, ...]]:
    """Every stream as what is trained on and its end, which is held back: (training, held out); nothing for share 0.

    The last documents that come closest to `share` of its tokens, or just that share where documents are so long that
    they miss it by half. Raises TltError where either side would be left without a token to predict.
    """
    if not 0 <= share < 1:
        raise TltError(f"a held-out share of {share:g} is none; it must be at least 0 and less than 1")
    if share == 0:
        return tuple(streams), ()
    cuts = [_cut(stream, share) for stream in streams]
    training = tuple(stream.part(0, cut) for stream, cut in zip(streams, cuts, strict=True))
    return training, tuple(stream.part(cut, stream.tokens) for stream, cut in zip(streams, cuts, strict=True))


def _cut(stream: Stream, share: float) -> int:
    """The token with which the held-out end of a stream begins."""
    wanted = round(stream.tokens * share)
    ideal = stream.tokens - wanted
    if wanted < 2 or ideal < 2:
        raise TltError(
            f"{stream.source} has {stream.tokens} tokens: a held-out share of {share:g} leaves {ideal} to train on and "
            f"{wanted} to measure on, and both need 2; give more text, or another share"
        )
    starts = stream.starts[1:]
    near = int(starts[np.abs(starts - ideal).argmin()]) if len(starts) else 0
    fits = 2 <= near <= stream.tokens - 2 and abs(near - ideal) * 2 <= min(wanted, ideal)
    return near if fits else ideal


def evaluation_windows(stream: Stream, context: int, most: int | None = None) -> Tensor:
    """Contiguous windows [n, context] of a stream, as `tlt eval` cuts a text; at most the first `most` of them."""
    tokens = stream.tokens if most is None else min(stream.tokens, most * context)
    return perplexity.windows(torch.from_numpy(stream.take(0, tokens)), context)
