"""What training costs, in floating-point operations, and what a device could do at most."""

from __future__ import annotations

import time
from collections.abc import Collection

import torch

from tlt_cli.model.decoder import Decoder

# dense bfloat16 operations per second that the makers state, by a word of the device's name
_STATED = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "T4": 65e12}


def training_flops(
    decoder: Decoder, tokens: int, *, context: int, trained: Collection[str] | None = None, adapter: int = 0
) -> int:
    """Operations of training on `tokens` tokens. `trained` names the parameters that move (None: all).

    Two per weight of every matrix on the way there, two on the way back for the gradient of what it reads, two more
    for its own gradient where it is trained; an embedding is looked up instead. Scores and values of attention: twelve
    per head entry, layer and position looked back on, which are half a window on average. `adapter` is the number of
    weights that are trained beside them.
    """
    data = decoder.description
    looked_up = {
        data["roles"][role]["name"] + ".weight" for role in ("embedding", "positions") if role in data["roles"]
    }
    if data["tied"]:
        looked_up.remove(data["roles"]["embedding"]["name"] + ".weight")
    sizes = {name: p.numel() for name, p in decoder.named_parameters() if p.dim() > 1 and name not in looked_up}
    moved = sum(size for name, size in sizes.items() if trained is None or name in trained)
    attention: int = data["layers"] * data["heads"] * data["head_dim"] * context
    return tokens * (4 * sum(sizes.values()) + 2 * moved + 6 * attention + 6 * adapter)


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
