"""Slicing a checkpoint in tests, and the judge: stock transformers running the parent with all else zeroed.

The judge knows nothing of arrows or cuts. It zeroes rows and columns of stock modules by their Hugging Face names and
replaces the forward of stock norms by the convention: over the kept entries, or over all of which the rest are zero.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from family_zoo import AllDouble
from growing import Source
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tlt_cli.checkpoint.writer import write
from tlt_cli.model.part import Part
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.slice import Wanted, chosen, sliced
from tlt_cli.surgery.targets import Sizes

# What the rows and columns of a stored matrix are, by the last words of its name.
_SIDES = {
    "embed_tokens": ("", "hidden"), "wte": ("", "hidden"), "wpe": ("", "hidden"), "lm_head": ("", "hidden"),
    "q_proj": ("queries", "hidden"), "k_proj": ("keys", "hidden"), "v_proj": ("keys", "hidden"),
    "o_proj": ("hidden", "queries"), "gate_proj": ("ffn", "hidden"), "up_proj": ("ffn", "hidden"),
    "down_proj": ("hidden", "ffn"), "c_attn": ("hidden", "fused"), "attn.c_proj": ("queries", "hidden"),
    "c_fc": ("hidden", "ffn"), "mlp.c_proj": ("ffn", "hidden"),
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What a part keeps, as plain lists: query heads and key/value heads of the parent, entries of a head."""

    hidden: list[int]
    ffn: list[int]
    heads: list[int]
    kv: list[int]
    entries: list[int]
    layers: int
    vocab: int
    norm: str = "sliced"
    gains: Mapping[tuple[str, int | None], float] = field(default_factory=dict)


def kept(source: Source, part: Part) -> Kept:
    """A part in the judge's words. Only for parts whose layers all keep the same."""
    size = source.fitted.head_dim // 2
    pairs = part.entries.tolist()
    entries = pairs + [pair + size for pair in pairs] if "rotary" in source.fitted.sizes else pairs
    return Kept(
        part.hidden.tolist(), part.ffn[0].tolist(), part.heads[0].tolist(), part.kv[0].tolist(), entries,
        len(part.layers), len(part.vocab), part.norm,
    )  # fmt: skip


@torch.no_grad()
def masked_logits(parent: transformers.PreTrainedModel, source: Source, keep: Kept, ids: Tensor) -> Tensor:
    """Logits of the parent with everything zeroed that is not kept, over the kept words, in the parent's dtype."""
    model = copy.deepcopy(parent)
    width = source.fitted.head_dim

    def mask(size: int, index: list[int]) -> Tensor:
        found = torch.zeros(size)
        found[index] = 1
        return found

    queries = torch.outer(mask(source.fitted.heads, keep.heads), mask(width, keep.entries)).flatten()
    keys = torch.outer(mask(source.fitted.kv_heads, keep.kv), mask(width, keep.entries)).flatten()
    masks = {
        "hidden": mask(source.fitted.sizes["hidden"], keep.hidden), "ffn": mask(source.fitted.sizes["ffn"], keep.ffn),
        "queries": queries, "keys": keys, "fused": torch.cat([queries, keys, keys]), "": torch.ones(1),
    }  # fmt: skip
    done = set[int]()
    for name, parameter in model.named_parameters():
        module, kind = name.rpartition(".")[::2]
        sides = next((sides for end, sides in _SIDES.items() if module.endswith(end)), None)
        if sides is None or id(parameter) in done:
            continue
        done.add(id(parameter))
        if kind == "bias":
            parameter.mul_(masks[sides[1 if "c_" in module.rpartition(".")[2] else 0]])
        else:
            parameter.mul_(masks[sides[0]].reshape(-1, 1) * masks[sides[1]])
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            heads = name.endswith(("q_norm", "k_norm"))
            module.forward = _norm(module, keep.entries if heads else keep.hidden, keep.norm)
    stack = model.model if hasattr(model, "model") else model.transformer
    layers = "layers" if hasattr(stack, "layers") else "h"
    setattr(stack, layers, getattr(stack, layers)[: keep.layers])
    with AllDouble() if model.dtype == torch.float64 else nullcontext():
        return model(ids, use_cache=False).logits[..., : keep.vocab]


def _norm(module: nn.Module, index: list[int], norm: str) -> Callable[[Tensor], Tensor]:
    gain = module.weight + 1 if type(module).__name__.startswith("Gemma") else module.weight
    epsilon = next(getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name))
    bias = module.bias if isinstance(module, nn.LayerNorm) else torch.zeros(())

    def forward(x: Tensor) -> Tensor:
        out, inner = torch.zeros_like(x), x[..., index]
        if isinstance(module, nn.LayerNorm):
            inner = inner - inner.mean(-1, keepdim=True)
        power = inner.pow(2).sum(-1, keepdim=True) / (len(index) if norm == "sliced" else x.shape[-1])
        out[..., index] = (inner * torch.rsqrt(power + epsilon) * gain[index]) + (bias[index] if bias.dim() else 0.0)
        return out

    return forward


def wanted(norm: str | None = None, **what: Any) -> Wanted:
    """`size`, `level` and `block`, or sizes by name."""
    own = {name: what.pop(name) for name in ("size", "level", "block") if name in what}
    return Wanted(sizes=Sizes(**what), norm=norm, **own)


def planned(source: Source, norm: str | None = None, **what: Any) -> tuple[Part, Plan]:
    found = chosen(source.fitted, wanted(norm, **what))
    return found.part, sliced(source.fitted, source.dtypes, found)[1]


def slice_to(out: Path, source: Source, norm: str | None = None, **what: Any) -> Part:
    """The part, written to the folder `out`."""
    part, plan = planned(source, norm, **what)
    write(out, plan.tensors, source.checkpoint, config=plan.config, metadata={"format": "pt"}, jobs=1, force=True)
    return part


def spoiled(
    folder: Path,
    config: Callable[[dict[str, Any]], None] = lambda config: None,
    tensors: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
) -> Path:
    """The folder with its config.json and its tensors changed in place: a wrong variant."""
    stated, stored = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    config(stated)
    tensors(stored)
    (folder / "config.json").write_text(json.dumps(stated))
    save_file({name: one.contiguous() for name, one in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference in largest values."""
    return float((found - expected).abs().max() / expected.abs().max())
