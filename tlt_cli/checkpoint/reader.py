"""From what the user typed to a Checkpoint: a file, a folder, or a repository of the hub.

Headers are read and checked at once, tensors later and one at a time. Nothing behind this file
knows which of the three a checkpoint came from.
"""

from __future__ import annotations

import re
from pathlib import Path

from tlt_cli.checkpoint import folder
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.local import open_file, open_folder
from tlt_cli.errors import TltError

__all__ = ["Checkpoint", "open_checkpoint"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^\s@]+)?\Z")
_FILE_SUFFIXES = folder.SAFE_SUFFIXES + folder.PICKLE_SUFFIXES


def open_checkpoint(source: str | Path, *, values: bool = True, bars: bool = True) -> Checkpoint:
    """Find, read and check the headers of `source`.

    An existing path wins; "hf://..." and URLs of the hub are always remote; a bare "org/name" or
    "org/name@revision" is remote where no such path exists. With `values=False` a remote source is
    known by kilobytes of headers alone and cannot be read. `bars` lets huggingface_hub draw its
    progress. Raises TltError for whatever is wrong.
    """
    text = str(source)
    if text.startswith(("hf://", "http://", "https://")):
        return _open_remote(text, text, values=values, bars=bars)
    if not text:
        raise TltError("no checkpoint given: the name is empty")
    try:
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise TltError(f"{text!r}: not a usable path: {error}") from None
    if is_folder:
        return open_folder(path, text)
    if exists:
        folder.check_file_name(path.name)
        return open_file(path, text)
    if isinstance(source, str) and _REPOSITORY.match(text) and not text.endswith(_FILE_SUFFIXES):
        return _open_remote(text, f"hf://{text}", values=values, bars=bars)
    if path.is_symlink():
        raise TltError(f"{text}: a link that leads nowhere")
    raise TltError(f"{text}: no such file or folder")


def _open_remote(source: str, uri: str, *, values: bool, bars: bool) -> Checkpoint:
    from tlt_cli.checkpoint.hub import open_remote  # only now: huggingface_hub takes its time

    return open_remote(source, uri, values=values, bars=bars)
