"""Text to token ids, and back: the checkpoint's own tokenizer, or bytes where it has none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tlt_cli.errors import TltError

BYTES = 256
BUILT_IN = "pydoc_data.topics"
EVERY_BYTE = "no tokenizer beside the checkpoint: every byte is a token"
NO_TEXT = f"no text given: using the one that every Python carries ({BUILT_IN})"
_UNFINISHED = "\ufffd"  # what bytes that are not yet a character decode to
_SEEN = 16  # tokens before the first new one that its spelling may depend on


@dataclass(frozen=True)
class Tokenizer:
    """Text <-> ids. `engine` is a `tokenizers.Tokenizer`; without one every byte of UTF-8 is a token."""

    name: str
    vocab: int
    engine: Any = None

    def encode(self, text: str) -> torch.Tensor:
        """ids [N], no special tokens added. Raises TltError where an id lies beyond the vocabulary."""
        if self.engine is None:
            return (
                torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() if text else torch.zeros(0).long()
            )
        ids = torch.tensor(self.engine.encode(text, add_special_tokens=False).ids, dtype=torch.long)
        if len(ids):
            self.check(int(ids.max()))
        return ids

    def check(self, largest: int) -> None:
        """TltError where an id lies beyond the vocabulary."""
        if largest >= self.vocab:
            raise TltError(
                f"the tokenizer disagrees with the vocabulary: id {largest}, vocabulary {self.vocab}; "
                f"is {self.name} the one this checkpoint was trained with?"
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become replacement characters."""
        if self.engine is None:
            return bytes(token for token in ids if token < BYTES).decode(errors="replace")
        return str(self.engine.decode(list(ids), skip_special_tokens=False))


@dataclass(frozen=True)
class Tokens:
    """A corpus as ids [N], with where it came from: `info` has source, sha256 (of the UTF-8 text), tokenizer."""

    ids: torch.Tensor
    info: dict[str, Any]
    notes: tuple[str, ...] = ()


def load_tokenizer(companions: Iterable[Path], vocab: int, *, required: bool = False) -> Tokenizer:
    """The tokenizer among the files beside a checkpoint; bytes where there is none and the vocabulary holds them.

    `required` refuses bytes: where the user says which files hold the tokenizer, one of them must.
    """
    files = {path.name: path for path in companions}
    if "tokenizer.json" in files:
        return read_tokenizer(files["tokenizer.json"], vocab)
    if "tokenizer.model" in files:
        raise TltError(
            f"{files['tokenizer.model']} is a SentencePiece file; convert it first: "
            'python -c "from transformers import AutoTokenizer as T; '
            f"T.from_pretrained('{files['tokenizer.model'].parent}').save_pretrained('CONVERTED')\" "
            "and put CONVERTED/tokenizer.json beside the weights"
        )
    if "vocab.json" in files and "merges.txt" in files:
        from tokenizers import ByteLevelBPETokenizer

        path = files["vocab.json"]
        try:
            merged = ByteLevelBPETokenizer.from_file(str(path), str(files["merges.txt"]))
        except Exception as error:  # as bare as read_tokenizer's
            raise TltError(f"cannot read {path} and merges.txt: {error}") from error
        return Tokenizer(str(path), vocab, merged._tokenizer)
    if required:
        raise TltError(f"no tokenizer.json among the files given: {', '.join(files) or 'there are none'}")
    if vocab < BYTES:
        raise TltError(
            f"no tokenizer.json beside the checkpoint, and its vocabulary of {vocab} cannot hold the 256 bytes; "
            "pass --tokenizer PATH"
        )
    return Tokenizer("bytes", vocab)


def read_tokenizer(path: Path, vocab: int) -> Tokenizer:
    """The tokenizer of a tokenizer.json, whatever its name. Raises TltError where it cannot be read."""
    from tokenizers import Tokenizer as Engine

    try:
        engine = Engine.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for whatever is wrong with the file
        raise TltError(f"cannot read {path}: {error}") from error
    engine.no_truncation()
    engine.no_padding()
    return Tokenizer(str(path), vocab, engine)


def load_tokens(tokenizer: Tokenizer, paths: Sequence[str | Path] | None = None) -> Tokens:
    """The text of some files, one after the other, as ids; without files, the text that every Python carries.

    `notes` say what the user should know: which text was taken, that tokens are bytes.
    """
    notes = [] if tokenizer.engine is not None else [EVERY_BYTE]
    if paths:
        source = ", ".join(str(path) for path in paths)
        text = "".join(read_text(Path(path)) for path in paths)
    else:
        source, text = BUILT_IN, built_in_text()
        notes.append(NO_TEXT)
    if not text:
        raise TltError(f"{source} is empty: there is nothing to read")
    ids = tokenizer.encode(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Tokens(ids, {"source": source, "sha256": digest, "tokenizer": tokenizer.name}, tuple(notes))


def pieces(tokenizer: Tokenizer, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[str]:
    """The text of ids as they come, never half a character; `after` are the ids that stand before them.

    Joined, the pieces are what decoding all ids at once gives: a piece is what one more id adds to the text of the ids
    before it, since some tokenizers spell a token by its neighbours.
    """
    before, new = list(after)[-_SEEN:], list[int]()
    for token in ids:
        new.append(token)
        text = tokenizer.decode(before + new)
        if not text.endswith(_UNFINISHED):
            yield text[len(tokenizer.decode(before)) :]
            before, new = (before + new)[-_SEEN:], []
    if new:
        yield tokenizer.decode(before + new)[len(tokenizer.decode(before)) :]


def read_text(path: Path) -> str:
    """A UTF-8 file, newlines as stored. Raises TltError saying where it is not UTF-8."""
    try:
        return path.expanduser().read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TltError(f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}") from error
    except FileNotFoundError:
        raise TltError(f"{path}: no such file") from None
    except OSError as error:
        raise TltError(f"cannot read {path}: {error.strerror}") from error


def built_in_text() -> str:
    """Python's own language help, about half a megabyte of English and code: the topics in the order of their names."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
