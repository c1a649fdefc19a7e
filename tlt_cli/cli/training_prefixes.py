"""What `tlt train` asks of prefixes of the stream: which lengths, which categories, and how they stand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlt_cli.cli.console import Output
from tlt_cli.cli.training_request import Request
from tlt_cli.cli.training_start import Subject, Texts
from tlt_cli.errors import UsageError
from tlt_cli.model.decoder import Decoder
from tlt_cli.training.categories import Categories, read_categories
from tlt_cli.training.hierarchy import EMBEDDINGS, EMERGENT, IMPOSED, MOST_TOKENS, Hierarchy, token_frequencies
from tlt_cli.training.objective import LOGIT_BYTES, scored
from tlt_cli.training.prefixes import KEY, head_role, parsed_prefixes, stated_prefixes, usual_prefixes
from tlt_cli.training.windows import Batch


def hierarchy_of(
    request: Request, subject: Subject, texts: Texts, *, out: Output
) -> tuple[Hierarchy | None, dict[str, Any]]:
    """The hierarchy that a request trains, and what is recorded of it. TltError or UsageError for what cannot be."""
    if request.hierarchy is None and request.nested_only is None:
        return None, {}
    decoder = subject.decoder
    if subject.adapter is not None:
        raise UsageError("prefixes are those of the model's own embedding, which stands still beside an adapter")
    assert not subject.inner, "refused with the levels"
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
    if hierarchy.kind == EMERGENT:
        if seen > MOST_TOKENS:
            notes.append(f"categories are found among the {MOST_TOKENS:,} most frequent of the text's {seen:,} tokens")
        for prefix, count in hierarchy.counts.items():
            if count > len(hierarchy.tokens):
                raise UsageError(
                    f"--clusters: {count} at a prefix of {prefix}, but the text has {seen} different tokens"
                )
    return notes


def prefix_config(hierarchy: Hierarchy) -> dict[str, Any]:
    """The keys of config.json that say what prefixes a model was trained with; other readers pass over them."""
    return {KEY: list(hierarchy.prefixes), "hierarchy": hierarchy.kind}


@torch.no_grad()
def prefix_numbers(hierarchy: Hierarchy, decoder: Decoder, texts: Texts) -> Mapping[str, float]:
    """How every prefix stands: what it loses on the text held out, per token, and how well it is ordered."""
    totals: dict[str, float] = {}
    count = 0
    for _, rows in texts.held:
        some = max(1, min(8, LOGIT_BYTES // (4 * int(decoder.description["vocab"]) * rows.shape[1])))
        for piece in torch.split(rows, some):
            number = torch.zeros(len(piece), dtype=torch.int64)
            batch = Batch(piece, None, number, number).to(decoder.device)
            for name, value in hierarchy.objective(decoder, batch).numbers.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            count += scored(batch)
    return {**{name: total / count for name, total in totals.items()}, **hierarchy.scores(decoder)}
