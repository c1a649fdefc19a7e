"""What the user asked `tlt train` for, checked as far as the words alone go."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tlt_cli.errors import UsageError
from tlt_cli.training.recipe import Recipe

_ADAPTER_RATE, _RATE = 1e-2, 1e-3  # adapters bear about ten times a full fine-tuning's rate
_ADAPTER_DECAY, _DECAY = 0.0, 0.1
_EVALUATIONS = 10
PRECISIONS = ("auto", "float32")
# what changes neither weights nor what is learned from them, so is no part of the recorded command
_UNSAID = {
    "source", "output", "force", "dry_run", "resume", "micro_batch", "device", "compile", "tensorboard", "eval_every",
    "eval_tokens", "save_every", "leaf_devices",
}  # fmt: skip

_PLACES = {"base", "distill", "tokenizer", "family"}  # paths, or something else by name

# what says something of another option, and nothing without it
_BELONGS = {
    **dict.fromkeys(("alpha", "target"), ("lora", "lora_tree")), "rslora": ("lora",),
    **dict.fromkeys(("rank", "route", "tree_nodes"), ("lora_tree",)), "distill_share": ("distill",),
    **dict.fromkeys(("strength", "target_rank", "regularize_every", "regularize_only"), ("regularizer",)),
    **dict.fromkeys(("prefixes", "prefix_weight"), ("hierarchy", "nested_only")), "clusters": ("hierarchy",),
    **dict.fromkeys(("base", "family", "axes"), ("source",)),
    **dict.fromkeys(("nested_layers", "nested_heads"), ("nested",)), "split": ("fractal",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `tlt train`, under their own names. Raises UsageError for what does not go together."""

    source: str | None = None
    init: str | None = None
    data: Sequence[Path] = ()
    eval_data: Sequence[Path] = ()
    held_out: float = 0.05
    separator: str | None = None
    field: str = "text"
    mix: str | None = None
    steps: int | None = None
    epochs: float | None = None
    tokens: int | None = None
    batch_size: int | None = None
    batch_tokens: int | None = None
    micro_batch: int | None = None
    context: int | None = None
    lr: float | None = None
    optimizer: str = "adamw"
    schedule: str = "wsd"
    warm_up: int | None = None
    decay: int | None = None
    weight_decay: float | None = None
    clip: float = 1.0
    only: Sequence[str] = ()
    distill: str | None = None
    distill_share: float = 1.0
    lora: int | None = None
    alpha: float | None = None
    rslora: bool = False
    target: Sequence[str] = ()
    nested: str | None = None
    nested_layers: str | None = None
    nested_heads: str | None = None
    nested_sample: bool = False
    fractal: int | None = None
    split: int = 4
    level_weights: str | None = None
    lora_tree: int | None = None
    rank: int = 8
    route: str = "running"
    tree_nodes: str = "path"
    leaf_devices: str | None = None
    regularizer: str | None = None
    strength: float = 1.0
    target_rank: int | None = None
    regularize_every: int = 1
    regularize_only: Sequence[str] = ()
    hierarchy: str | None = None
    nested_only: str | None = None
    prefixes: str | None = None
    clusters: str | None = None
    prefix_weight: float = 1.0
    eval_every: int | None = None
    eval_tokens: int = 65536
    save_every: int | None = None
    resume: bool = False
    precision: str = "auto"
    compile: bool = False
    tensorboard: Path | None = None
    base: str | None = None
    tokenizer: str | None = None
    family: str | None = None
    axes: Sequence[str] = ()
    output: Path | None = None
    force: bool = False
    dry_run: bool = False
    max_shard_size: str | None = None
    device: str = "auto"
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.init is None):
            raise UsageError("name a checkpoint to train, or --init FAMILY:dim=256,... for random weights; one of them")
        lengths = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(lengths) != 1:
            raise UsageError(
                "say how long to train with one of --steps, --epochs and --tokens"
                + (f", not with {' and '.join(f'--{name}' for name in lengths)}" if lengths else "")
            )
        if self.batch_size is not None and self.batch_tokens is not None:
            raise UsageError("--batch-size and --batch-tokens say the same; drop one of the two")
        if self.lora is not None and self.lora_tree is not None:
            raise UsageError("--lora and --lora-tree are two adapters; train one at a time")
        if self.lora is not None or self.lora_tree is not None:
            self.check_beside_adapter()
            if self.init is not None:
                raise UsageError("an adapter of random weights adapts nothing: train --init first")
        if self.nested is not None and self.fractal is not None:
            raise UsageError("--nested and --fractal are two ways to lay models into one; train one of them")
        for each in fields(self):
            owners = _BELONGS.get(each.name, ())
            if owners and getattr(self, each.name) != each.default and not any(getattr(self, o) for o in owners):
                wanted = " or ".join("a checkpoint" if owner == "source" else _option(owner) for owner in owners)
                raise UsageError(f"{_option(each.name)} says nothing without {wanted}; drop it, or give that too")
        if self.leaf_devices is not None:
            raise UsageError(
                "--leaf-devices: all leaves are computed as one pair of matrix products on the model's device, which "
                "is what makes a tree about as fast as one LoRA; drop the option"
            )
        self._check_prefixes()
        if self.precision not in PRECISIONS:
            raise UsageError(f"--precision {self.precision} is not known; take one of {', '.join(PRECISIONS)}")
        if not 0 <= self.held_out < 1:
            raise UsageError(f"--held-out {self.held_out}: expected a share from 0 to below 1")
        if not 0 < self.distill_share <= 1:
            raise UsageError(f"--distill-share {self.distill_share}: expected a share above 0, at most 1")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UsageError(f"--epochs {self.epochs}: expected a number above 0")

    def check_beside_adapter(self) -> None:
        """UsageError for what says something of the model's own weights: they stand still beside an adapter."""
        if self.only:
            raise UsageError("--only chooses tensors of the model, which stands still beside an adapter; see --target")
        if self.optimizer == "muon":
            raise UsageError("--optimizer muon is for the matrices of a model's blocks; adapters are trained by adamw")
        if self.regularizer is not None:
            raise UsageError("--regularizer shapes the model's own matrices, which stand still beside an adapter")
        if self.dtype is not None or self.max_shard_size is not None:
            raise UsageError("--dtype and --max-shard-size are of a whole model; an adapter is one file in float32")
        if self.nested is not None or self.fractal is not None:
            option = "fractal" if self.nested is None else "nested"
            raise UsageError(f"--{option} trains the model's own weights, which stand still beside an adapter")
        if self.hierarchy is not None or self.nested_only is not None:
            raise UsageError("prefixes are those of the model's own embedding, which stands still beside an adapter")

    def _check_prefixes(self) -> None:
        """UsageError for what prefixes cannot learn."""
        kind, _, file = (self.hierarchy or "").partition(":")
        if self.hierarchy is not None and (kind, bool(file)) not in (("imposed", True), ("emergent", False)):
            raise UsageError(f"--hierarchy {self.hierarchy}: expected emergent, or imposed:FILE of categories (JSON)")
        if self.nested_only not in (None, "embeddings"):
            raise UsageError(f"--nested-only {self.nested_only} is not known; embeddings is")
        if self.hierarchy is not None and self.nested_only is not None:
            raise UsageError(
                "--hierarchy and --nested-only ask different things of the same prefixes; give one of them"
            )
        if self.distill is not None and (self.hierarchy or self.nested_only):
            raise UsageError("--distill and prefixes are two objectives; train one after the other")
        if self.clusters is not None and kind != "emergent":
            raise UsageError("--clusters says how many categories to find: it goes with --hierarchy emergent")
        if not 0 < self.prefix_weight < math.inf:
            raise UsageError(f"--prefix-weight {self.prefix_weight}: expected a number above 0")

    @property
    def weights(self) -> list[float] | None:
        """The streams' weights. Raises UsageError where --mix does not hold one for each."""
        if self.mix is None:
            return None
        try:
            found = [float(part) for part in self.mix.split(",")]
        except ValueError:
            found = []
        if len(found) != len(self.data) or not all(0 < weight < math.inf for weight in found):
            raise UsageError(f"--mix {self.mix}: expected a number above 0 for each --data, {len(self.data)} of them")
        return found

    def recipe(self, *, context: int, batch: int, windows: int, adapts: bool) -> Recipe:
        """The run's recipe; `windows` is how many an epoch has, `adapts` whether an adapter is trained."""
        if self.steps is not None:
            steps = self.steps
        elif self.tokens is not None:
            steps = max(1, round(self.tokens / (batch * context)))
        else:
            assert self.epochs is not None
            steps = max(1, round(self.epochs * windows / batch))
        rate = (_ADAPTER_RATE if adapts else _RATE) if self.lr is None else self.lr
        decay = (_ADAPTER_DECAY if adapts else _DECAY) if self.weight_decay is None else self.weight_decay
        return Recipe(
            steps=steps, learning_rate=rate, batch=batch,
            context=context, optimizer=self.optimizer, schedule=self.schedule, warm_up=self.warm_up, decay=self.decay,
            weight_decay=decay, clip=self.clip, seed=self.seed,
        )  # fmt: skip

    def every(self, given: int | None, steps: int) -> int:
        """A cadence in steps: a tenth of all unless told; 0 stands for never."""
        return max(1, math.ceil(steps / _EVALUATIONS)) if given is None else given

    def command(self, source: str | None) -> str:
        """The command that trains the same weights: no paths of outputs, no words on how to run it."""
        words = ["tlt", "train", *([source] if source else [])]
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in _UNSAID or value == each.default:
                continue
            option = _option(each.name)
            if each.name == "hierarchy" and ":" in value:
                value = f"imposed:{Path(value.partition(':')[2]).name}"
            if each.name in _PLACES and Path(value).expanduser().exists():
                value = Path(value).expanduser().resolve()
            for one in value if isinstance(value, list | tuple) else (value,):
                words += [option] if one is True else [option, _said(one)]
        return shlex.join(words)


def _option(name: str) -> str:
    return "--" + {"axes": "axis"}.get(name, name).replace("_", "-")


def _said(value: Any) -> str:
    """An option's value; of a file its name alone."""
    return value.name if isinstance(value, Path) else str(value)
