"""What training minimizes, summed over the tokens that are scored: the next token, or another model's opinion of it.

An objective is given the decoder and a batch and returns a `Loss`. Objectives that run a model at several sizes go here
too: the loop only adds up and divides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tlt_cli.model.decoder import Decoder
from tlt_cli.training.cross_entropy import summed_cross_entropy
from tlt_cli.training.windows import IGNORED, Batch, targets

KL = "kl"  # what a divergence from a teacher is called in logs and reports
LOGIT_BYTES = 1 << 28  # of logits that are kept at once; larger ones are made again on the way back
ROOM = 4  # times as many on an accelerator: each piece costs a pass over the head's weights and their gradient


@dataclass(frozen=True)
class Loss:
    """Sums over scored tokens: `total` is differentiated, `nll` is the cross-entropy in it, detached.

    `numbers`, detached too, are what else the log shows as means per token: the same names in every call of a step.
    """

    total: Tensor
    nll: Tensor
    numbers: Mapping[str, Tensor] = field(default_factory=dict)


Objective = Callable[[Decoder, Batch], Loss]


def next_token(decoder: Decoder, batch: Batch) -> Loss:
    """Cross-entropy of every row's tokens but its first, within documents."""
    wanted = targets(batch)
    total = read_stream(decoder, batch, partial(in_chunks, partial(_cross_entropy, decoder), decoder, wanted=wanted))
    return Loss(total, total.detach())


def distillation(teacher: Decoder, *, share: float = 1.0, temperature: float = 1.0) -> Objective:
    """KL(teacher || model) of the next token's distributions, `share` of it, the rest cross-entropy (arXiv:1503.02531).

    Both distributions are softened by `temperature`, the divergence multiplied by its square. Same tokenizer only.
    """

    def objective(decoder: Decoder, batch: Batch) -> Loss:
        wanted = targets(batch)
        with torch.no_grad():
            seen = read_stream(teacher, batch, lambda stream: stream)

        def read(stream: Tensor) -> tuple[Tensor, Tensor]:
            both = torch.cat([stream, seen.to(stream.dtype)], dim=-1)  # cut into chunks together
            width = stream.shape[-1]
            divergence = partial(_divergence, decoder, teacher, width, temperature)
            kl = in_chunks(divergence, decoder, both, wanted=wanted)
            with torch.set_grad_enabled(share < 1 and torch.is_grad_enabled()):
                nll = in_chunks(partial(_cross_entropy, decoder), decoder, stream, wanted=wanted)
            return kl, nll

        kl, nll = read_stream(decoder, batch, read)
        return Loss(share * kl + (1 - share) * nll if share < 1 else kl, nll.detach(), {KL: kl.detach()})

    return objective


def scored(batch: Batch) -> int:
    """How many of a batch's tokens are predicted."""
    return batch.rows[:, 1:].numel() if batch.documents is None else int((targets(batch) != IGNORED).sum())


def read_stream(decoder: Decoder, batch: Batch, read: Callable[[Tensor], Any]) -> Any:
    """What `read` makes of the stream behind the last block, [B, T, H], of a batch's inputs."""
    documents = None if batch.documents is None else batch.documents[:, :-1]
    return decoder(batch.rows[:, :-1], documents=documents, read=read)


def in_chunks(loss: Callable[[Tensor, Tensor], Tensor], decoder: Decoder, stream: Tensor, *, wanted: Tensor) -> Tensor:
    """The sum of loss(stream [1, n, H], wanted [n]), a number or several, over chunks whose logits fit LOGIT_BYTES,
    or ROOM times that on an accelerator."""
    flat, wanted = stream.flatten(0, 1)[None], wanted.flatten()
    room = LOGIT_BYTES * (1 if stream.device.type == "cpu" else ROOM)
    most = max(1, room // (4 * int(decoder.description["vocab"])))
    if flat.shape[1] <= most:
        return loss(flat, wanted)
    parts = [
        checkpoint(loss, some, words, use_reentrant=False) if torch.is_grad_enabled() else loss(some, words)
        for some, words in zip(torch.split(flat, most, 1), torch.split(wanted, most), strict=True)
    ]
    return torch.stack(parts).sum(0)


def _cross_entropy(decoder: Decoder, stream: Tensor, wanted: Tensor) -> Tensor:
    logits = decoder.logits(stream).squeeze(0)  # not [0]: that is a copy of all logits on the way back
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return summed_cross_entropy(wide, wanted, IGNORED)


def _divergence(
    decoder: Decoder, teacher: Decoder, width: int, temperature: float, both: Tensor, wanted: Tensor
) -> Tensor:
    own = (decoder.logits(both[..., :width]).squeeze(0).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        other = (teacher.logits(both[..., width:]).squeeze(0).float() / temperature).log_softmax(-1)
    each = functional.kl_div(own, other, log_target=True, reduction="none").sum(-1)
    return each.masked_fill(wanted == IGNORED, 0.0).sum() * temperature**2
