"""The optimizers of a run, over parameters by name: AdamW for all, or Muon for the matrices inside the blocks."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tlt_cli.errors import TltError, UsageError
from tlt_cli.training.recipe import Recipe

Trained = Mapping[str, nn.Parameter]


def optimizers(
    trained: Trained, recipe: Recipe, *, blocks: Collection[str] = (), vectors: Collection[str] = ()
) -> list[torch.optim.Optimizer]:
    """New optimizers for what is trained. `blocks` names the parameters of the blocks, whose matrices Muon may take.
    `vectors` names those that are no matrices though they have two dims: gains of models side by side.

    AdamW (arXiv:1711.05101) decays matrices only, at one rate for all. Muon (Jordan et al. 2024) orthogonalizes the
    momentum of each matrix, scaled so that its steps are of AdamW's size (arXiv:2502.16982), so one rate serves both.
    A fused matrix is one matrix to it. Raises TltError where torch has no Muon, UsageError where it has no matrix.
    """
    inside = blocks if recipe.optimizer == "muon" else ()
    muon = [name for name, parameter in trained.items() if name in inside and parameter.dim() == 2]
    muon = [name for name in muon if name not in vectors]
    rest = {name: parameter for name, parameter in trained.items() if name not in muon}
    thin = {name for name, parameter in rest.items() if parameter.dim() <= 1 or name in vectors}
    groups = [
        {"params": [p for name, p in rest.items() if name not in thin], "weight_decay": recipe.weight_decay},
        {"params": [p for name, p in rest.items() if name in thin], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "muon" and any(trained[name].dim() == 3 for name in trained if name in inside):
        raise UsageError(
            "--optimizer muon takes one matrix at a time, and merged models have a matrix of each in one tensor; take "
            "adamw"
        )
    if recipe.optimizer == "muon" and not muon:
        raise UsageError("--optimizer muon is for the matrices of a model's blocks, and none is trained; take adamw")
    found: list[torch.optim.Optimizer] = []
    groups = [group for group in groups if group["params"]]
    if groups:
        found.append(torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True))
    if muon:
        found.append(_muon([trained[name] for name in muon], recipe))
    return found


def _muon(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    kind: Any = getattr(torch.optim, "Muon", None)
    if kind is None or "adjust_lr_fn" not in inspect.signature(kind).parameters:
        raise TltError(f"--optimizer muon needs torch 2.9 or later, and this is {torch.__version__}; take adamw")
    made: torch.optim.Optimizer = kind(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return made


def set_rate(found: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """The learning rate of the next step, for all groups."""
    for optimizer in found:
        for group in optimizer.param_groups:
            group["lr"] = rate
