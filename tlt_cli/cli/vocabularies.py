"""Whether models speak of the same tokens, compared token by token and not by size, and one vocabulary for all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.record import source_name
from tlt_cli.cli.console import Output
from tlt_cli.errors import TltError
from tlt_cli.families import Fit
from tlt_cli.model.text import load_tokenizer

_RULES = ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens")
_SPLITTING = ("model", "normalizer", "pre_tokenizer")
_TOKENIZER = "tokenizer.json"
_OF_A_TOKENIZER = (
    _TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """What the merged model's ids mean.

    `rows` has for each model the row of its own for each id [V], -1 where it has none; None where ids are its own and
    no rows are wanting. `files` take the place of the first model's that are named in `replaced`, and `config` are keys
    of config.json that go with them.
    """

    rows: tuple[tuple[int, ...] | None, ...]
    notes: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def check_vocabularies(found: Sequence[tuple[Checkpoint, Fit]], *, out: Output, union: bool = False) -> Vocabulary:
    """The vocabulary of some models together; raises TltError that shows the first token in which two differ.

    Where a checkpoint has no tokenizer, one of the same size is taken to be the same, and that is said. Tables of
    embeddings that are filled up to different sizes behind the same tokens are no difference. `union` joins
    vocabularies that differ, where one tokenizer can stand for all.
    """
    names = [source_name(checkpoint) for checkpoint, _ in found]
    if union:
        return _union(found, [_engine(*one) for one in found], names)
    if not _same_file(found):
        _compare(found, names, out)
    each = [own.sizes["vocab"] for _, own in found]
    rows = [None if size == max(each) else (*range(size), *(-1,) * (max(each) - size)) for size in each]
    notes = [
        f"{name} has {size:,} rows of embeddings of {max(each):,}, beyond its tokens; the mean of its rows fills it up"
        for name, size in zip(names, each, strict=True)
        if size < max(each)
    ]
    return Vocabulary(tuple(rows), tuple(notes))


def _same_file(found: Sequence[tuple[Checkpoint, Fit]]) -> bool:
    """Whether all have one and the same tokenizer.json: then there is nothing to compare in it."""
    files = [next((path for path in one.companions if path.name == _TOKENIZER), None) for one, _ in found]
    return None not in files and len({path.read_bytes() for path in files if path is not None}) == 1


def _compare(found: Sequence[tuple[Checkpoint, Fit]], names: Sequence[str], out: Output) -> None:
    """Raises TltError for the first token in which a model differs from the first that has a tokenizer; says what else
    does."""
    (first, fitted), named = found[0], names[0]
    known = _ids_and_rules(first, fitted)
    for (checkpoint, own), name in zip(found[1:], names[1:], strict=True):
        sizes, other = (fitted.sizes["vocab"], own.sizes["vocab"]), _ids_and_rules(checkpoint, own)
        if sizes[0] != sizes[1] and (known is None or other is None):
            raise TltError(
                f"{source_name(first)} has {sizes[0]:,} tokens and {name} {sizes[1]:,}: ids would not mean the same; "
                "merge models of one tokenizer"
            )
        if other is None or known is None:
            if other is not known:
                lacking = name if other is None else named
                out.note(f"{lacking} has no tokenizer beside it: its tokens are taken to be those of the others")
            known, named = (other, name) if known is None else (known, named)
            continue
        difference = first_difference(known[0], other[0])
        if difference is not None:
            raise TltError(f"{_differing(named, name, difference)}; merge models of one tokenizer, or --vocab union")
        if known[1] != other[1]:
            out.note(f"{name} has the tokens of {named} but other rules to find them; merged, the first's count")


def _union(found: Sequence[tuple[Checkpoint, Fit]], engines: Sequence[Any], names: Sequence[str]) -> Vocabulary:
    """All tokens of all models, matched by their text. The ids are those of the model that knows them all; where none
    does, the first one's, and behind them the tokens that were added to the others' tokenizers."""
    for (checkpoint, _), engine, name in zip(found, engines, names, strict=True):
        if engine is None or _TOKENIZER not in {path.name for path in checkpoint.companions}:
            raise TltError(f"{name} has no {_TOKENIZER} beside it: --vocab union matches tokens by their text")
    vocabularies: list[dict[str, int]] = [engine.get_vocab() for engine in engines]
    everything = set[str]().union(*vocabularies)
    knows = next((number for number, own in enumerate(vocabularies) if own.keys() >= everything), None)
    files = dict[str, bytes]()
    if knows is None:
        ids, text = _with_added(engines, names, vocabularies)
        files[_TOKENIZER] = text
    else:
        ids = vocabularies[knows]
    holder, fitted = found[knows or 0]
    size = max(1 + max(ids.values()), fitted.sizes["vocab"])
    rows, notes = list[tuple[int, ...] | None](), []
    for number, ((_, own), known) in enumerate(zip(found, vocabularies, strict=True)):
        stored = own.sizes["vocab"]
        taken = list(range(stored)) if number == (knows or 0) else []  # and what it has behind its tokens
        taken += [-1] * (size - len(taken))
        for token, at in ids.items():
            row = known.get(token, -1)
            taken[at] = row if row < stored else -1
        rows.append(None if taken == [*range(stored)] else tuple(taken))
        lacking = sum(taken[at] < 0 for at in ids.values())
        if lacking:
            notes.append(
                f"{names[number]} lacks {lacking:,} of {len(ids):,} tokens: the mean of its rows is read for each, and "
                "gives its logit"
            )
    if knows:
        notes.append(f"ids are those of {names[knows]}, which knows all tokens; text is split as it does")
        folder = Path(holder.location or ".") if holder.location and holder.location.is_dir() else None
        for path in holder.companions:
            if path.name in _OF_A_TOKENIZER and (folder is None or path.parent == folder):
                files[path.name] = path.read_bytes()
    special = {key: holder.config[key] for key in _SPECIAL if holder.config and key in holder.config} if knows else {}
    return Vocabulary(tuple(rows), tuple(notes), files, _OF_A_TOKENIZER if knows else (_TOKENIZER,), special)


def _with_added(
    engines: Sequence[Any], names: Sequence[str], vocabularies: Sequence[dict[str, int]]
) -> tuple[dict[str, int], bytes]:
    """The ids of all tokens, and the first tokenizer with what was added to the others added to it."""
    said = [json.loads(engine.to_str()) for engine in engines]
    ids, whole = dict(vocabularies[0]), said[0]
    for name, other, own in zip(names[1:], said[1:], vocabularies[1:], strict=True):
        if any(other.get(key) != whole.get(key) for key in _SPLITTING):
            difference = first_difference(vocabularies[0], own)
            assert difference is not None
            raise TltError(
                f"{_differing(names[0], name, difference)}: --vocab union takes tokenizers that differ in added tokens "
                "alone, or one that has all tokens; no one tokenizer splits text for these"
            )
        for token in sorted(other["added_tokens"], key=lambda token: int(token["id"])):
            if token["content"] not in ids:
                ids[token["content"]] = 1 + max(ids.values())
                whole["added_tokens"].append({**token, "id": ids[token["content"]]})
    from tokenizers import Tokenizer

    text = json.dumps(whole, ensure_ascii=False, indent=2)
    if Tokenizer.from_str(text).get_vocab() != ids:
        raise TltError(f"the tokenizer of {names[0]} numbers added tokens in its own way: --vocab union cannot add any")
    return ids, text.encode()


def first_difference(one: dict[str, int], other: dict[str, int]) -> tuple[str, int | None, int | None] | None:
    """The token of the lowest id in which two vocabularies differ, with its ids in both (None: not there).

    >>> first_difference({"a": 0, "b": 1}, {"a": 0, "c": 1})
    ('b', 1, None)
    """
    differing = [token for token in one.keys() | other.keys() if one.get(token) != other.get(token)]
    if not differing:
        return None
    token = min(differing, key=lambda token: (one.get(token, len(one)), token))
    return token, one.get(token), other.get(token)


def _differing(one: str, other: str, difference: tuple[str, int | None, int | None]) -> str:
    token, here, there = difference
    return (
        f"the tokenizers of {one} and {other} differ: {token!r} is {_number(here)} in the first and {_number(there)} "
        "in the second"
    )


def _number(value: int | None) -> str:
    return "missing" if value is None else f"id {value}"


def _engine(checkpoint: Checkpoint, fitted: Fit) -> Any:
    names = {path.name for path in checkpoint.companions}
    if not names & {_TOKENIZER, "tokenizer.model", "vocab.json"}:
        return None
    return load_tokenizer(checkpoint.companions, fitted.sizes["vocab"]).engine


def _ids_and_rules(checkpoint: Checkpoint, fitted: Fit) -> tuple[dict[str, int], dict[str, Any]] | None:
    """A tokenizer's ids by token, and how it finds tokens in text; None where there is no tokenizer."""
    engine = _engine(checkpoint, fitted)
    if engine is None:
        return None
    said = json.loads(engine.to_str())
    return engine.get_vocab(), {key: said.get(key) for key in _RULES}
