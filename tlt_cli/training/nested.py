"""Models inside a model, trained together: each level is the same weights, cut, and has a share in the loss.

A level runs in place (`inside`): what it reads are views of the whole's weights, so that its gradient is the whole's.
Where it is one model, that sees every row (arXiv:2205.13147, arXiv:2310.07707 nest like this); several share the rows
out among them (`fractal`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from tlt_cli.errors import UsageError
from tlt_cli.families import Fit
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.nested import Level, levels
from tlt_cli.model.part import Child, child, inside
from tlt_cli.training.fractal import assigned
from tlt_cli.training.objective import Loss, Objective, next_token
from tlt_cli.training.windows import Batch


@dataclass(frozen=True, eq=False)
class Inner:
    """One of the models inside: which, what it is as a checkpoint of its own, and how it runs in the whole."""

    level: Level
    child: Child
    decoder: Decoder

    @cached_property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(parameter.numel() for parameter in self.decoder.parameters())


def inner_models(decoder: Decoder, fit: Fit) -> tuple[tuple[Inner, ...], ...]:
    """The models inside that the config.json of `fit` names, level by level, running in the decoder where it is.

    To be made when weights are on their device. Raises TltError for levels that the model's sizes do not allow.
    """
    made = [(level, child(fit, level.part)) for level in levels(fit) if level.level]
    found = [Inner(level, part, inside(decoder, part)) for level, part in made]
    return tuple(tuple(group) for _, group in itertools.groupby(found, key=lambda inner: inner.level.level))


def shares(count: int, weights: Sequence[float] | None = None) -> tuple[float, ...]:
    """Each level's share in the loss, the whole first: all alike, or as `weights` say; together 1."""
    chosen = (1.0,) * count if weights is None else tuple(weights)
    if len(chosen) != count:
        raise UsageError(f"{len(chosen)} weights for {count} levels, the whole among them; give one for each")
    return tuple(weight / sum(chosen) for weight in chosen)


def of_levels(
    inner: Sequence[Sequence[Decoder]], weights: Sequence[float], *, streams: int = 1,
    objective: Objective = next_token, drawn: Drawn | None = None,
) -> Objective:  # fmt: skip
    """The objective of the whole and of the models inside, level by level: all rows in each, `weights` of the levels,
    the whole's first. The models of a level share out rows of that many `streams`.

    With `drawn` a step has one of the levels inside beside the whole, for all of them: its weight times their number.
    The log has each level's own loss as loss_level_<n>.
    """

    def together(decoder: Decoder, batch: Batch) -> Loss:
        chosen = range(len(inner)) if drawn is None else (drawn(batch, len(inner)),)
        whole = objective(decoder, batch)
        total, numbers = weights[0] * whole.total, dict(whole.numbers)
        for at in chosen:
            given, nll = assigned(batch, streams, len(inner[at])), torch.zeros_like(whole.nll)
            for model in sorted(set(given.tolist())):
                loss = objective(inner[at][model], batch[(given == model).nonzero()[:, 0]])
                total = total + weights[at + 1] * len(inner) / len(chosen) * loss.total
                nll = nll + loss.nll
            numbers[level_name(at + 1)] = nll
        return Loss(total, whole.nll, numbers)

    return together


def level_name(level: int) -> str:
    """What a level's loss is called in logs and reports."""
    return f"loss_level_{level}"


@dataclass(frozen=True)
class Drawn:
    """Which level a step has, of those inside: a function of the seed and of the step that a batch's windows are of.

    `rows` windows are a step's; every micro-batch of a step, on every rank, and a resumed run draw the same.
    """

    rows: int
    seed: int

    def __call__(self, batch: Batch, count: int) -> int:
        """Its number, from 0 to count - 1."""
        step = int(batch.numbers[0]) // self.rows
        return int(np.random.default_rng((self.seed % 2**64, step)).integers(count))
