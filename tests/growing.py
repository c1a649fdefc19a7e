"""Growing a checkpoint in tests: plan, write, and how far stock transformers then is from the source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from family_zoo import some_ids, stock_logits

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.reader import open_checkpoint
from tlt_cli.checkpoint.writer import write
from tlt_cli.families import Fit, fit
from tlt_cli.surgery.grow import Growth, Recipe, grown
from tlt_cli.surgery.plan import Plan
from tlt_cli.surgery.targets import Sizes


@dataclass(frozen=True)
class Source:
    """A checkpoint, fitted, with the logits that stock transformers gives it."""

    folder: Path
    checkpoint: Checkpoint
    fitted: Fit

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: info.dtype for name, info in self.checkpoint.tensors.items()}


def opened(folder: Path) -> Source:
    checkpoint = open_checkpoint(folder)
    return Source(folder, checkpoint, fit({n: i.shape for n, i in checkpoint.tensors.items()}, checkpoint.config))


def planned(source: Source, recipe: Recipe | None = None, **sizes: int) -> tuple[Growth, Plan]:
    return grown(source.fitted, source.dtypes, Sizes(**sizes), recipe or Recipe())


def grow_to(out: Path, source: Source, recipe: Recipe | None = None, **sizes: int) -> Path:
    """The grown checkpoint, written to the folder `out`."""
    plan = planned(source, recipe, **sizes)[1]
    write(out, plan.tensors, source.checkpoint, config=plan.config, metadata={"format": "pt"}, jobs=1, force=True)
    return out


def stock_distance(folder: Path, logits: torch.Tensor, ids: torch.Tensor | None = None) -> float:
    """Largest difference of stock transformers' logits on `folder`, in deviations of these, over the old words."""
    new = stock_logits(folder, some_ids() if ids is None else ids)[..., : logits.shape[-1]]
    return float((new - logits).abs().max() / logits.std())
