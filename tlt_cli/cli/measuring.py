"""Perplexity of several checkpoints under the same conditions: everything is opened before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tlt_cli.cli.console import Output
from tlt_cli.cli.opening import Source, load_decoder, opened_with_adapter, parse_dtype, part_of, run_part, tokenizer_for
from tlt_cli.errors import TltError, UsageError
from tlt_cli.families.fit import Fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.nested import levels as known_levels
from tlt_cli.model.part import child
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.text import Tokens, load_tokens
from tlt_cli.surgery.slice_sizes import parameters

USUAL_CONTEXT = 512
_LOGITS_AT_ONCE = 2**25  # 128 MiB of float32
_MOST_WINDOWS = 32


@dataclass(frozen=True)
class Prepared:
    """A model and the text, as its own tokenizer cuts it."""

    model: Source
    tokens: Tokens


def prepare(
    sources: Sequence[str],
    *,
    out: Output,
    family: str | None,
    axes: Sequence[str] | None,
    tokenizer: str | None,
    data: Sequence[Path] | None,
    base: str | None = None,
) -> list[Prepared]:
    """Open every source and read the text for it; what is wrong with any of them is said before any work."""
    prepared = []
    said = set()
    for source in sources:
        model = opened_with_adapter(source, out=out, base=base, family=family, axes=axes)
        tokens = load_tokens(tokenizer_for(model.checkpoint, model.fit.sizes["vocab"], tokenizer), data)
        for note in tokens.notes:
            if note not in said:
                said.add(note)
                out.note(note)
        prepared.append(Prepared(model, tokens))
    return prepared


def parts(
    prepared: Sequence[Prepared], *, levels: bool = False, level: int | None = None, block: str | None = None
) -> list[Prepared]:
    """The same with the part of each that --level and --block name, or with --levels all the parts of each."""
    if not levels:
        return [replace(one, model=part_of(one.model, level, block)) for one in prepared]
    if level is not None or block is not None:
        raise UsageError("--levels are all levels and blocks; take it, or --level and --block")
    found = []
    for one in prepared:
        if one.model.adapter is not None:
            raise UsageError(f"--levels are those of a model, and {one.model.source} is a {one.model.adapter.kind}")
        known = known_levels(one.model.fit)
        if len(known) == 1:
            raise TltError(f"{one.model.source}: config.json names no levels (nested or fractal)")
        found += [replace(one, model=replace(one.model, part=part)) for part in known]
    return found


def _part(model: Source) -> dict[str, Any]:
    """Which part it is, and its parameters; nothing where no part was asked for."""
    if model.part is None:
        return {}
    sizes = child(model.fit, model.part.part).fit.sizes
    return {"part": model.part.name, "parameters": parameters(model.fit, sizes)}


def measure(
    prepared: Sequence[Prepared],
    *,
    out: Output,
    context: int | None,
    batch_size: int | None,
    device: str,
    dtype: str | None,
    stream: bool,
) -> list[dict[str, Any]]:
    """{source, perplexity, nll, tokens, corpus, corpus_sha256, context, tokenizer, ...} of each, one after the other.

    Without a context all of them are read in windows that the shortest-sighted one can see whole.
    """
    if context is None:
        context = min(USUAL_CONTEXT, *(positions(one.model.fit) for one in prepared))
    reports: list[dict[str, Any]] = []
    held: tuple[Source, Decoder] | None = None
    for one in prepared:
        model = one.model
        if held is None or held[0].checkpoint is not model.checkpoint:  # all parts of a model run in the one in memory
            whole = load_decoder(
                model.checkpoint, model.fit, adapter=model.adapter, device=device, dtype=dtype, stream=stream
            )
            held = model, whole
        decoder = run_part(held[1], model)
        with out.progress(f"reading {one.tokens.info['source']} with {model.source}") as progress:
            measured = perplexity(
                decoder, one.tokens.ids, context, batch_size or windows_at_once(model.fit, context), progress
            )
        reports.append(
            {
                "source": model.source,
                **_part(model),
                **measured,
                "corpus": one.tokens.info["source"],
                "corpus_sha256": one.tokens.info["sha256"],
                "context": context,
                "tokenizer": one.tokens.info["tokenizer"],
                "family": model.fit.family.name,
                **({} if model.adapter is None else {"base": model.checkpoint.source}),
                "dtype": parse_dtype(dtype or "float32"),
                "device": str(decoder.device),
            }
        )
    return reports


def windows_at_once(fit: Fit, context: int) -> int:
    """How many windows of so many tokens make logits of a bearable size."""
    return max(1, min(_MOST_WINDOWS, _LOGITS_AT_ONCE // (context * fit.sizes["vocab"])))


def positions(fit: Fit) -> int:
    """How far the model was made to see; of several side by side, the one that sees least far."""
    stated = [one.sizes.get("position") or one.setting("max_position_embeddings") for one in fit.parts]
    return min(count if isinstance(count, int) and count > 1 else USUAL_CONTEXT for count in stated)
