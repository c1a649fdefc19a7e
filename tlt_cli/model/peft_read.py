"""Adapters in the folder format of PEFT: adapter_config.json and adapter_model.safetensors, read and checked.

What the tensors are says which modules are adapted; the config says how loud each one is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_cli.checkpoint.folder import parse_config
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.local import open_file
from tlt_cli.errors import TltError, nearest

if TYPE_CHECKING:
    import torch

    from tlt_cli.model.decoder import Decoder
    from tlt_cli.model.lora import Lora

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model.model."
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Keys that, with any other value than these, ask for something else than y + s B A x.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "use_qalora": (False, None), "use_bdlora": (False, None), "lora_bias": (False, None),
    "bias": ("none", None), "modules_to_save": ([], None), "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None), "layer_replication": ([], None), "alora_invocation_tokens": ([], None),
    "arrow_config": ({}, None), "velora_config": ({}, None), "kasa_config": ({}, None), "monteclora_config": ({}, None),
    "megatron_config": ({}, None), "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


@dataclass(frozen=True)
class PeftFolder:
    """A LoRA on disk whose headers are known. `base` is the name that the config gives, with the revision behind an @;
    `base_digest` is the base's, where tlt wrote the folder. `modules` and `alphas` have each module's rank and alpha
    by its name in the stock class. `dropout` is what it was trained with; nothing here drops anything."""

    kind = "LoRA"

    source: str
    folder: Path
    base: str | None
    base_digest: str | None
    modules: dict[str, int]
    alphas: dict[str, float]
    rslora: bool
    tensors: Checkpoint
    dropout: float = 0.0

    def load(self, decoder: Decoder, prefix: str, *, dtype: torch.dtype) -> Lora:
        """The adapter for a decoder of its base, on its device; `prefix` is the family's, which the file may lack.

        Raises TltError where a module or a shape does not fit the base, and for weights that are not finite.
        """
        from tlt_cli.model.lora import Lora, LowRankUpdate
        from tlt_cli.model.sites import sites

        known = {stock_name(site.module, prefix): site for site in sites(decoder)}
        for module, rank in self.modules.items():
            if module not in known:
                raise TltError(
                    f"{self.source}: adapts {module}, which is no linear layer of a block of the base"
                    f"{nearest(module, known)}"
                )
            for side, wanted in (("A", [rank, known[module].inputs]), ("B", [sum(known[module].outputs), rank])):
                found = list(self.tensors.tensors[tensor_name(module, side)].shape)
                if found != wanted:
                    raise TltError(
                        f"{self.source}: {tensor_name(module, side)} is {found}, but {module} of the base needs "
                        f"{wanted}; is this its base?"
                    )
        chosen = {
            known[module].module: LowRankUpdate(rank, self.alphas[module], self.rslora)
            for module, rank in self.modules.items()
        }
        lora = Lora(decoder, chosen, dtype=dtype)
        for module in self.modules:
            lora.set(known[module].module, *(self._value(module, side) for side in "AB"))
        return lora

    def data(self) -> dict[str, Any]:
        """What it is, JSON-able."""
        return {
            "kind": self.kind, "base": self.base, "base_sha256": self.base_digest, "ranks": self.modules,
            "alphas": self.alphas, "rslora": self.rslora,
        }  # fmt: skip

    def summary(self) -> str:
        """What it is, in a line."""
        ranks = sorted(set(self.modules.values()))
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"adapter: {self.kind} of {rank} on {len(self.modules)} matrices of {self.base or 'no named base'}"

    def _value(self, module: str, side: str) -> torch.Tensor:
        value = self.tensors.read(tensor_name(module, side))
        if not bool(value.float().isfinite().all()):
            raise TltError(f"{self.source}: {tensor_name(module, side)} holds NaN or infinite values: it is broken")
        return value


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / CONFIG).is_file()


def open_peft(folder: Path, source: str) -> PeftFolder:
    """The LoRA of a folder, all but its values. Raises TltError naming what makes it something else than a LoRA."""
    where = f"{folder / CONFIG}"
    try:
        config = parse_config((folder / CONFIG).read_bytes(), where)
    except OSError as error:
        raise TltError(f"{where}: cannot read: {error.strerror}") from error
    if config.get("peft_type") != "LORA":
        raise TltError(f"{where}: peft_type {config.get('peft_type')!r} is not known; tlt reads 'LORA'")
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise TltError(f"{where}: {key} is {config[key]!r}, which tlt cannot compute; wanted {plain[0]!r}")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise TltError(
                f"{folder / PICKLE}: refused: pickle files can run code when they are opened, so tlt never does; save "
                "the adapter as safetensors first, in PEFT: model.save_pretrained(FOLDER, safe_serialization=True)"
            )
        raise TltError(f"{folder}: has {CONFIG} but no {WEIGHTS}")
    tensors = replace(open_file(folder / WEIGHTS, f"{folder / WEIGHTS}"), location=folder)  # nobody writes into it
    ranks = _ranks(tensors)
    alphas = {}
    for module, rank in ranks.items():
        stated = _setting(config, "rank_pattern", module, "r", where)
        if stated != rank:
            raise TltError(f"{where}: gives {module} the rank {stated:g}, but its tensors have {rank}")
        alphas[module] = _setting(config, "alpha_pattern", module, "lora_alpha", where)
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if named is not None and not isinstance(named, str):
        raise TltError(f"{where}: base_model_name_or_path must be a name or a path, not {named!r}")
    base = f"{named}@{revision}" if named and isinstance(revision, str) and revision else named
    dropout = config.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise TltError(f"{where}: lora_dropout must be a share from 0 to 1, not {dropout!r}")
    parents = (tensors.lineage or {}).get("parents")
    parent = parents[0] if isinstance(parents, list) and parents and isinstance(parents[0], dict) else {}
    digest = parent.get("sha256")
    return PeftFolder(
        source=source,
        folder=folder,
        base=base or None,
        base_digest=digest if isinstance(digest, str) else None,
        modules=ranks,
        alphas=alphas,
        rslora=bool(config.get("use_rslora")),
        tensors=tensors,
        dropout=dropout,
    )


def stock_name(module: str, prefix: str) -> str:
    """A module's name in the stock class: with the family's prefix, which checkpoints of the bare decoder lack.

    >>> stock_name("h.0.attn.c_attn", "transformer."), stock_name("transformer.h.0.attn.c_attn", "transformer.")
    ('transformer.h.0.attn.c_attn', 'transformer.h.0.attn.c_attn')
    """
    return module if module.startswith(prefix) else prefix + module


def tensor_name(module: str, side: str) -> str:
    """What the A or the B of a module is called in the file."""
    return f"{ROOT}{module}.lora_{side}.weight"


def _ranks(tensors: Checkpoint) -> dict[str, int]:
    """The rank of every module, by its name; TltError for a tensor that is no A or B, or has no partner."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in tensors.tensors.items():
        match = _NAME.fullmatch(name.removeprefix(ROOT)) if name.startswith(ROOT) else None
        if match is None or len(info.shape) != 2 or info.dtype not in ("F64", "F32", "F16", "BF16"):
            raise TltError(
                f"{tensors.source}: {name} {info.dtype} {list(info.shape)} is no LoRA factor of a linear layer; wanted "
                f"matrices named {tensor_name('MODULE', 'A')} and {tensor_name('MODULE', 'B')}"
            )
        found.setdefault(match["module"], {})[match["side"]] = info.shape
    if not found:
        raise TltError(f"{tensors.source}: holds no tensors")
    for module, shapes in found.items():
        for side, other in (("A", "B"), ("B", "A")):
            if side not in shapes:
                raise TltError(f"{tensors.source}: has {tensor_name(module, other)} but no {tensor_name(module, side)}")
        if shapes["A"][0] != shapes["B"][1] or shapes["A"][0] < 1:
            raise TltError(
                f"{tensors.source}: {module} has A {list(shapes['A'])} and B {list(shapes['B'])}; wanted [r, in] and "
                "[out, r]"
            )
    return {module: shapes["A"][0] for module, shapes in sorted(found.items())}


def _setting(config: Mapping[str, Any], patterns: str, module: str, usual: str, where: str) -> float:
    """A number of one module: the first pattern that matches the end of its name behind a dot, or the usual one."""
    given = config.get(patterns) or {}
    if not isinstance(given, dict):
        raise TltError(f"{where}: {patterns} must be an object, not {given!r}")
    value, key = config.get(usual, 8), usual
    for pattern, own in given.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                value, key = own, f"{patterns}[{pattern!r}]"
                break
        except re.error as error:
            raise TltError(f"{where}: {patterns} has {pattern!r}, which is no pattern: {error}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise TltError(f"{where}: {key} must be a number above 0, not {value!r}")
    return float(value)
