"""A tree of LoRAs as a folder: tree_config.json says what it is made of, tree_adapter.safetensors holds its numbers.

`<module>.tree_a` [N r, in] and `<module>.tree_b` [out, N r] by the names of the base's modules, `router.weight`
[R, L - 1, H] and `router.bias` [R, L - 1]: what a `Tree` holds, module by module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_cli.checkpoint import record
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.local import open_file
from tlt_cli.checkpoint.planned import PlannedTensor, Tensors
from tlt_cli.checkpoint.shards import is_single_file
from tlt_cli.checkpoint.strict_json import strict_json_object
from tlt_cli.checkpoint.writer import Written, write
from tlt_cli.errors import TltError, UsageError, nearest
from tlt_cli.model.tree_shape import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tlt_cli.model.decoder import Decoder
    from tlt_cli.model.lora import Lora
    from tlt_cli.model.tree import Tree

CONFIG, WEIGHTS = "tree_config.json", "tree_adapter.safetensors"
_KINDS: dict[str, tuple[type, ...]] = {
    "depth": (int,), "rank": (int,), "alpha": (int, float), "form": (str,), "route": (str,), "prefix": (int,),
    "targets": (list,),
}  # fmt: skip


@dataclass(frozen=True)
class TreeFolder:
    """A tree on disk whose headers are known. `base` is the name that the config gives, with the revision behind an @;
    `base_digest` is the base's, as its lineage has it."""

    source: str
    folder: Path
    base: str | None
    base_digest: str | None
    shape: Shape
    tensors: Checkpoint

    @property
    def kind(self) -> str:
        """What users call it."""
        return "tree of LoRAs"

    def data(self) -> dict[str, Any]:
        """What it is made of, JSON-able."""
        rank = {"leaves": self.shape.leaves, "nodes": self.shape.nodes, "active_rank": self.shape.active}
        return {"kind": self.kind, "base": self.base, "base_sha256": self.base_digest, **self.shape.data(), **rank}

    def summary(self) -> str:
        """The same in a line."""
        shape = self.shape
        return (
            f"adapter: {self.kind} with {shape.leaves} leaves of rank {shape.active} ({shape.nodes} nodes of rank "
            f"{shape.rank}, route {shape.route}) on matrices of {self.base or 'no named base'}"
        )

    def load(self, decoder: Decoder, prefix: str = "", *, dtype: torch.dtype | None = None) -> Tree:
        """The adapter for a decoder of its base, on its device, routed hard as it is served.

        Its matrices are in `dtype`, in float32 where none is given; routers always are. Names are the base's own, so
        the family's `prefix` is not asked for. Raises TltError where names or shapes do not fit the base, and for
        weights that are not finite.
        """
        import torch

        from tlt_cli.model.tree import Tree

        tree = Tree(decoder, self.shape)
        wanted = _tensors(tree)
        for name in sorted(wanted.keys() ^ self.tensors.tensors.keys()):
            if name in wanted:
                raise TltError(f"{self.source}: {WEIGHTS} lacks {name}, which a tree beside this base has")
            raise TltError(f"{self.source}: {name} has no place in a tree beside this base{nearest(name, wanted)}")
        with torch.no_grad():
            for name, target in wanted.items():
                shape = self.tensors.tensors[name].shape
                if shape != tuple(target.shape):
                    raise TltError(
                        f"{self.source}: {name} is {list(shape)}, but a tree beside this base has {list(target.shape)}"
                    )
                value = self.tensors.read(name)
                if not bool(value.float().isfinite().all()):
                    raise TltError(f"{self.source}: {name} holds NaN or infinite values: the tree is broken")
                target.copy_(value)
        if dtype is not None:
            tree.a.to(dtype)
            tree.b.to(dtype)
        tree.hard = True
        return tree.eval().requires_grad_(False)


@dataclass(frozen=True)
class LeafFolder:
    """One leaf of a tree on disk, which is a LoRA."""

    tree: TreeFolder
    leaf: int

    def __post_init__(self) -> None:
        self.tree.shape.check_leaf(self.leaf)

    @property
    def kind(self) -> str:
        """What users call it."""
        return f"leaf {self.leaf} of a {self.tree.kind}"

    @property
    def source(self) -> str:
        """As the user named the tree."""
        return self.tree.source

    @property
    def folder(self) -> Path:
        """Where the tree lies."""
        return self.tree.folder

    @property
    def base(self) -> str | None:
        """Its base, as the tree's config names it."""
        return self.tree.base

    @property
    def base_digest(self) -> str | None:
        """The base's digest."""
        return self.tree.base_digest

    @property
    def tensors(self) -> Checkpoint:
        """The weights of the tree."""
        return self.tree.tensors

    def data(self) -> dict[str, Any]:
        """What it is made of, JSON-able."""
        return {**self.tree.data(), "kind": self.kind, "leaf": self.leaf}

    def summary(self) -> str:
        """The same in a line."""
        return f"adapter: {self.kind}, a LoRA of rank {self.tree.shape.active}"

    def load(self, decoder: Decoder, prefix: str = "", *, dtype: torch.dtype) -> Lora:
        """The LoRA for a decoder of the base. TltError where the tree does not fit it."""
        from tlt_cli.model.tree_leaf import leaf_lora

        return leaf_lora(decoder, self.tree.load(decoder, prefix), self.leaf, dtype=dtype)


