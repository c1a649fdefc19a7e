"""A checkpoint on the hub: its headers by kilobytes of range requests, or its files through the hub's cache.

Where to find it, who may read it and how (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HOME) is huggingface_hub's matter.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from tlt_cli.checkpoint import folder
from tlt_cli.checkpoint.header import PREFIX_BYTES, TensorInfo, header_length, parse_header
from tlt_cli.checkpoint.hub_address import Address, parse_uri
from tlt_cli.checkpoint.hub_errors import plain_errors
from tlt_cli.checkpoint.lazy import Checkpoint
from tlt_cli.checkpoint.local import Header, lineage_in, merge_headers, open_file, open_folder
from tlt_cli.errors import TltError

_CARD = "README.md"
_FIRST_BYTES = 100_000  # most headers are smaller, and one request costs more than these bytes
_THREADS = 8


@dataclass(frozen=True)
class Listing:
    """The files of one commit: sizes by name, and sha256 by name where the hub keeps it (that is, of weights)."""

    commit: str
    sizes: Mapping[str, int | None]
    digests: Mapping[str, str]

    @property
    def top(self) -> list[str]:
        """Names outside of any subfolder."""
        return [name for name in self.sizes if "/" not in name]


def open_remote(source: str, uri: str, *, values: bool, bars: bool = True) -> Checkpoint:
    """Open `hf://org/name[@revision][/FILE.safetensors]`, or such a page's URL; `source` is what the user typed.

    With `values=False` only headers, config and card are fetched; `bars` shows downloads as they come. TltError for
    whatever the hub answers.
    """
    address = parse_uri(uri)
    with plain_errors(address), _bars(bars):
        if constants.HF_HUB_OFFLINE:
            kept = snapshot_download(
                address.id, revision=address.revision, allow_patterns=[folder.CONFIG], local_files_only=True
            )
            return _open_snapshot(Path(kept), address, source)
        listing = _list(address)
        chosen = address.file or folder.choose_weights(listing.top, str(address))
        if chosen not in listing.sizes:
            raise TltError(f"{address}: no such file in the repository; it holds {', '.join(listing.sizes)}")
        weight_map = _weight_map(address, listing, chosen)
        names = [chosen] if weight_map is None else sorted(set(weight_map.values()))
        digests = {name: listing.digests[name] for name in names if name in listing.digests}
        if values:
            found = _download(address, listing, [chosen, *names], source)
        else:
            found = _headers_only(address, listing, chosen, weight_map, source)
        return replace(found, repository=address.id, revision=listing.commit, _digests=digests)


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """Downloads with huggingface_hub's progress bars, or without."""
    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _list(address: Address) -> Listing:
    info = HfApi().model_info(address.id, revision=address.revision, files_metadata=True)
    files = info.siblings or []
    assert info.sha is not None
    return Listing(
        info.sha,
        {file.rfilename: file.size for file in files},
        {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None},
    )


def _weight_map(address: Address, listing: Listing, chosen: str) -> dict[str, str] | None:
    if chosen != folder.INDEX:
        return None
    return folder.parse_index(_fetch_small(address, listing, chosen), f"{address}/{chosen}", listing.top)


def _headers_only(
    address: Address, listing: Listing, chosen: str, weight_map: Mapping[str, str] | None, source: str
) -> Checkpoint:
    names = [chosen] if weight_map is None else sorted(set(weight_map.values()))
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(lambda name: _read_header(address, name, listing), names)
        headers: dict[str, Header] = dict(zip(names, read, strict=True))
    where = f"{address.id}/{chosen}"
    tensors, metadata = merge_headers(headers, weight_map, where)
    config_name = str(PurePosixPath(chosen).with_name(folder.CONFIG))
    config = None
    if address.file is not None and "config" in metadata:
        config = folder.parse_config(metadata["config"], f"{where}: __metadata__ config")
    elif config_name in listing.sizes:
        config = folder.parse_config(_fetch_small(address, listing, config_name), f"{address}/{config_name}")
    elif "config" in metadata:
        config = folder.parse_config(metadata["config"], f"{where}: __metadata__ config")
    card = None
    if _CARD in listing.sizes:
        card = _fetch_small(address, listing, _CARD).decode("utf-8", errors="replace")
    return Checkpoint(
        source=source,
        location=None,
        config=config,
        tensors=tensors,
        metadata=metadata,
        shards=tuple(names),
        companions=(),
        lineage=lineage_in(metadata),
        card=card,
    )


def _download(address: Address, listing: Listing, weights: Sequence[str], source: str) -> Checkpoint:
    """All that an open_folder on the repository would want, and nothing else: no pickles, no second formats."""
    config = str(PurePosixPath(weights[0]).with_name(folder.CONFIG))
    wanted = {*weights, config, _CARD, *folder.companion_names(listing.sizes)}
    patterns = [glob.escape(name) for name in sorted(wanted & listing.sizes.keys())]
    # By the revision that was asked for, not by its commit: so the cache learns it, for when it is offline.
    snapshot = Path(snapshot_download(address.id, revision=address.revision, allow_patterns=patterns))
    if snapshot.name != listing.commit:
        raise TltError(f"{address}: changed on the hub while it was opened; run it again")
    return _open_snapshot(snapshot, address, source)


def _open_snapshot(snapshot: Path, address: Address, source: str) -> Checkpoint:
    """A folder of the cache, named by its commit, its files being links to elsewhere in the cache."""
    found = open_folder(snapshot, source) if address.file is None else open_file(snapshot / address.file, source)
    return replace(found, repository=address.id, revision=snapshot.name)


def _read_header(address: Address, name: str, listing: Listing) -> Header:
    """The header of one file, under the same checks as a local one."""
    where, size = f"{address.id}/{name}", listing.sizes[name]
    url = hf_hub_url(address.id, name, revision=listing.commit)
    first = _fetch(url, 0, _FIRST_BYTES if size is None else min(size, _FIRST_BYTES))
    length = header_length(first[:PREFIX_BYTES], where, size)
    end = PREFIX_BYTES + length
    raw = first[PREFIX_BYTES:end]
    if len(first) < end:
        raw += _fetch(url, len(first), end)
    tensors, metadata = parse_header(raw, where, None if size is None else size - end)
    named: dict[str, TensorInfo] = {key: replace(info, file=name) for key, info in tensors.items()}
    return named, metadata


def _fetch(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file; the connection is dropped rather than more than these be read."""
    if stop <= start:
        return b""
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        begin = 0 if response.status_code == 206 else start
        body = bytearray()
        for part in response.iter_bytes():
            body += part
            if len(body) >= begin + stop - start:
                break
    return bytes(body[begin : begin + stop - start])


def _fetch_small(address: Address, listing: Listing, name: str) -> bytes:
    """A whole file, through the cache."""
    return Path(hf_hub_download(address.id, name, revision=listing.commit)).read_bytes()
