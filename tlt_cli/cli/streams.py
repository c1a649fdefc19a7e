"""Every model on every text: the parts of a merged one alone, all together, with glue, and whatever stands beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tlt_cli.checkpoint.cast import torch_dtype
from tlt_cli.cli.console import Output, Table
from tlt_cli.cli.measuring import USUAL_CONTEXT, positions, windows_at_once
from tlt_cli.cli.opening import Source, load_decoder, opened_with_adapter, parse_device, parse_dtype, tokenizer_for
from tlt_cli.errors import UsageError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.text import Tokens, load_tokens
from tlt_cli.surgery.unmerge import alone, without_glue


@dataclass(frozen=True)
class _Model:
    """One row: what it is called, and how it is made ready to run."""

    name: str
    source: Source
    load: Callable[[], Decoder]
    texts: tuple[Tokens, ...]


def by_stream(
    sources: Sequence[str],
    data: Sequence[Path] | None,
    *,
    out: Output,
    base: str | None,
    family: str | None,
    axes: Sequence[str] | None,
    tokenizer: str | None,
    context: int | None,
    batch_size: int | None,
    device: str,
    dtype: str | None,
    stream: bool,
) -> dict[str, Any]:
    """{streams: names, context, models: [{model, source, losses: {stream: {perplexity, nll, tokens}}}]}.

    Everything is opened before anything is computed. Raises UsageError where no text is named.
    """
    if not data:
        raise UsageError("--streams are the texts that --data names, one a column; name one or more")
    names = _names(data)
    models: list[_Model] = []
    for source in sources:
        model = opened_with_adapter(source, out=out, base=base, family=family, axes=axes)
        reader = tokenizer_for(model.checkpoint, model.fit.sizes["vocab"], tokenizer)
        texts = tuple(load_tokens(reader, [path]) for path in data)
        models += [
            _Model(name, model, load, texts)
            for name, load in _members(model, device=device, dtype=dtype, stream=stream)
        ]  # fmt: skip
    for note in dict.fromkeys(note for one in models for tokens in one.texts for note in tokens.notes):
        out.note(note)
    if context is None:
        context = min(USUAL_CONTEXT, *(positions(one.source.fit) for one in models))
    rows = []
    for one in models:
        decoder, losses = one.load(), dict[str, dict[str, Any]]()
        for name, tokens in zip(names, one.texts, strict=True):
            batch = batch_size or windows_at_once(one.source.fit, context)
            with out.progress(f"reading {name} with {one.name}") as progress:
                losses[name] = perplexity(decoder, tokens.ids, context, batch, progress)
        rows.append({"model": one.name, "source": one.source.source, "losses": losses})
    corpora = {name: tokens.info for name, tokens in zip(names, models[0].texts, strict=True)}
    return {"streams": names, "context": context, "corpora": corpora, "models": rows}


def stream_table(report: dict[str, Any]) -> Table:
    """Perplexities: a row for each model, a column for each stream."""
    names = report["streams"]
    return Table(
        ("model", *names),
        [[row["model"], *(row["losses"][name]["perplexity"] for name in names)] for row in report["models"]],
    )


def _names(data: Sequence[Path]) -> list[str]:
    """Files by their own names where these differ, else as typed."""
    short = [path.name for path in data]
    found = short if len({*short}) == len(short) else [str(path) for path in data]
    if len({*found}) < len(found):
        raise UsageError("--data names a text twice; each stream is one column")
    return found


def _members(
    model: Source, *, device: str, dtype: str | None, stream: bool
) -> Iterator[tuple[str, Callable[[], Decoder]]]:
    """Of a merged model whose parts are still there each of them, then all without glue, then the model itself."""
    groups = model.fit.groups
    kind, place = torch_dtype(parse_dtype(dtype or "float32")), parse_device(device)
    if groups is not None and not groups.dense:
        for number, part in enumerate(groups.parts):
            name = f"{model.source}: part {number + 1}, {part.name}"
            yield name, partial(alone, model.checkpoint, model.fit, number, kind, place, stream=stream)
        if groups.glue is not None:
            bare = replace(model, fit=without_glue(model.fit))
            yield (
                f"{model.source}: without glue",
                lambda: load_decoder(bare.checkpoint, bare.fit, device=device, dtype=dtype, stream=stream),
            )
    yield (
        model.source,
        lambda: load_decoder(
            model.checkpoint, model.fit, adapter=model.adapter, device=device, dtype=dtype, stream=stream
        ),
    )  # fmt: skip