def is_tree_folder(folder: Path) -> bool:
    """Whether a folder holds a tree of LoRAs."""
    return (folder / CONFIG).is_file()


def open_tree(folder: Path, source: str) -> TreeFolder:
    """The tree of a folder, all but its values. Raises TltError naming what is wrong with it."""
    where = f"{folder / CONFIG}"
    try:
        config = strict_json_object((folder / CONFIG).read_bytes(), where)
    except OSError as error:
        raise TltError(f"{where}: cannot read: {error.strerror}") from error
    if not (folder / WEIGHTS).is_file():
        raise TltError(f"{folder}: has {CONFIG} but no {WEIGHTS}")
    tensors = replace(open_file(folder / WEIGHTS, f"{folder / WEIGHTS}"), location=folder)  # nobody writes into it
    named, revision = (_text(config, key, where) for key in ("base_model_name_or_path", "revision"))
    return TreeFolder(
        source=source,
        folder=folder,
        base=f"{named}@{revision}" if named and revision else named,
        base_digest=_text(config, "base_sha256", where),
        shape=_shape(config, where),
        tensors=tensors,
    )


def write_tree(
    tree: Tree,
    output: Path,
    *,
    base: Checkpoint,
    command: str,
    before: Checkpoint | None = None,
    operation: str = "train",
    details: Mapping[str, Any] = {},
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Written:
    """Write the tree beside `base` to a new folder: two files and a card, the base's digest in both.

    What routers are divided by is in the file already: what is loaded has the temperature 1. `before` is the tree that
    this one was trained on from, if any. `details` go into the lineage; `check` is given the complete folder before it
    takes its name. Raises TltError, with nothing written, where it cannot be.
    """
    if is_single_file(output):
        raise UsageError(f"{output}: a tree is a folder of two files; give a name without a suffix")
    lineage = record.adapter_lineage(base, before, operation=operation, command=command, details=details)
    tensors = [
        PlannedTensor(name, tuple(value.shape), "F32", name, partial(_value, value), file=WEIGHTS)
        for name, value in _tensors(tree, tree.temperature).items()
    ]
    config = {
        **tree.shape.data(),
        "base_model_name_or_path": base.repository or base.source,
        "revision": base.revision if base.repository else None,
        "base_sha256": lineage["parents"][0]["sha256"],
    }
    rows = [
        ("leaves", "", str(tree.shape.leaves)),
        ("rank of a leaf", "", str(tree.shape.active)),
        ("adapted matrices", "0", str(len(tree.sites))),
        ("parameters of the tree", "0", f"{sum(tensor.parameters for tensor in tensors):,}"),
    ]
    card = record.model_card(base, lineage, changes=rows, library="tlt", relation="adapter")
    files = {CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), "README.md": card.encode()}
    return write(
        output, tensors, base, config={}, metadata=record.metadata(lineage), files=files, force=force, check=check
    )


def _tensors(tree: Tree, temperature: float = 1.0) -> dict[str, Tensor]:
    """What a tree holds by its name in the file; views of the parameters where the temperature is 1."""
    found = {}
    for site, a, b in tree.matrices():
        found[f"{site.module}.tree_a"] = a.flatten(0, 1)
        found[f"{site.module}.tree_b"] = b.flatten(1, 2)
    cold = temperature != 1.0
    for name, value in (("weight", tree.router.detach()), ("bias", tree.bias.detach())):
        found[f"router.{name}"] = value / temperature if cold else value
    return found


def _shape(config: Mapping[str, Any], where: str) -> Shape:
    for key, kinds in _KINDS.items():
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TltError(f"{where}: {key} must be {_words(kinds)}, not {value!r}")
    if not all(isinstance(target, str) for target in config["targets"]):
        raise TltError(f"{where}: targets must be names of modules, not {config['targets']!r}")
    try:
        return Shape(**{**{key: config[key] for key in _KINDS}, "targets": tuple(config["targets"])})
    except UsageError as error:
        raise TltError(f"{where}: {error}") from error


def _words(kinds: tuple[type, ...]) -> str:
    return {int: "a whole number", str: "a word", list: "a list"}[kinds[0]] if len(kinds) == 1 else "a number"


def _text(config: Mapping[str, Any], key: str, where: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise TltError(f"{where}: {key} must be a text, not {value!r}")
    return value or None


def _value(value: Tensor, _: Tensors) -> Iterable[Tensor]:
    yield value.cpu()
