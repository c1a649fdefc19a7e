"""A file of categories: which tokens belong together, for each length of prefix.

    {"8": {"vowels": ["a", "e"], "digits": ["0", 49]}, "16": {...}}

Tokens are strings of the tokenizer or ids. A file of one level, {"vowels": [...], ...}, is for the shortest prefix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tlt_cli.checkpoint.strict_json import shortened, strict_json_object
from tlt_cli.errors import TltError, nearest
from tlt_cli.model.text import Tokenizer


@dataclass(frozen=True, eq=False)
class Categories:
    """Which of the categories `names` every token is in: `labels` [V] int64, -1 for those in none."""

    names: tuple[str, ...]
    labels: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """The tokens that are in a category, ascending."""
        return np.flatnonzero(self.labels >= 0)


@dataclass(frozen=True, eq=False)
class CategoryFile:
    """What a file says: categories by length of prefix, or of any length (`flat`); and the sha256 of it."""

    path: Path
    levels: Mapping[int, Categories]
    flat: Categories | None
    sha256: str

    def prefixes(self, given: Sequence[int] | None, usual: Sequence[int]) -> tuple[int, ...]:
        """The lengths to look at: those given, or the file's own, or where it names none the usual ones.

        Raises TltError for categories of a length that is not among those given.
        """
        if given is None:
            return tuple(sorted(self.levels)) or tuple(usual)
        for length in self.levels:
            if length not in given:
                listed = ",".join(map(str, given))
                raise TltError(f"{self.path}: has categories for a prefix of {length}, but --prefixes are {listed}")
        return tuple(given)


def read_categories(path: Path, tokenizer: Tokenizer, *, vocab: int) -> CategoryFile:
    """A file of categories. Raises TltError for whatever is none, naming it."""
    try:
        raw = path.expanduser().read_bytes()
    except OSError as error:
        raise TltError(f"cannot read {path}: {error.strerror}") from error
    held = strict_json_object(raw, str(path))
    if not held:
        raise TltError(f'{path} holds no categories; expected {{"vowels": ["a", "e"], ...}}')
    digest = hashlib.sha256(raw).hexdigest()
    if all(isinstance(value, list) for value in held.values()):
        return CategoryFile(path, {}, _categories(held, str(path), tokenizer, vocab), digest)
    found = {}
    for key, value in held.items():
        if not isinstance(value, dict) or not (key.isascii() and key.isdigit()):
            raise TltError(
                f"{path}: {shortened(key)} holds {shortened(value)}; expected lengths of prefixes, each with "
                'categories, {"8": {"vowels": ["a", "e"], ...}, ...}, or categories alone'
            )
        if not value:
            raise TltError(f"{path}: the prefix of {key} holds no categories")
        found[int(key)] = _categories(value, f"{path}, prefix {key}", tokenizer, vocab)
    return CategoryFile(path, found, None, digest)


def _categories(held: Mapping[str, Any], where: str, tokenizer: Tokenizer, vocab: int) -> Categories:
    labels = np.full(vocab, -1, dtype=np.int64)
    for number, (name, tokens) in enumerate(held.items()):
        if not isinstance(tokens, list) or not tokens:
            raise TltError(f"{where}: {name} is {shortened(tokens)}; expected a list of tokens")
        for token in tokens:
            place = f"{where}: {name}"
            at = _id(token, place, tokenizer)
            if not 0 <= at < vocab:
                raise TltError(f"{place} holds token {at}, but the vocabulary has {vocab} tokens")
            if labels[at] not in (-1, number):
                other = list(held)[labels[at]]
                raise TltError(f"{where}: {shortened(token)} is in {other} and in {name}; a token has one category")
            labels[at] = number
    return Categories(tuple(held), labels)


def _id(token: Any, place: str, tokenizer: Tokenizer) -> int:
    if isinstance(token, int) and not isinstance(token, bool):
        return token
    if not isinstance(token, str):
        raise TltError(f"{place} holds {shortened(token)}; expected tokens as strings or as ids")
    ids = list(_spelled(token, tokenizer))
    if len(ids) == 1:
        return ids[0]
    if tokenizer.engine is None:
        raise TltError(
            f"{place} holds {shortened(token)}, which is {len(ids)} bytes, and every byte is a token; "
            f"expected one, or ids{': ' + ', '.join(map(str, ids)) if ids else ''}"
        )
    raise TltError(
        f"{place} holds {shortened(token)}, which is no token of {Path(tokenizer.name).name}"
        f"{nearest(token, tokenizer.engine.get_vocab())}"
    )


def _spelled(text: str, tokenizer: Tokenizer) -> Iterator[int]:
    """The token of this name, or else the tokens that the text is made of, where they spell it again."""
    if tokenizer.engine is None:
        yield from text.encode()
        return
    named = tokenizer.engine.token_to_id(text)
    if named is not None:
        yield named
        return
    ids = tokenizer.engine.encode(text, add_special_tokens=False).ids
    if tokenizer.decode(ids) == text:
        yield from ids
