"""The training loop: one step after another over windows of text. Whoever runs it evaluates and saves in between.

run = Run(decoder=decoder, trained=..., windows=windows, recipe=recipe, optimizers=...)
for step in range(first, recipe.steps):
    done = take_step(run, step)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tlt_cli.errors import TltError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.perplexity import perplexity
from tlt_cli.training.corpus import of_ids
from tlt_cli.training.objective import Loss, Objective, next_token, scored
from tlt_cli.training.optimizers import optimizers, set_rate
from tlt_cli.training.recipe import Recipe
from tlt_cli.training.windows import Batch, Windows
from tlt_cli.training.world import (
    ALONE,
    World,
    average,
    clip,
    loss_share,
    mean_of_rows,
    portion,
    summed,
    synchronize,
)


class Trainable(Protocol):
    """An adapter that is trained while the decoder stands still."""

    def advance(self, step: int, steps: int) -> None:
        """Called before a step's first pass: what changes in the course of training, a function of the step alone."""

    def penalty(self, step: int, steps: int, mean: Callable[[Tensor], Tensor]) -> Tensor | None:
        """What the last forward adds to the mean loss; None: nothing. `mean` makes the mean over a pass's rows one over
        the rows of all processes: of all values at once, and of as many on each."""


class Reads(Protocol):
    """Windows in an order that a step's number alone decides."""

    def batch(self, first: int, count: int) -> Batch:
        """Windows number `first` to `first + count - 1`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a step needs. `trained` are the parameters that move, by name; all others need no gradient.

    `sharded` says that FSDP sums gradients; else `average` does. `micro` windows go through the model at a time (None:
    all of a process's share). `autocast` is the dtype of matrix products on an accelerator. `after` is called behind
    every optimizer step with (step, rate) and returns numbers for the log: regularizers that are not part of the loss.
    """

    decoder: Decoder
    trained: Mapping[str, nn.Parameter]
    windows: Reads
    recipe: Recipe
    optimizers: Sequence[torch.optim.Optimizer]
    objective: Objective = next_token
    adapter: Trainable | None = None
    world: World = ALONE
    sharded: bool = False
    micro: int | None = None
    autocast: torch.dtype | None = None
    after: Callable[[int, float], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Done:
    """What one step was: `loss` in nats per scored token before the step, `norm` of its gradient before clipping.

    `numbers` are the objective's, means per scored token, and what `Run.after` returned.
    """

    step: int
    loss: float
    norm: float
    rate: float
    tokens: int
    numbers: Mapping[str, float] = field(default_factory=dict)


def take_step(run: Run, step: int) -> Done:
    """One step of the optimizer, on the windows that belong to it: the same ones however many processes share them.

    Raises TltError where the loss or its gradient is not finite, before any weight has moved, and where memory does
    not suffice.
    """
    world, recipe = run.world, run.recipe
    mine = portion(recipe.batch, world)
    batch = run.windows.batch(step * recipe.batch + mine.start, len(mine))
    (count,) = summed(world, scored(batch))
    if not count:
        raise TltError(f"no token of step {step} is to be predicted: every document is one token long; give more text")
    set_rate(run.optimizers, recipe.rate(step))
    most = -(-recipe.batch // world.size)  # rows of the ranks that have one more: all go through as many pieces
    micro = max(1, min(run.micro or most, most))
    pieces = [batch[first : first + micro] for first in range(0, most, micro)]
    nll, numbers = torch.zeros((), device=run.decoder.device), dict[str, Tensor]()
    if run.adapter is not None:
        run.adapter.advance(step, recipe.steps)
    try:
        for piece in pieces:
            synchronize(run.decoder, last=piece is pieces[-1])
            if len(piece.rows):
                found = _backward(run, piece.to(run.decoder.device), count, step)
                nll += found.nll
                numbers = {name: numbers.get(name, 0.0) + value for name, value in found.numbers.items()}
            else:  # others have a row left, and weights that are split are gathered by all: one again, for nothing
                _backward(run, pieces[0][:1].to(run.decoder.device), count, step, idle=True)
    except (RuntimeError, MemoryError) as error:
        raise _memory(error, micro, recipe) from error
    if not run.sharded:
        average(run.trained.values(), world)
    loss, *means = (total / count for total in summed(world, nll, *numbers.values()))
    if not math.isfinite(loss):
        raise TltError(f"the loss is {loss} at step {step}; train at a lower rate than {recipe.learning_rate:g}")
    norm = float(clip(run.trained.values(), recipe.clip or math.inf))
    if not math.isfinite(norm):
        raise TltError(f"the gradient is {norm} at step {step}; train at a lower rate than {recipe.learning_rate:g}")
    try:
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    except (RuntimeError, MemoryError) as error:
        raise _memory(error, 1, recipe) from error
    more = {} if run.after is None else run.after(step, recipe.rate(step))
    logged = {**dict(zip(numbers, means, strict=True)), **more}
    return Done(step, loss, norm, recipe.rate(step), recipe.tokens, logged)


def _backward(run: Run, piece: Batch, count: float, step: int, *, idle: bool = False) -> Loss:
    device, rows = run.decoder.device.type, 0 if idle else len(piece.rows)
    mean = partial(mean_of_rows, rows=rows, world=run.world)
    with contextlib.nullcontext() if run.autocast is None else torch.autocast(device, run.autocast):
        loss = run.objective(run.decoder, piece)
        total = loss_share(loss.total, math.inf if idle else count, run.world)
        penalty = None if run.adapter is None else run.adapter.penalty(step, run.recipe.steps, mean)
        if penalty is not None:  # a mean over rows, as the loss is one over tokens
            total = total + penalty * (rows * run.world.size / run.recipe.batch)
    torch.autograd.backward(total)
    return replace(loss, total=loss.total.detach())  # so that nothing holds on to the graph


def _memory(error: RuntimeError | MemoryError, micro: int, recipe: Recipe) -> BaseException:
    """The error itself, or where memory ran out one that says which knob to turn to which value."""
    short = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    if not short:
        return error
    if micro > 1:
        return TltError(
            f"out of memory with {micro} windows of {recipe.context} tokens at a time; try --micro-batch {micro // 2}: "
            f"the same {recipe.batch} windows a step, and the same result, in more pieces"
        )
    return TltError(
        f"out of memory with one window of {recipe.context} tokens at a time, weights, gradients and the optimizer's "
        f"state; try --context {max(1, recipe.context // 2)}, or train less of the model: --lora 8"
    )


def train(
    decoder: Decoder,
    ids: Tensor,
    *,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[int, float], None] | None = None,
    **recipe: Any,
) -> list[float]:
    """Train all weights in place on ids [N]; returns the loss of each step, nats per token. `recipe` is a Recipe's.

    After each step `progress(done, steps)` and `log(step, loss)` are called. Raises TltError as `take_step` does, and
    for a text shorter than a window.
    """
    chosen = Recipe(**recipe)
    windows = Windows((of_ids(ids),), chosen.context, chosen.seed)
    trained = dict(decoder.named_parameters())
    run = Run(
        decoder=decoder, trained=trained, windows=windows, recipe=chosen, optimizers=optimizers(trained, chosen),
    )  # fmt: skip
    losses = []
    for step in range(chosen.steps):
        losses.append(take_step(run, step).loss)
        if log is not None:
            log(step, losses[-1])
        if progress is not None:
            progress(step + 1, chosen.steps)
    return losses


def held_out(decoder: Decoder, ids: Tensor, *, context: int = 128) -> float:
    """Mean loss on ids [N] in contiguous windows, nats per token: what `tlt eval` calls nll."""
    return float(perplexity(decoder, ids, context)["nll"])
