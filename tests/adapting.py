"""LoRAs in tests: stock PEFT around stock transformers, and ours beside the decoder, with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from growing import opened
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tlt_cli.model.decoder import Decoder
from tlt_cli.model.lora import Lora, updates
from tlt_cli.model.peft_write import write_peft
from tlt_cli.model.sites import sites
from tlt_cli.model.weights import load_checkpoint

BOUND = 1e-5  # relative to the largest: stock norms and softmax stay in float32 whatever the weights are
WRONG = 1e-2


def decoder_of(folder: Path, dtype: torch.dtype = torch.float64) -> Decoder:
    made = opened(folder)
    return load_checkpoint(made.checkpoint, made.fitted, dtype=dtype).requires_grad_(False)


def stock(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


def peft_around(folder: Path, **settings: Any) -> Any:
    """Stock PEFT with random A and B, on all linears of the blocks unless told."""
    modules = sorted({site.short for site in sites(decoder_of(folder))})
    fused = any(site.transposed for site in sites(decoder_of(folder)))
    config = LoraConfig(
        **{"target_modules": modules, "task_type": "CAUSAL_LM", "fan_in_fan_out": fused, "r": 4, **settings}
    )
    model = get_peft_model(stock(folder), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def lora_beside(decoder: Decoder, dtype: torch.dtype = torch.float64, **settings: Any) -> Lora:
    """Ours with random A and B."""
    lora = Lora(decoder, updates(decoder, **{"rank": 4, **settings}), dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    for site, _, a, b in lora.matrices():
        lora.set(site.module, *(0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (a, b)))
    return lora


def write_lora(folder: Path, base: Path, output: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Path:
    """A folder with a random LoRA of `base`, as our writer makes it."""
    made = opened(base)
    lora = lora_beside(decoder_of(base), dtype, **settings)
    prefix = made.fitted.family.prefix
    write_peft(lora, folder / output, base=made.checkpoint, prefix=prefix, command="tlt train base --lora 4")
    return folder / output


def with_weights(lora: Lora, values: Mapping[str, Tensor]) -> Lora:
    """Ours with the A and B of a PEFT model's state; both adapt the same modules."""
    given = {name.replace(".default", ""): value for name, value in values.items() if "lora_" in name}
    for site in lora.sites:
        a, b = (given.pop(f"base_model.model.{site.module}.lora_{side}.weight") for side in "AB")
        lora.set(site.module, a, b)
    assert not given
    return lora


def far(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    assert one.shape == other.shape
    return float(((one - other).abs().max() / other.abs().max()).detach())
