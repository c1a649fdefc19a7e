"""What a model in training is worth on the text held out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tlt_cli.cli.training_start import Texts
from tlt_cli.errors import TltError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.perplexity import summed_loss
from tlt_cli.model.tree import Tree
from tlt_cli.training.objective import KL, LOGIT_BYTES, Objective
from tlt_cli.training.windows import Batch
from tlt_cli.training.world import ALONE, World, summed


@torch.no_grad()
def evaluate(
    decoder: Decoder, adapter: Any, texts: Texts, *, world: World = ALONE, split: bool = False,
    taught: Objective | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The loss on the held-out text, nats per token, and of several streams on each; of a tree soft and hard.

    With `taught`, a distillation, its divergence from the teacher too. The ranks of `world` share the work, each must
    call this, and all are told what one process would find; `split` says that they share the weights as well.
    """
    if not texts.held:
        return {}
    if not isinstance(adapter, Tree):
        return {**_losses(decoder, texts, world, split), **_divergence(taught, decoder, texts, world, split)}
    adapter.eval()
    soft = _losses(decoder, texts, world, split)
    adapter.report()
    adapter.hard = True
    hard = _losses(decoder, texts, world, split)
    if world.size > 1:
        torch.distributed.all_reduce(adapter.tally)
    served = adapter.report()
    numbers = {**hard, **_divergence(taught, decoder, texts, world, split)}
    adapter.report()
    adapter.hard = False
    adapter.train()
    return {**numbers, "soft_loss": soft["loss"], "gap": hard["loss"] - soft["loss"], **served}


def _losses(decoder: Decoder, texts: Texts, world: World, split: bool) -> dict[str, float]:
    found = stream_losses(decoder, texts, world=world, split=split)
    numbers = {"loss": sum(nll * tokens for nll, tokens in found) / sum(tokens for _, tokens in found)}
    if len(found) > 1:
        names = [name for name, _ in texts.held]
        numbers.update({f"loss_{name}": nll for name, (nll, _) in zip(distinct(names), found, strict=True)})
    return numbers


def stream_losses(
    decoder: Decoder, texts: Texts, *, world: World = ALONE, split: bool = False
) -> list[tuple[float, int]]:
    """Of each held-out stream nats per token, and how many tokens that is the mean of; the rest as for `evaluate`."""
    totals = _totals(lambda rows: [summed_loss(decoder, rows)], 1, decoder, texts, world, split)
    return [(total / tokens, tokens) for (total,), tokens in zip(totals, _tokens(texts), strict=True)]


def _divergence(
    taught: Objective | None, decoder: Decoder, texts: Texts, world: World, split: bool
) -> dict[str, float]:  # fmt: skip
    return {} if taught is None else mean_numbers(taught, [KL], decoder, texts, world=world, split=split)


@torch.no_grad()
def mean_numbers(
    objective: Objective, names: Sequence[str], decoder: Decoder, texts: Texts, *, world: World = ALONE,
    split: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Of an objective's `Loss.numbers` those of these names, means per held-out token; the rest as for `evaluate`."""
    if not texts.held:
        return {}

    def measure(rows: Tensor) -> list[float]:
        none = torch.zeros(len(rows), dtype=torch.long)
        numbers = objective(decoder, Batch(rows.to(decoder.device), None, none, none)).numbers
        return [float(numbers[name]) for name in names]

    streams = _totals(measure, len(names), decoder, texts, world, split)
    totals, tokens = map(sum, zip(*streams, strict=True)), sum(_tokens(texts))
    return {name: total / tokens for name, total in zip(names, totals, strict=True)}


def _totals(
    measure: Callable[[Tensor], Sequence[float]], count: int, decoder: Decoder, texts: Texts, world: World, split: bool
) -> list[list[float]]:
    """Of each held-out stream the sums of the `count` numbers that `measure` finds of some of its windows at a time.

    The windows that are measured together are the same ones however many ranks there are, and so are their sums.
    """
    most = LOGIT_BYTES // (4 * int(decoder.description["vocab"]) * texts.context)  # windows whose logits are bearable
    pieces = [
        (stream, rows)
        for stream, (_, held) in enumerate(texts.held)
        for rows in torch.split(held, max(1, min(8, most)))
    ]  # fmt: skip
    own: list[Sequence[float]] = [[0.0] * count] * len(pieces)
    for first in range(0, len(pieces), world.size):
        mine = first + world.rank
        if mine < len(pieces):
            own[mine] = measure(pieces[mine][1])
        elif split:  # every rank gathers weights as often as any other: once more, for nothing
            measure(pieces[first][1])
    found = summed(world, *itertools.chain.from_iterable(own))
    totals = []
    for stream, (name, _) in enumerate(texts.held):
        of_it = [found[at * count : (at + 1) * count] for at, (of, _) in enumerate(pieces) if of == stream]
        totals.append([math.fsum(values) for values in zip(*of_it, strict=True)])
        for total in totals[-1]:
            if not math.isfinite(total):
                raise TltError(f"the loss on what is held out of {name} is {total}: the weights are broken")
    return totals


def _tokens(texts: Texts) -> list[int]:
    """How many tokens of each held-out stream are scored."""
    return [rows[:, 1:].numel() for _, rows in texts.held]


def distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where several are the same.

    >>> distinct(["a", "b", "a"])
    ['a', 'b', 'a_3']
    """
    return [name if name not in names[:place] else f"{name}_{place + 1}" for place, name in enumerate(names)]
