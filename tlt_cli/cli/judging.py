"""How well a factored model reads a text, and whether that is well enough."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.cli.console import Output
from tlt_cli.cli.factor_request import Request
from tlt_cli.cli.measuring import USUAL_CONTEXT, positions, windows_at_once
from tlt_cli.cli.opening import fitted_like, load_decoder, tokenizer_for
from tlt_cli.errors import TltError
from tlt_cli.families import Fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.text import Tokens, load_tokens

if TYPE_CHECKING:
    from tlt_cli.cli.factoring import Opened


def eval_text(opened: Opened, request: Request, *, out: Output) -> Tokens | None:
    """The text to judge by, where one is wanted; it takes a family, for a model must run."""
    if not request.eval and request.max_perplexity is None:
        return None
    if opened.fitted is None:
        raise TltError(f"{opened.checkpoint.source}: no family fits, so nothing can run it; --eval needs one")
    tokenizer = tokenizer_for(opened.checkpoint, opened.fitted.sizes["vocab"], request.tokenizer)
    tokens = load_tokens(tokenizer, request.eval)
    for note in tokens.notes:
        out.note(note)
    return tokens


def read_with(decoder: Decoder, fitted: Fit, text: Tokens, request: Request) -> dict[str, Any]:
    """{perplexity, nll, tokens} of the text."""
    context = request.context or min(USUAL_CONTEXT, positions(fitted))
    return perplexity(decoder, text.ids, context, windows_at_once(fitted, context))


def judge(opened: Opened, request: Request, text: Tokens | None, staged: Checkpoint) -> dict[str, Any]:
    """How well the output reads the text; nothing without one. TltError beyond the request's bound."""
    found: dict[str, Any] = {}
    if text is not None:
        assert opened.fitted is not None
        written = fitted_like(staged, opened.fitted)
        read = read_with(load_decoder(staged, written, device=request.device), opened.fitted, text, request)
        found |= {**read, "corpus": text.info["source"], "corpus_sha256": text.info["sha256"]}
        if request.max_perplexity is not None and read["perplexity"] > request.max_perplexity:
            raise TltError(
                f"the perplexity is {read['perplexity']:.6g}, and --max-perplexity allows {request.max_perplexity:g}; "
                "nothing was written"
            )
    return found
