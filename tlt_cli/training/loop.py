"""The training loop: windows of text in random order, AdamW, a rate that warms up and falls to zero."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from tlt_cli.errors import TltError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.perplexity import perplexity

BETAS = (0.9, 0.95)
CLIP = 1.0  # largest norm of all gradients together


def train(
    decoder: Decoder,
    ids: torch.Tensor,
    *,
    steps: int,
    learning_rate: float = 3e-3,
    warm_up: int | None = None,
    batch: int = 8,
    context: int = 128,
    weight_decay: float = 0.1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train all weights in place on ids [N]; returns the loss of each step's batch before the step, nats per token.

    A step sees `batch` windows of `context` tokens, drawn with `seed`: the same ones whatever the model. The rate rises
    over `warm_up` steps (None: a tenth of them) and then falls to zero in a line. Only matrices decay. After each step
    `progress(done, steps)` and `log(step, loss)` are called. Raises TltError for a text shorter than a window, and
    where the loss is no longer finite.
    """
    parameters = list(decoder.parameters())
    assert all(p.dtype in (torch.float32, torch.float64) for p in parameters), "weights are trained in float32"
    if len(ids) < context:
        raise TltError(f"the text has {len(ids)} tokens, less than one window of {context}; give more text")
    warm_up = max(1, steps // 10) if warm_up is None else warm_up
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate(step, steps, warm_up)
        loss = next_token_loss(decoder, draw(ids, batch, context, generator).to(decoder.device))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise TltError(f"the loss is {losses[-1]} at step {step}; train at a lower rate than {learning_rate:g}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        if log is not None:
            log(step, losses[-1])
        if progress is not None:
            progress(step + 1, steps)
    return losses


def rate(step: int, steps: int, warm_up: int) -> float:
    """The share of the learning rate at a step, counted from 0: a line up, then a line down that ends at zero.

    >>> [rate(step, 6, 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up)) if warm_up < steps else (step + 1) / warm_up


def draw(ids: torch.Tensor, batch: int, context: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows [batch, context] of ids [N]."""
    starts = torch.randint(0, len(ids) - context + 1, (batch,), generator=generator)
    return ids[starts[:, None] + torch.arange(context)]


def next_token_loss(decoder: Decoder, rows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of every token but each row's first; rows [B, T], on the decoder's device."""
    logits = decoder(rows)[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def held_out(decoder: Decoder, ids: torch.Tensor, *, context: int = 128) -> float:
    """Mean loss on ids [N] in contiguous windows, nats per token: what `tlt eval` calls nll."""
    return float(perplexity(decoder, ids, context)["nll"])


def training_flops(decoder: Decoder, tokens: int, *, context: int = 128) -> int:
    """Floating-point operations of training on `tokens` tokens: forward, and backward at twice the price.

    Six per weight of every matrix that multiplies (an embedding is looked up instead); as many for scores and values
    per head entry, layer and position looked back on, which are half a window on average.
    """
    data = decoder.description
    looked_up = {
        data["roles"][role]["name"] + ".weight" for role in ("embedding", "positions") if role in data["roles"]
    }
    if data["tied"]:
        looked_up.remove(data["roles"]["embedding"]["name"] + ".weight")
    matrices = sum(p.numel() for name, p in decoder.named_parameters() if p.dim() > 1 and name not in looked_up)
    attention: int = data["layers"] * data["heads"] * data["head_dim"] * context
    return 6 * tokens * (matrices + attention)
