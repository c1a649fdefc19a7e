"""What training costs, in floating-point operations, and what a device could do at most."""

from __future__ import annotations

import time
from collections.abc import Collection

import torch

from tlt_cli.model.decoder import Decoder
from tlt_cli.model.sites import block_prefixes

# dense bfloat16 operations per second that the makers state, by a word of the device's name
_STATED = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "T4": 65e12}


def training_flops(
    decoder: Decoder, tokens: int, *, context: int, trained: Collection[str] | None = None, adapter: int = 0
) -> int:
    """Operations of training on `tokens` tokens. `trained` names the parameters that move (None: all).

    Two per weight of every matrix on the way there, two on the way back for the gradient of what it reads, two more
    for its own gradient where it is trained; an embedding is looked up instead. Scores and values of attention: four
    there and eight back per head entry, layer and position looked back on, which are half a window on average. Nothing
    goes back through layers below the first that is trained. `adapter` is the number of weights that are trained
    beside them, from the first layer on.
    """
    data = decoder.description
    layers: int = data["layers"]
    looked_up, place, vectors = _looked_up(decoder), _layers(decoder), decoder.vectors
    moving = place if trained is None else trained
    first = min([-1 if name in looked_up else place[name] for name in moving] + [0] * bool(adapter), default=layers)
    sizes = {
        name: parameter.numel()
        for name, parameter in decoder.named_parameters()
        if parameter.dim() > 1 and name not in vectors and (name not in looked_up or place[name] == layers)
    }
    passed = sum(size for name, size in sizes.items() if place[name] > first or place[name] == first < layers)
    moved = sum(size for name, size in sizes.items() if name in moving)
    attention: int = decoder.sizes(0)["query"][0] * context
    attended: int = attention * (2 * layers + 4 * (layers - max(first, 0)))
    return tokens * (2 * (sum(sizes.values()) + passed + moved) + attended + 6 * adapter)


def _looked_up(decoder: Decoder) -> set[str]:
    """The tensors of which rows are taken by number."""
    roles = decoder.description["roles"]
    return {f"{roles[role]['name']}.weight" for role in ("embedding", "positions") if role in roles}


def _layers(decoder: Decoder) -> dict[str, int]:
    """The layer that every parameter belongs to; -1 in front of them, their number behind them."""
    data, inside = decoder.description, block_prefixes(decoder)
    head = {f"{data['roles']['embedding']['name']}.weight"} if data["tied"] else set()
    front = _looked_up(decoder) - head
    return {
        name: next(
            (layer for prefix, layer in inside.items() if name.startswith(prefix)),
            -1 if name in front else data["layers"],
        )
        for name, _ in decoder.named_parameters()
    }


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Operations per second that the device could do at most, and where the figure is from.

    Its maker's for known accelerators in bfloat16, else that of a large matrix product timed here in float32.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for word, stated in _STATED.items():
            if word in name:
                return stated, f"{name}, dense bfloat16"
    size = 768
    a, b = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best, "a float32 matrix product timed at the start"
