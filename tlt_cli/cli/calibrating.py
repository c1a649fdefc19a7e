"""What a calibration text shows of each matrix, as the methods weigh by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_cli.cli.console import Output
from tlt_cli.cli.measuring import USUAL_CONTEXT, positions
from tlt_cli.cli.opening import tokenizer_for
from tlt_cli.errors import TltError
from tlt_cli.families import Fit
from tlt_cli.model.text import Tokens, load_tokens
from tlt_cli.surgery.matrices import LINEARS, Matrix
from tlt_cli.surgery.metrics import Seen, needs_entries, needs_gradients

if TYPE_CHECKING:
    from tlt_cli.cli.factor_request import Request
    from tlt_cli.cli.factoring import Opened

MOST_TOKENS = 1 << 18  # of the text, evenly spread over it: second moments settle long before


def seen_by_text(
    opened: Opened, request: Request, *, out: Output
) -> tuple[Callable[[Matrix], Seen | None], dict[str, Any]]:
    """Run the model on the calibration text and return what it shows of a matrix, and what is recorded of the text.

    Raises TltError where nothing can be run.
    """
    from tlt_cli.calibration.blocks import Blocks, calibration_windows
    from tlt_cli.calibration.moments import moments

    fitted, tokens, context = calibration_text(opened, request, out=out)
    ids = calibration_windows(tokens.ids, context, max(1, MOST_TOKENS // context))
    gradients, entries = needs_gradients(request.weighing), needs_entries(request.weighing)
    with out.progress(f"calibrating on {tokens.info['source']}") as progress:
        found = moments(Blocks(opened.checkpoint, fitted), ids, gradients=gradients, entries=entries, progress=progress)

    def seen(matrix: Matrix) -> Seen:
        assert matrix.layer is not None and matrix.role is not None
        return found.seen(matrix.layer, matrix.role, request.weighing)

    return seen, recorded(tokens, ids.numel())


def recorded(tokens: Tokens, count: int) -> dict[str, Any]:
    """What a report says of a calibration text, of which `count` tokens were read: not where it lies."""
    return {**tokens.info, "source": Path(str(tokens.info["source"])).name, "tokens": count}


def calibration_text(opened: Opened, request: Request, *, out: Output) -> tuple[Fit, Tokens, int]:
    """The family, the request's text as ids, and the tokens per window. Raises TltError where no text can be run."""
    if opened.fitted is None:
        raise TltError(
            f"{opened.checkpoint.source}: no family fits, so no text can be run through it; --method svd needs none"
        )
    for matrix in opened.found:
        if matrix.role not in LINEARS:
            raise TltError(f"{matrix.name} is no linear of a block: a text says nothing of it; take --method svd")
    tokens = load_tokens(
        tokenizer_for(opened.checkpoint, opened.fitted.sizes["vocab"], request.tokenizer), request.calibration
    )
    for note in tokens.notes:
        out.note(note)
    widest = max(matrix.columns for matrix in opened.found)
    if len(tokens.ids) < widest:
        out.note(
            f"{len(tokens.ids)} tokens of calibration cannot show all {widest} inputs of a matrix, and what "
            "they do not show is taken to cost nothing; take a longer text"
        )
    return opened.fitted, tokens, request.context or min(USUAL_CONTEXT, positions(opened.fitted))
