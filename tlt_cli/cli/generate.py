"""`tlt generate`: the model writes on."""

from __future__ import annotations

from itertools import tee
from typing import Annotated, Any

import typer

from tlt_cli.cli.console import Output
from tlt_cli.cli.options import (
    Axis,
    Base,
    Block,
    Device,
    Dtype,
    Family,
    Json,
    Level,
    Quiet,
    Seed,
    Source,
    Stream,
    TokenizerFrom,
    Verbose,
)
from tlt_cli.errors import UsageError

EXAMPLES = """
Examples:

tlt generate model --prompt "Once upon a time"

tlt generate model --prompt "Once upon a time" --temperature 0 --max-tokens 40 --json | jq .text

tlt generate fractal --prompt "Once upon a time" --level 1 --block 2/4

tlt generate tree --prompt "Once upon a time" --lock
"""


def _utf8(text: str) -> str:
    """A command line may hold any bytes; those that are no UTF-8 arrive as lone surrogates."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise typer.BadParameter("not valid UTF-8")
    return text


Prompt = Annotated[str, typer.Option("--prompt", metavar="TEXT", callback=_utf8, help="What the model continues.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="Most tokens to write.")]
Temperature = Annotated[float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Draw from the K likeliest tokens alone.")]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Draw from the fewest tokens that hold P of the mass.")
]

Lock = Annotated[
    bool, typer.Option("--lock", help="Of a tree of LoRAs: keep to the leaf that the prompt's end is sent to.")
]


def generate(
    source: Source,
    prompt: Prompt,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    lock: Lock = False,
    level: Level = None,
    block: Block = None,
    base: Base = None,
    family: Family = None,
    axis: Axis = None,
    tokenizer: TokenizerFrom = None,
    device: Device = "auto",
    dtype: Dtype = None,
    stream: Stream = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Continue a prompt, a token at a time.

    Standard output is the continuation alone, as it is made.
    """
    from tlt_cli.cli.opening import load_decoder, opened_with_adapter, part_of, run_part, tokenizer_for
    from tlt_cli.model.generate import generate as draw
    from tlt_cli.model.generate import stop_ids
    from tlt_cli.model.text import pieces
    from tlt_cli.model.tree import Tree

    out = Output(json=json, quiet=quiet, verbose=verbose)
    model = part_of(opened_with_adapter(source, out=out, base=base, family=family, axes=axis), level, block)
    checkpoint = model.checkpoint
    words = tokenizer_for(checkpoint, model.fit.sizes["vocab"], tokenizer)
    ids = words.encode(prompt)
    decoder = load_decoder(checkpoint, model.fit, adapter=model.adapter, stream=stream, dtype=dtype, device=device)
    decoder = run_part(decoder, model)
    told: dict[str, Any] = {} if model.part is None else {"part": model.part.name}
    if lock:
        if not isinstance(decoder.adapter, Tree):
            raise UsageError(f"--lock goes with a tree of LoRAs, and {source} is none")
        decoder.adapter.locked = told["leaves"] = decoder.adapter.choose_leaf(decoder, ids)
    stops = stop_ids(checkpoint.config, checkpoint.companions)
    drawn, counted = tee(draw(decoder, ids, max_tokens, temperature, top_k, top_p, seed, stops))
    text = ""
    for piece in pieces(words, drawn, after=ids.tolist()):
        text += piece
        if not json:
            out.write(piece)
    data = {"source": source, "prompt": prompt, "text": text, "tokens": len(list(counted)), "seed": seed}
    out.result({**data, "temperature": temperature, "top_k": top_k, "top_p": top_p, **told}, line="")
