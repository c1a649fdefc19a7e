"""What a checkpoint's folder holds: which files are its weights, and which go along unread.

The rules work on names alone, so they are the same for a local folder and for a listing of the hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from tlt_cli.checkpoint.strict_json import strict_json_object
from tlt_cli.errors import TltError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAFE_SUFFIXES = (".safetensors", ".st")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHT_SUFFIXES = (
    *SAFE_SUFFIXES,
    *PICKLE_SUFFIXES,
    ".msgpack",
    ".h5",
    ".gguf",
    ".onnx",
    ".distcp",
)
_LEFT_BEHIND = ("README.md", CONFIG)
# A lone file may lie anywhere, so only files known to belong to a model go along with it.
_BESIDE_A_FILE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_PICKLE_HINT = (
    "pickle files can run code when they are opened, so tlt never does; save the model as "
    "safetensors first, in transformers: model.save_pretrained(FOLDER, safe_serialization=True)"
)


def check_file_name(name: str) -> None:
    """TltError unless `name` ends like a safetensors file."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise TltError(f"{name}: refused: {_PICKLE_HINT}")
    if suffix not in SAFE_SUFFIXES:
        raise TltError(f"{name}: not a checkpoint: wanted a .safetensors or .st file, or a folder")


def choose_weights(names: Collection[str], where: str) -> str:
    """The one file that says what the tensors are: the index, or a single weight file.

    >>> choose_weights(["config.json", "model.safetensors"], "here")
    'model.safetensors'
    """
    if INDEX in names:
        return INDEX
    if SINGLE in names:
        return SINGLE
    safe = sorted(name for name in names if name.lower().endswith(SAFE_SUFFIXES))
    if len(safe) == 1:
        return safe[0]
    if safe:
        raise TltError(
            f"{where}: holds {len(safe)} weight files ({_listed(safe)}) and neither {SINGLE} nor "
            f"{INDEX}; name the file you mean"
        )
    pickles = sorted(name for name in names if name.lower().endswith(PICKLE_SUFFIXES))
    if pickles:
        raise TltError(f"{where}: holds only pickle weights ({_listed(pickles)}): {_PICKLE_HINT}")
    raise TltError(
        f"{where}: no checkpoint in it: wanted {SINGLE}, {INDEX} or one .safetensors file, "
        f"found {_listed(sorted(names)) or 'nothing'}"
    )


def parse_index(raw: bytes, where: str, names: Collection[str]) -> dict[str, str]:
    """Tensor name -> shard name, from an index file; `names` are the files that lie beside it."""
    index = strict_json_object(raw, where)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TltError(f"{where}: must have a weight_map from tensor names to file names")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise TltError(
                f"{where}: puts {tensor!r} in {shard!r}; wanted the plain name of a .safetensors "
                "file in the same folder"
            )
    shards = set(weight_map.values())
    missing = sorted(shards.difference(names))
    if missing:
        raise TltError(f"{where}: {len(missing)} of {len(shards)} shards missing: {_listed(missing)}")
    if SINGLE in names and SINGLE not in shards:
        raise TltError(
            f"{where}: names other files than {SINGLE}, which lies beside it; "
            "tlt cannot tell which of the two is stale: delete it, or name the file you mean"
        )
    return weight_map


def parse_config(raw: bytes | str, where: str) -> dict[str, Any]:
    """config.json as a dict, key order kept. NaN and repeated keys pass, as they do in transformers."""
    try:
        config = json.loads(raw if isinstance(raw, str) else raw.decode("utf-8"))
        json.dumps(config, ensure_ascii=False).encode("utf-8")  # an unpaired surrogate could not be written again
    except UnicodeDecodeError as error:
        raise TltError(f"{where}: not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise TltError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise TltError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise TltError(f"{where}: must be a JSON object, not {type(config).__name__}")
    return config


def companion_names(names: Collection[str]) -> list[str]:
    """Of all files below a folder ("a.json", "sub/b.txt"): those that go along with the weights unread, sorted.

    A subfolder goes along as a whole, unless it holds weights of its own.
    """
    with_weights = {name.partition("/")[0] for name in names if "/" in name and _is_weight(name)}
    return sorted(
        name
        for name in names
        if not name.startswith(".")
        and name not in _LEFT_BEHIND
        and not _is_weight(name)
        and name.partition("/")[0] not in with_weights
    )


def companions_of_folder(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that go along with the weights unread; links to folders are not followed."""
    names: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names.extend((Path(root) / name).relative_to(folder).as_posix() for name in files)
    paths = (folder / name for name in companion_names(names))
    return tuple(path for path in paths if path.is_file())


def companions_of_file(file: Path) -> tuple[Path, ...]:
    """Tokenizer, licence and the like beside a lone file, if a config.json says it is a model's."""
    if not (file.parent / CONFIG).is_file():
        return ()
    found = {path for pattern in _BESIDE_A_FILE for path in file.parent.glob(pattern)}
    return tuple(sorted(path for path in found if path.is_file() and not _is_weight(path.name)))


def _is_weight(name: str) -> bool:
    lowered = name.lower()
    return lowered.endswith((*WEIGHT_SUFFIXES, ".index.json", ".partial", ".partial.lock"))


def _is_plain(name: str) -> bool:
    return name.lower().endswith(SAFE_SUFFIXES) and not set(name) & set("/\\\0:")


def _listed(names: Collection[str]) -> str:
    shown = list(names)[:8]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
