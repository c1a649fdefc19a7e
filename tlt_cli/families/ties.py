"""Tied tensors that a file stores twice: the copy is dropped unread, so it must be a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_cli.errors import TltError
from tlt_cli.families.place import match

if TYPE_CHECKING:
    from tlt_cli.checkpoint.lazy import Checkpoint
    from tlt_cli.families.fit import Fit


def check_ties(checkpoint: Checkpoint, fit: Fit) -> None:
    """Raises TltError where config.json ties two stored tensors whose values differ.

    transformers takes such a pair for untied. Reads both tensors, and nothing where only one of them is stored.
    """
    if not fit.tied:
        return
    embedding = next(name for name, place in fit.places.items() if "embedding" in place.roles)
    for name in fit.dropped:
        row = match(fit.family, name)
        if row is not None and row[0] in fit.family.tied and not checkpoint.equal(name, embedding):
            raise TltError(
                f"{checkpoint.source}: config.json says tie_word_embeddings=true, but {name} and {embedding} differ in "
                f"value; set it to false to keep both, or delete {name} from the file"
            )
