"""What `--data` names, read as streams of token ids with their documents: text, JSONL, or ids in a file."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tlt_cli.errors import TltError
from tlt_cli.model.text import BUILT_IN, Tokenizer, built_in_text
from tlt_cli.training.ids import SUFFIXES, checked_blocks, open_ids
from tlt_cli.training.tokenizing import Fragment, encode, lines, texts

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Stream:
    """Documents one behind the other as token ids, the whole taken as a ring.

    `parts` hold the ids, 1-D integers of any kind, in memory or mapped from files; `starts` [documents] int64, the
    token at which each document starts, the first at 0. `sha256` is of the text in UTF-8, and of ids that came as
    ids as little-endian int32.
    """

    source: str
    parts: tuple[np.ndarray, ...]
    starts: np.ndarray
    sha256: str

    @cached_property
    def _offsets(self) -> tuple[int, ...]:
        return tuple(accumulate((len(part) for part in self.parts), initial=0))

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return self._offsets[-1]

    @property
    def info(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"source": self.source, "tokens": self.tokens, "documents": len(self.starts), "sha256": self.sha256}

    def take(self, first: int, count: int) -> np.ndarray:
        """`count` ids [count] int64 from token `first` on; behind the last comes the first again."""
        found = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            at = (first + done) % self.tokens
            number = bisect_right(self._offsets, at) - 1
            inside = at - self._offsets[number]
            piece = self.parts[number][inside : inside + count - done]
            found[done : done + len(piece)] = piece
            done += len(piece)
        return found

    def boundaries(self, first: int, count: int) -> np.ndarray:
        """Where in take(first, count) a document starts, the very first place aside: from 1 to count - 1, sorted."""
        found = []
        for lap in range(first // self.tokens, (first + count - 1) // self.tokens + 1):
            base = lap * self.tokens - first
            low, high = np.searchsorted(self.starts, (1 - base, count - base))
            found.append(self.starts[low:high] + base)
        return np.concatenate(found)

    def part(self, first: int, last: int) -> Stream:
        """Tokens `first` to `last - 1` as a stream that knows nothing of the others; the hash stays the whole's."""
        ends = zip(self.parts, self._offsets, strict=False)
        pieces = [ids[max(first - offset, 0) : max(last - offset, 0)] for ids, offset in ends]
        inside = self.starts[(self.starts > first) & (self.starts < last)] - first
        starts = np.concatenate([np.zeros(1, dtype=np.int64), inside])
        return Stream(self.source, tuple(pieces), starts, self.sha256)


def read_streams(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    end: int | None = None,
    separator: str | None = None,
    field: str = "text",
    progress: Progress | None = None,
) -> tuple[Stream, ...]:
    """One stream per source, a file, a folder or a pattern; without sources, the text that every Python carries.

    A folder means all files in it and below, in the order of their names, but for hidden ones. Of the files, .npy, .bin
    (uint16) and .safetensors hold ids, .jsonl one document per line under the key `field`, and all others are text: one
    document, or several where `separator` stands between them. A document ends with the id `end`, if there is one, and
    every such id ends a document. Text is read and tokenized by pieces, `progress(bytes done, bytes in all)` called
    along the way. Raises TltError naming file and place for what cannot be read, and for ids beyond the vocabulary.
    """
    if end is not None and not 0 <= end < tokenizer.vocab:
        raise TltError(f"the end-of-text id {end} is not in the vocabulary of {tokenizer.vocab}")
    if not sources:
        return (_built_in(tokenizer, end),)
    chosen = [(str(source), _files(str(source))) for source in sources]
    total = sum(path.stat().st_size for _, files in chosen for path in files)
    done = 0

    def advance(some: int) -> None:
        nonlocal done
        done += some
        if progress is not None:
            progress(done, total)

    found = []
    for source, files in chosen:
        growing = _Growing(source, end)
        for ids_inside, group in groupby(files, lambda path: path.suffix in SUFFIXES):
            if ids_inside:
                for path in group:
                    growing.add_ids(path, tokenizer.vocab, advance)
            else:
                growing.add_text(_fragments(group, separator, field, growing.digest, advance), tokenizer)
        found.append(growing.stream())
    return tuple(found)


def of_ids(ids: Tensor, source: str = "the text") -> Stream:
    """Ids [N], a tensor of integers, as a stream of one document."""
    values = ids.cpu().numpy()
    digest = hashlib.sha256(values.astype("<i4").tobytes()).hexdigest()
    return Stream(source, (values,), np.zeros(1, dtype=np.int64), digest)


def _built_in(tokenizer: Tokenizer, end: int | None) -> Stream:
    growing, text = _Growing(BUILT_IN, end), built_in_text()
    growing.digest.update(text.encode())
    growing.add_text([Fragment(text, True)], tokenizer)
    return growing.stream()


def _fragments(
    paths: Iterable[Path], separator: str | None, field: str, digest: Any, advance: Callable[[int], None]
) -> Iterable[Fragment]:
    for path in paths:
        if path.suffix == ".jsonl":
            yield from lines(path, field, digest, advance)
        else:
            yield from texts(path, separator, digest, advance)


class _Growing:
    """A stream while it is read."""

    def __init__(self, source: str, end: int | None) -> None:
        self.source, self.end = source, end
        self.digest = hashlib.sha256()
        self.parts: list[np.ndarray] = []
        self.starts: list[np.ndarray] = []
        self.tokens = 0

    def add_text(self, fragments: Iterable[Fragment], tokenizer: Tokenizer) -> None:
        for ids, starts in encode(tokenizer, fragments, self.end):
            self._cut(ids, self.tokens, starts)
            self.parts.append(ids)
            self.tokens += len(ids)

    def add_ids(self, path: Path, vocab: int, advance: Callable[[int], None]) -> None:
        ids = open_ids(path)
        advance(path.stat().st_size - ids.nbytes)
        at, starts = self.tokens, np.zeros(1, dtype=np.int64)
        for block in checked_blocks(ids, path, vocab):
            self.digest.update(block.astype("<i4").tobytes())
            self._cut(block, at, starts)
            at, starts = at + len(block), starts[:0]
            advance(block.nbytes)
        self.parts.append(ids)
        self.tokens = at

    def _cut(self, ids: np.ndarray, at: int, starts: np.ndarray) -> None:
        """Note the documents of ids [N] that stand at token `at`: those known to start, and one behind each end."""
        if self.end is not None:
            starts = np.union1d(starts, np.flatnonzero(ids == self.end) + 1)
        self.starts.append(starts + at)

    def stream(self) -> Stream:
        if not self.tokens:
            raise TltError(f"{self.source} is empty: there is nothing to train on")
        starts = np.unique(np.concatenate(self.starts))
        return Stream(self.source, tuple(self.parts), starts[starts < self.tokens], self.digest.hexdigest())


def _files(source: str) -> list[Path]:
    """The files that a source means, sorted by name."""
    path = Path(source).expanduser()
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file())
        found = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not found:
            raise TltError(f"{path}: a folder without files; it should hold text, .jsonl, or ids as .npy or .bin")
        return sorted(found)
    if path.exists():
        return [path]
    if any(sign in source for sign in "*?["):
        base = Path(path.anchor)
        found = sorted(file for file in base.glob(str(path.relative_to(base))) if file.is_file())
        if not found:
            raise TltError(f"{source}: no file fits this pattern")
        return found
    raise TltError(f"{source}: no such file or folder")
