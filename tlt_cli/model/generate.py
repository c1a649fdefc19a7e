"""Writing on: one token after the other, each drawn from the model's distribution."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tlt_cli.checkpoint.folder import parse_config
from tlt_cli.errors import TltError, UsageError
from tlt_cli.model.decoder import Decoder


def generate(
    decoder: Decoder,
    ids: torch.Tensor,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """New ids after the prompt's ids [N], until `max_new_tokens`, a stop id (not given out) or the last position.

    Temperature 0 takes the likeliest token. The draw is made on the CPU: the same seed, the same text.
    """
    if not len(ids):
        raise TltError("the prompt has no tokens; give at least one")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"--temperature {temperature} is not a number from 0 up; 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise UsageError(f"--top-k {top_k} leaves no token; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p} is not between 0 and 1")
    if decoder.longest is not None and len(ids) > decoder.longest:
        raise TltError(f"the prompt has {len(ids)} tokens, but the model has {decoder.longest} positions")
    return _draws(decoder, ids, max_new_tokens, temperature, top_k, top_p, seed, frozenset(stop_ids))


def _draws(
    decoder: Decoder,
    ids: torch.Tensor,
    count: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    generator, device, cache = torch.Generator().manual_seed(seed), decoder.device, decoder.new_cache()
    step = ids.reshape(1, -1).to(device)
    for _ in range(count):
        if decoder.longest is not None and cache.length + step.shape[1] > decoder.longest:
            return
        with torch.no_grad():
            logits = decoder(step, cache)[0, -1].double().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise TltError("the logits are not finite: the weights are broken")
        token = choose(logits, temperature, top_k, top_p, generator)
        if token in stop_ids:
            return
        yield token
        step = torch.tensor([[token]], device=device)


def choose(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    """One id from logits [V]: the k likeliest, of them the fewest that hold `top_p` of the mass, then a draw."""
    if temperature == 0:
        return int(logits.argmax())
    ordered, order = logits.sort(descending=True, stable=True)
    chances = ((ordered - ordered[0]) / temperature).softmax(dim=-1)
    if top_k is not None:
        chances[top_k:] = 0.0
        chances = chances / chances.sum()
    if top_p is not None:
        before = chances.cumsum(dim=-1) - chances  # the likeliest token has nothing before it and always stays
        chances[before >= top_p] = 0.0
    return int(order[torch.multinomial(chances, 1, generator=generator)])


def stop_ids(config: Mapping[str, Any] | None, companions: Iterable[Path]) -> frozenset[int]:
    """The ids that end a text, as config.json and generation_config.json name them."""
    stated = [(config or {}).get("eos_token_id")]
    for path in companions:
        if path.name == "generation_config.json":
            stated.append(parse_config(path.read_bytes(), str(path)).get("eos_token_id"))
    ids = [one for value in stated for one in (value if isinstance(value, list) else [value])]
    return frozenset(one for one in ids if isinstance(one, int))
