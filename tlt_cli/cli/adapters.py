"""Adapters on disk: which folders are one, and what every kind of them can do.

An adapter stands beside a checkpoint, its base, which it names. Another kind is a class like `AdapterFolder` says, and
a line in `adapter_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.model.peft_read import is_peft_folder, open_peft
from tlt_cli.model.tree_files import is_tree_folder, open_tree

if TYPE_CHECKING:
    import torch

    from tlt_cli.model.decoder import Adapter, Decoder


class AdapterFolder(Protocol):
    """An adapter on disk, its headers read and checked, its values not."""

    @property
    def kind(self) -> str:
        """What users call it, as "LoRA"."""
        ...

    @property
    def source(self) -> str:
        """As the user named it."""
        ...

    @property
    def folder(self) -> Path:
        """Where it lies."""
        ...

    @property
    def base(self) -> str | None:
        """Its base, as its config names it."""
        ...

    @property
    def base_digest(self) -> str | None:
        """The base's digest; None where nobody recorded it."""
        ...

    @property
    def tensors(self) -> Checkpoint:
        """Its own weights."""
        ...

    def load(self, decoder: Decoder, prefix: str, *, dtype: torch.dtype) -> Adapter:
        """The adapter for a decoder of the base, whose family has that prefix. TltError where it does not fit."""
        ...

    def data(self) -> Mapping[str, Any]:
        """What `tlt inspect --json` says of it, JSON-able."""
        ...

    def summary(self) -> str:
        """The same in a line."""
        ...


def adapter_of(source: str) -> AdapterFolder | None:
    """The adapter in a local folder, its headers read; None where `source` is something else."""
    folder = Path(source).expanduser()
    if is_peft_folder(folder):
        return open_peft(folder, source)
    if is_tree_folder(folder):
        return open_tree(folder, source)
    return None
