"""What a model in training is worth on the text held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tlt_cli.cli.training_start import Texts
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.perplexity import perplexity
from tlt_cli.model.tree import Tree
from tlt_cli.training.objective import LOGIT_BYTES


@torch.no_grad()
def evaluate(decoder: Decoder, adapter: Any, texts: Texts) -> dict[str, Any]:
    """The loss on the held-out text, nats per token, and of several streams on each; of a tree soft and hard."""
    if not texts.held:
        return {}
    if not isinstance(adapter, Tree):
        return _losses(decoder, texts)
    adapter.eval()
    soft = _losses(decoder, texts)
    adapter.report()
    adapter.hard = True
    hard = _losses(decoder, texts)
    adapter.hard = False
    numbers = {**hard, "soft_loss": soft["loss"], "gap": hard["loss"] - soft["loss"], **adapter.report()}
    adapter.train()
    return numbers


def _losses(decoder: Decoder, texts: Texts) -> dict[str, float]:
    most = LOGIT_BYTES // (4 * int(decoder.description["vocab"]) * texts.context)  # windows whose logits are bearable
    found = [perplexity(decoder, rows.flatten(), rows.shape[1], max(1, min(8, most))) for _, rows in texts.held]
    tokens = sum(each["tokens"] for each in found)
    numbers = {"loss": sum(each["nll"] * each["tokens"] for each in found) / tokens}
    if len(found) > 1:
        names = [name for name, _ in texts.held]
        numbers.update({f"loss_{name}": each["nll"] for name, each in zip(distinct(names), found, strict=True)})
    return numbers


def distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where several are the same.

    >>> distinct(["a", "b", "a"])
    ['a', 'b', 'a_3']
    """
    return [name if name not in names[:place] else f"{name}_{place + 1}" for place, name in enumerate(names)]
