"""What `tlt train` asks of prefixes of the stream: which lengths, which categories, and how they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tlt_cli.cli.console import Output
from tlt_cli.cli.training_evaluation import mean_numbers
from tlt_cli.cli.training_request import Request
from tlt_cli.cli.training_start import Subject, Texts
from tlt_cli.errors import UsageError
from tlt_cli.model.decoder import Decoder
from tlt_cli.training.categories import Categories, read_categories
from tlt_cli.training.hierarchy import (
    EMBEDDINGS,
    EMERGENT,
    IMPOSED,
    MOST_TOKENS,
    Hierarchy,
    loss_name,
    token_frequencies,
)
from tlt_cli.training.prefixes import head_role, parsed_prefixes, stated_prefixes, usual_prefixes
from tlt_cli.training.world import ALONE, World


def hierarchy_of(
    request: Request, subject: Subject, texts: Texts, *, out: Output
) -> tuple[Hierarchy | None, dict[str, Any]]:
    """The hierarchy that a request trains, and what is recorded of it. TltError or UsageError for what cannot be."""
    if request.hierarchy is None and request.nested_only is None:
        return None, {}
    decoder = subject.decoder
    assert subject.adapter is None and not subject.inner, "refused with the request, and with the levels"
    if decoder.description.get("groups") is not None:
        raise UsageError("prefixes are those of one model, and this is several side by side; leave them out")
    role, width, vocab = head_role(decoder), subject.fitted.sizes["hidden"], subject.fitted.sizes["vocab"]
    kind = EMBEDDINGS if request.hierarchy is None else request.hierarchy.partition(":")[0]
    asked = None if request.prefixes is None else parsed_prefixes(request.prefixes)
    usual = stated_prefixes(subject.config, width) or usual_prefixes(width)
    info: dict[str, Any] = {"kind": kind}
    given: dict[int, Categories] = {}
    if request.hierarchy is not None and kind == IMPOSED:
        file = read_categories(Path(request.hierarchy.partition(":")[2]), subject.tokenizer, vocab=vocab)
        prefixes = file.prefixes(asked, usual)
        given = {**file.levels} if file.flat is None else {min(prefixes): file.flat}
        info["sha256"] = file.sha256
    else:
        prefixes = usual if asked is None else asked
    if not prefixes or prefixes[-1] >= width:
        named = f"a prefix of {prefixes[-1]} is not shorter" if prefixes else "no prefix is shorter"
        raise UsageError(f"{named} than the stream's {width} entries; name shorter ones: --prefixes")
    counts = _counts(request.clusters, prefixes)
    hierarchy = Hierarchy(
        kind=kind, prefixes=prefixes, frequencies=token_frequencies(texts.windows.streams, vocab),
        device=decoder.device, given=given, counts=counts, weight=request.prefix_weight,
    )  # fmt: skip
    _check_counts(hierarchy)
    for note in _notes(hierarchy, role, vocab):
        out.note(note)
    info.update(prefixes=list(prefixes), weight=request.prefix_weight)
    if given:
        info["categories"] = {str(prefix): _sizes(each) for prefix, each in given.items()}
    if counts:
        info["clusters"] = {str(prefix): count for prefix, count in counts.items()}
    return hierarchy, info


def _counts(text: str | None, prefixes: tuple[int, ...]) -> dict[int, int]:
    """--clusters by prefix: one number for all of them, or one for each."""
    if text is None:
        return {}
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 1 for part in parts):
        raise UsageError(f"--clusters {text}: expected whole numbers of at least 2 between commas, such as 5,10,20")
    if len(parts) not in (1, len(prefixes)):
        raise UsageError(f"--clusters {text}: {len(parts)} numbers for {len(prefixes)} prefixes; give one for each")
    return dict(zip(prefixes, map(int, parts * (len(prefixes) if len(parts) == 1 else 1)), strict=True))


def _check_counts(hierarchy: Hierarchy) -> None:
    for prefix, count in hierarchy.counts.items():
        if count > len(hierarchy.tokens):
            raise UsageError(
                f"--clusters: {count} at a prefix of {prefix}, but the text has {len(hierarchy.tokens)} different "
                "tokens to cluster; name fewer"
            )


def _sizes(categories: Categories) -> dict[str, int]:
    found = np.bincount(categories.labels[categories.tokens], minlength=len(categories.names))
    return dict(zip(categories.names, found.tolist(), strict=True))


def _notes(hierarchy: Hierarchy, role: str, vocab: int) -> list[str]:
    notes = []
    if role != "embedding" and hierarchy.kind != EMBEDDINGS:
        notes.append(
            "logits are made with a head of its own: the hierarchy comes to be in its rows, not the embedding's"
        )
    for prefix, each in hierarchy.given.items():
        alone = vocab - len(each.tokens)
        if alone:
            notes.append(f"prefix {prefix}: {alone:,} of {vocab:,} tokens are in no category; each is one of its own")
    seen = int((hierarchy.frequencies > 0).sum())
    if hierarchy.kind == EMERGENT and seen > MOST_TOKENS:
        notes.append(f"categories are found among the {MOST_TOKENS:,} most frequent of the text's {seen:,} tokens")
    return notes


def prefix_numbers(
    hierarchy: Hierarchy, decoder: Decoder, texts: Texts, *, world: World = ALONE, split: bool = False
) -> dict[str, float]:
    """How every prefix stands: what it loses on the text held out, per token, and how well it is ordered.

    The ranks of `world` share the work, and each must call this; `split` says that they share the weights as well.
    """
    names = [loss_name(prefix) for prefix in hierarchy.prefixes]
    found = mean_numbers(hierarchy.objective, names, decoder, texts, world=world, split=split)
    return {**found, **hierarchy.scores(decoder)}
