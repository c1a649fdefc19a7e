"""A training state read without running code that its files may hold: their table of contents is a pickle.

torch.distributed.checkpoint unpickles whatever it finds there; here it is the few classes of a table or an error. The
tensors themselves torch reads as weights only.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tlt_cli.errors import TltError

ADVICE = "delete this folder to go on from the state before it"
_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


class StateReader(FileSystemReader):
    """Tensors by their place in a state's files, which its table of contents says."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The table. Raises TltError for anything else."""
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = _Unpickler(file).load()
        except Exception as error:  # there is nothing that a broken pickle may not raise
            raise TltError(f"{self.path}: the state is damaged: .metadata: {error}; {ADVICE}") from error
        if not isinstance(metadata, Metadata):
            raise TltError(f"{self.path}: the state is damaged: .metadata holds no table of tensors; {ADVICE}")
        return metadata

    def sizes(self) -> dict[str, TensorStorageMetadata]:
        """The shape and dtype of every tensor by key."""
        held: dict[str, Any] = self.read_metadata().state_dict_metadata
        for key, value in held.items():
            if not isinstance(value, TensorStorageMetadata):
                raise TltError(f"{self.path}: {key} is not a tensor: this state was not made by tlt")
        return held


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
