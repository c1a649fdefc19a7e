"""A LoRA into a folder that PEFT loads, by the same writer as every other output: whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tlt_cli.checkpoint import record
from tlt_cli.checkpoint.cast import safetensors_dtype
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.checkpoint.shards import is_single_file
from tlt_cli.checkpoint.writer import Written, write
from tlt_cli.errors import UsageError
from tlt_cli.model.lora import Lora
from tlt_cli.model.peft_read import CONFIG, WEIGHTS, stock_name, tensor_name
from tlt_cli.model.sites import Site


def write_peft(
    lora: Lora,
    output: Path,
    *,
    base: Checkpoint,
    prefix: str,
    command: str,
    before: Checkpoint | None = None,
    operation: str = "train",
    details: Mapping[str, Any] = {},
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Written:
    """Write the adapter of `base` to a new folder: PEFT's two files and a card, the base's digest in the lineage.

    `prefix` is the family's: names get it where the base's file lacks it. `before` is the adapter that this one was
    trained on from, if any. `details` go into the lineage; `check` is given the complete folder before it takes its
    name. Raises TltError, with nothing written, where it cannot be.
    """
    if is_single_file(output):
        raise UsageError(f"{output}: an adapter is a folder of two files; give a name without a suffix")
    lineage = record.adapter_lineage(base, before, operation=operation, command=command, details=details)
    values: dict[str, Tensor] = {}
    for site, _, a, b in lora.matrices():
        name = stock_name(site.module, prefix)
        values |= {tensor_name(name, "A"): a, tensor_name(name, "B"): b}
    tensors = [
        PlannedTensor(
            name, tuple(value.shape), safetensors_dtype(value.dtype), name, partial(_value, value), file=WEIGHTS
        )
        for name, value in values.items()
    ]
    config = peft_config(lora, base, prefix)
    ranks = sorted({update.rank for update in lora.updates.values()})
    rows = [
        ("adapted matrices", "0", str(len(lora.updates))),
        ("rank", "", str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"),
        ("parameters of the adapter", "0", f"{sum(tensor.parameters for tensor in tensors):,}"),
    ]
    card = record.model_card(base, lineage, changes=rows, library="peft", relation="adapter")
    files = {CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), "README.md": card.encode()}
    return write(
        output, tensors, base, config={}, metadata=record.metadata(lineage), files=files, force=force, check=check
    )


def peft_config(lora: Lora, base: Checkpoint, prefix: str) -> dict[str, Any]:
    """adapter_config.json of an adapter: the most common rank and alpha, and the others by module."""
    ranks = {stock_name(module, prefix): update.rank for module, update in lora.updates.items()}
    alphas = {stock_name(module, prefix): _plain(update.alpha) for module, update in lora.updates.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.repository or base.source,
        "revision": base.revision if base.repository else None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        "target_modules": _targets(lora.all_sites, set(lora.updates), prefix),
        "use_rslora": any(update.rslora for update in lora.updates.values()),
        "fan_in_fan_out": any(site.transposed for site in lora.sites),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _targets(found: Iterable[Site], adapted: set[str], prefix: str) -> list[str]:
    """Last names where all modules of that name are adapted, else whole ones: PEFT takes either."""
    whole: dict[str, list[str]] = {}
    for site in found:
        whole.setdefault(site.short, []).append(site.module)
    targets = []
    for short, modules in whole.items():
        own = [stock_name(module, prefix) for module in modules if module in adapted]
        targets += [short] if len(own) == len(modules) else own
    return sorted(targets)


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _value(value: Tensor, _: Tensors) -> Iterable[Tensor]:
    yield value.cpu().contiguous()
