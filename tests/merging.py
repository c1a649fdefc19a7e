"""Merging in tests: models made, merged and written, and the mean of their logits by stock transformers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from family_zoo import make_checkpoint, some_ids, stock_logits
from growing import Source, opened
from safetensors.torch import load_file, save_file
from torch import Tensor

from tlt_cli.checkpoint.together import together
from tlt_cli.checkpoint.writer import write
from tlt_cli.model.modeling import MODELING, modeling_source
from tlt_cli.model.weights import load_checkpoint
from tlt_cli.surgery import merge as surgery
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.unmerge import block


@dataclass(frozen=True)
class Merged:
    """Models, their weights, the Plan of all of them, and where it is written."""

    parts: tuple[Source, ...]
    weights: tuple[float, ...]
    plan: Plan
    folder: Path

    def mean(self, ids: Tensor | None = None) -> Tensor:
        """The weighted mean of what stock transformers says of each model, [B, T, V]."""
        ids = some_ids() if ids is None else ids
        return sum(
            (weight * stock_logits(part.folder, ids) for weight, part in zip(self.weights, self.parts, strict=True)),
            start=torch.zeros(()),
        )


def made(folder: Path, family: str, tied: bool, variants: Sequence[dict[str, Any]]) -> list[Source]:
    """One random model for each set of config keys, each with weights of its own."""
    return [
        opened(make_checkpoint(folder / f"part{seed}", family, tied, seed=seed, **variant))
        for seed, variant in enumerate(variants)
    ]


def noisy(clean: Source, folder: Path, count: int = 3, size: float = 0.2) -> list[Source]:
    """Copies of a model, each with noise of its own, of `size` deviations of every matrix: alike, and none as good."""
    found, plain = [], weights_of(clean.folder)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        worse = {
            name: tensor + size * tensor.std() * torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1
            else tensor
            for name, tensor in plain.items()
        }
        copy = folder / f"noisy{number}"
        shutil.copytree(clean.folder, copy)
        save_file(worse, copy / "model.safetensors", {"format": "pt"})
        found.append(opened(copy))
    return found


@torch.no_grad()
def sampled(clean: Source, batch: int, length: int, among: tuple[int, int], sharpness: float = 3.0) -> Tensor:
    """What a model says, [batch, length], drawn from its logits times `sharpness`, of the tokens from..to alone."""
    decoder, generator = load_checkpoint(clean.checkpoint, clean.fitted), torch.Generator().manual_seed(0)
    ids = torch.randint(*among, (batch, 1), generator=generator)
    while ids.shape[1] < length:
        logits = sharpness * decoder(ids)[:, -1, slice(*among)]
        ids = torch.cat([ids, among[0] + torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    return ids


def merged(folder: Path, parts: Sequence[Source], weights: Sequence[float] | None = None) -> Merged:
    """Planned and written to `folder`, with the code that transformers runs it by."""
    sources = [surgery.Source(part.fitted, part.dtypes, part.folder.name, "0" * 64) for part in parts]
    plan = surgery.merge(sources, weights)
    write(
        folder, plan.tensors, together([part.checkpoint for part in parts]), config=plan.config,
        metadata={"format": "pt"}, files={MODELING: modeling_source()}, jobs=1,
    )  # fmt: skip
    shares = [1 / len(parts)] * len(parts) if weights is None else weights
    return Merged(tuple(parts), tuple(shares), plan, folder)


def taken_out(source: Source, number: int, folder: Path) -> Source:
    """Part `number` of a merged checkpoint, written to `folder`."""
    plan = block(source.fitted, source.dtypes, number)
    write(folder, plan.tensors, source.checkpoint, config=plan.config, metadata={"format": "pt"}, jobs=1)
    return opened(folder)


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint of one file."""
    return load_file(folder / "model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    first, second = weights_of(one), weights_of(other)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(_bits(first[name]), _bits(second[name]))
        for name in first
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
