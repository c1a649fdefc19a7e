"""Text to ids by pieces: memory for a piece at a time, and the ids that the whole document would give."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tlt_cli.errors import TltError
from tlt_cli.model.text import BYTES, Tokenizer

PIECE = 1 << 18  # characters tokenized in one go
OVERLAP = 1 << 11  # characters around a joint of two pieces that both have read: tokens do not look further
_BATCH = 1 << 22  # characters tokenized side by side
_BLOCK = 1 << 20  # bytes read at a time


class Fragment(NamedTuple):
    """Some text of a document, and whether the document ends with it."""

    text: str
    last: bool


def texts(path: Path, separator: str | None, digest: Any, advance: Callable[[int], None]) -> Iterator[Fragment]:
    """A text file's documents in fragments, cut where `separator` stands; the hash takes the file's bytes."""
    rest = ""
    for text in _decoded(path, digest, advance):
        rest += text
        if separator:
            *whole, rest = rest.split(separator)
            yield from (Fragment(document, True) for document in whole)
        sure = max(0, len(rest) - len(separator) + 1) if separator else len(rest)  # one may have begun at the end
        yield Fragment(rest[:sure], False)
        rest = rest[sure:]
    yield Fragment(rest, True)


def _decoded(path: Path, digest: Any, advance: Callable[[int], None]) -> Iterator[str]:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                waiting = len(decoder.getstate()[0])
                yield decoder.decode(block)
                done += len(block)
                digest.update(block)
                advance(len(block))
            waiting = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at, wrong = done - waiting + error.start, error.object[error.start]
        raise TltError(f"{path} is not UTF-8 text: byte {at} is 0x{wrong:02x}") from error
    except OSError as error:
        raise TltError(f"cannot read {path}: {error.strerror}") from error


def lines(path: Path, field: str, digest: Any, advance: Callable[[int], None]) -> Iterator[Fragment]:
    """A JSONL file's documents, the string under `field` of each line but blank ones; the hash takes those strings."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    text = _document(line, f"{path}, line {number}", field)
                    digest.update(text.encode())
                    yield Fragment(text, True)
                advance(len(line))
    except OSError as error:
        raise TltError(f"cannot read {path}: {error.strerror}") from error


def _document(line: bytes, where: str, field: str) -> str:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TltError(f"{where} is not UTF-8 text: its byte {error.start} is 0x{line[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise TltError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise TltError(f"{where} is JSON nested too deeply to read") from None
    if not isinstance(entry, dict):
        raise TltError(
            f'{where} is a JSON {type(entry).__name__}; each line should be an object with the key "{field}"'
        )
    if field not in entry:
        raise TltError(f'{where} has no key "{field}"; it has {", ".join(map(repr, entry)) or "none"}')
    text = entry[field]
    if not isinstance(text, str):
        raise TltError(f'{where}: "{field}" is a {type(text).__name__}, not a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TltError(f'{where}: "{field}" holds half a surrogate pair at character {error.start}') from error
    return text


@dataclass(frozen=True)
class _Piece:
    """Text to tokenize; one that goes on repeats the last 2 * OVERLAP characters of the piece before."""

    text: str
    goes_on: bool
    last: bool


def encode(
    tokenizer: Tokenizer, fragments: Iterable[Fragment], end: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of ids [N], each with the places in it where documents start; every document ends with `end`, if given.

    Documents without a word are left out. The ids are those that Tokenizer.encode gives for whole documents: pieces of
    a long one overlap, and are joined where a token of both starts.
    """
    dtype = np.dtype(np.uint8 if tokenizer.engine is None and (end is None or end < BYTES) else np.int32)
    overlap = 0 if tokenizer.engine is None else OVERLAP
    waiting = np.empty(0, dtype=dtype), np.empty(0, dtype=np.int64), 0  # ids, places and length of an unfinished piece
    for batch in _batched(_pieces(fragments, overlap)):
        found, starts, length = [np.empty(0, dtype=dtype)], list[int](), 0
        for piece, (ids, places) in zip(batch, _encoded(tokenizer, batch, dtype), strict=True):
            if piece.goes_on:
                before, before_places, characters = waiting
                stop, start = len(before), 0
                if overlap:
                    stop, start = _joint(before_places, places, characters - 2 * overlap, overlap)
                found.append(before[:stop])
                ids, places = ids[start:], places[start:]  # noqa: PLW2901
                length += stop
            else:
                starts.append(length)
            if not piece.last:
                waiting = ids, places, len(piece.text)
                continue
            found.append(ids)
            length += len(ids)
            if end is not None and not (len(ids) and ids[-1] == end):
                found.append(np.array([end], dtype=dtype))
                length += 1
        yield np.concatenate(found), np.array(starts, dtype=np.int64)


def _pieces(fragments: Iterable[Fragment], overlap: int) -> Iterator[_Piece]:
    text, goes_on = "", False
    for fragment in fragments:
        text += fragment.text
        while len(text) > PIECE + 2 * overlap:
            yield _Piece(text[:PIECE], goes_on, False)
            text, goes_on = text[PIECE - 2 * overlap :], True
        if fragment.last:
            if goes_on or text.strip():
                yield _Piece(text, goes_on, True)
            text, goes_on = "", False


def _batched(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch, characters = list[_Piece](), 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(
    tokenizer: Tokenizer, batch: list[_Piece], dtype: np.dtype[Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """ids [N] of each piece; and, of those that need to be joined, the character at which each token starts."""
    nowhere = np.empty(0, dtype=np.int64)
    if tokenizer.engine is None:
        for piece in batch:
            yield np.frombuffer(piece.text.encode(), dtype=np.uint8).astype(dtype), nowhere
        return
    for piece, encoding in zip(
        batch, tokenizer.engine.encode_batch([piece.text for piece in batch], add_special_tokens=False), strict=True
    ):
        ids = np.array(encoding.ids, dtype=dtype)
        if len(ids):
            tokenizer.check(int(ids.max()))
        whole = piece.last and not piece.goes_on
        places = nowhere if whole else np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        yield ids, np.maximum.accumulate(places)


def _joint(before: np.ndarray, after: np.ndarray, shift: int, overlap: int) -> tuple[int, int]:
    """How many tokens of a piece to keep, and how many of the next to leave out.

    Both give the characters at which tokens start, the next one's counted from character `shift` of the first. They
    are joined where tokens of both start, as near to the middle of what they share as can be.
    """
    middle = shift + overlap
    common = np.intersect1d(before, after + shift)
    at = int(common[np.abs(common - middle).argmin()]) if len(common) else middle
    return int(np.searchsorted(before, at)), int(np.searchsorted(after, at - shift))
