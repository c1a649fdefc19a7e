"""How tokens lie in prefixes of the embedding: which are alike, in a table and as maps of their cosine similarity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.cli.console import Output, Table, printable
from tlt_cli.cli.opening import load_decoder, opened, tokenizer_for
from tlt_cli.cli.plotting import check_plot, save_heatmaps
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families.fit import Fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.text import BYTES, Tokenizer
from tlt_cli.training.categories import CategoryFile, read_categories
from tlt_cli.training.clusters import clustered
from tlt_cli.training.hierarchy import MOST_TOKENS
from tlt_cli.training.prefixes import parsed_prefixes, shown_prefixes

TOKENS = 64  # looked at where nothing says which
_SPACE = "\u2423"  # a space that is seen


@dataclass(frozen=True, eq=False)
class Map:
    """One prefix of one matrix: the tokens in the order of their tree, the group of each [n], and how alike they are,
    `cosines` [n, n]; `scores` as `Clustering.scores` has them."""

    matrix: str
    prefix: int
    tokens: np.ndarray
    names: tuple[str, ...]
    labels: np.ndarray
    cosines: np.ndarray
    scores: Mapping[str, float]

    def data(self) -> dict[str, Any]:
        """All but the cosines, JSON-able."""
        return {
            "matrix": self.matrix, "prefix": self.prefix, **self.scores, "order": self.tokens.tolist(),
            "tokens": list(self.names), "labels": self.labels.tolist(),
        }  # fmt: skip


def look_at_prefixes(
    source: str, *, out: Output, heatmap: Path | None = None, prefixes: str | None = None,
    categories: Path | None = None, tokens: int | None = None, tokenizer: str | None = None,
    family: str | None = None, axes: Sequence[str] | None = None, force: bool = False,
) -> tuple[dict[str, Any], Table]:  # fmt: skip
    """Cluster tokens by every prefix of the embedding, and of a head of its own; draw that where `heatmap` says.

    Returns everything, JSON-able, and a row per prefix. Raises TltError for what cannot be looked at or drawn.
    """
    asked = None if prefixes is None else parsed_prefixes(prefixes)
    if tokens is not None and not 1 < tokens <= MOST_TOKENS:
        raise UsageError(f"--tokens {tokens}: expected a number from 2 to {MOST_TOKENS}")
    if heatmap is not None:
        check_plot(heatmap, force=force, option="--heatmap")
    checkpoint, fitted = opened(source, out=out, family=family, axes=axes)
    width, vocab = fitted.sizes["hidden"], fitted.sizes["vocab"]
    known = _tokenizer(checkpoint, fitted, tokenizer)
    file = None
    if categories is not None:
        file = read_categories(categories, known or Tokenizer("bytes", vocab), vocab=vocab)
    usual = shown_prefixes(checkpoint.config or {}, width)
    lengths = asked or usual
    if file is not None:
        lengths = file.prefixes(asked, usual)
    if lengths[-1] > width:
        raise UsageError(f"a prefix of {lengths[-1]} is longer than the stream's {width} entries: see --prefixes")
    decoder = load_decoder(checkpoint, fitted, device="cpu", stream=True)
    maps = [
        found
        for role in ("embedding", *(() if fitted.tied else ("head",)))
        for found in _maps(decoder, role, lengths, file, tokens, known, vocab)
    ]
    report: dict[str, Any] = {
        "source": checkpoint.source, "family": fitted.family.name, "width": width, "tied": fitted.tied,
        "categories": None if file is None else {"sha256": file.sha256, "names": _names(file)},
        "maps": [each.data() for each in maps],
    }  # fmt: skip
    if heatmap is not None:
        save_heatmaps(
            heatmap, [(f"{each.matrix}, first {each.prefix} of {width}", each) for each in maps], across=len(lengths)
        )  # fmt: skip
        report["heatmap"] = str(heatmap)
    return report, _table(maps)


def _tokenizer(checkpoint: Checkpoint, fitted: Fit, given: str | None) -> Tokenizer | None:
    """None where there is none, and tokens are known by their numbers alone."""
    try:
        return tokenizer_for(checkpoint, fitted.sizes["vocab"], given)
    except TltError:
        if given is not None:
            raise
        return None


def _maps(
    decoder: Decoder, role: str, lengths: Sequence[int], file: CategoryFile | None, most: int | None,
    tokenizer: Tokenizer | None, vocab: int,
) -> list[Map]:  # fmt: skip
    named = {} if file is None else {length: file.flat or file.levels.get(length) for length in lengths}
    every = [each.tokens for each in (() if file is None else (file.flat, *file.levels.values())) if each is not None]
    shown = np.unique(np.concatenate(every)) if every else np.arange(vocab)[: most or TOKENS]
    shown = shown[: most or MOST_TOKENS]
    if len(shown) < 2:
        raise TltError(f"{len(shown)} token in all categories: at least 2 are compared")
    rows = _rows(decoder, role, shown)
    found = []
    for length in lengths:
        categories = named.get(length)
        inside = np.arange(len(shown)) if categories is None else np.flatnonzero(categories.labels[shown] >= 0)
        if len(inside) < 2:
            raise TltError(f"prefix {length}: {len(inside)} token in all categories: at least 2 are compared")
        labels = None if categories is None else categories.labels[shown[inside]]
        bounds = () if labels is None else (len(np.unique(labels)),) * 2
        clustering = clustered(rows[inside, :length], *bounds)
        order = clustering.order()
        tokens = shown[inside][order]
        found.append(Map(
            role, length, tokens, tuple(token_name(int(token), tokenizer) for token in tokens),
            clustering.labels[order], 1.0 - clustering.distances[np.ix_(order, order)], clustering.scores(labels),
        ))  # fmt: skip
    return found


@torch.no_grad()
def _rows(decoder: Decoder, role: str, tokens: np.ndarray) -> np.ndarray:
    """The rows of some tokens [n, H]; no others are read where rows are stored as such."""
    spot, ids = decoder.description["roles"][role], torch.from_numpy(tokens)
    found = decoder.weight(f"{spot['name']}.weight").T[ids] if spot["transposed"] else decoder.words(role, ids)
    rows = found.float().numpy()
    if not np.isfinite(rows).all():
        raise TltError(f"{spot['name']}.weight holds NaN or infinite values: the weights are broken")
    return rows


def token_name(token: int, tokenizer: Tokenizer | None) -> str:
    """A token as a label: its text on one line, spaces seen; a number for a byte that is no text, or where none is."""
    if tokenizer is None or (tokenizer.engine is None and token >= BYTES):
        return str(token)
    if tokenizer.engine is None:
        return _seen(chr(token)) if token < 128 else f"0x{token:02x}"
    text = tokenizer.decode([token])
    return _seen(text if text and "\ufffd" not in text else tokenizer.engine.id_to_token(token) or str(token))


def _seen(text: str) -> str:
    return printable(text).replace(" ", _SPACE)


def _names(file: CategoryFile) -> Any:
    if file.flat is not None:
        return list(file.flat.names)
    return {str(prefix): list(each.names) for prefix, each in file.levels.items()}


def _table(maps: Sequence[Map]) -> Table:
    scores = list(dict.fromkeys(name for each in maps for name in each.scores))
    columns = ("matrix", "prefix", "tokens", *(name.replace("_", " ") for name in scores))
    return Table(
        columns,
        [[each.matrix, each.prefix, len(each.tokens), *(each.scores.get(name) for name in scores)] for each in maps],
    )
