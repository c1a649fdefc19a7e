"""The safetensors header: which tensors a file holds, and at which byte each one starts.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes, one
after the other without gaps. Everything here is arithmetic on that JSON: no file is opened, torch
is not needed, and a header that is wrong in any way becomes one TltError line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlt_cli.checkpoint.strict_json import shortened, strict_json_object
from tlt_cli.errors import TltError

# In the order of the format's own enumeration: its writer sorts by this order, descending, so that
# wide dtypes come first and every tensor is aligned to its item size.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
_MAX_DIM = 2**63 - 1
_ORDER = {dtype: position for position, dtype in enumerate(DTYPE_BITS)}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: `shape` in elements, `start` the absolute byte in `file`, `nbytes` long."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """The bytes that a tensor takes; TltError where 4- or 6-bit elements end within a byte.

    >>> tensor_bytes("BF16", (3, 5))
    30
    """
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise TltError(f"{dtype} {list(shape)} takes {bits} bits, which is not a whole number of bytes")
    return bits // 8


def header_length(prefix: bytes, file: str, file_size: int | None) -> int:
    """The length of the JSON, from the first 8 bytes of the file (of `file_size` bytes, if known)."""
    if len(prefix) < PREFIX_BYTES:
        raise TltError(f"{file}: {len(prefix)} bytes long, but a safetensors file starts with an 8-byte length")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length == 0:
        raise TltError(f"{file}: its header length is 0, so it describes no tensors")
    if length > MAX_HEADER_BYTES:
        raise TltError(
            f"{file}: its header length is {length} bytes, more than the format's limit of "
            f"{MAX_HEADER_BYTES}; {_what_else(prefix)}"
        )
    if file_size is not None and PREFIX_BYTES + length > file_size:
        raise TltError(
            f"{file}: its header takes {length} bytes, but the file ends after {file_size}; "
            "it was cut short: fetch or write it again"
        )
    return length


def _what_else(prefix: bytes) -> str:
    """What a file is that does not start like safetensors."""
    if prefix.startswith(b"version "):
        return "it is a Git LFS pointer, not the weights: run `git lfs pull`"
    if prefix.startswith((b"PK\x03\x04", b"\x80")):
        return "it is a pickle under another name: tlt never opens those; save the model as safetensors"
    return "it is probably not a safetensors file"


def parse_header(raw: bytes, file: str, data_size: int | None) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors, in the order of their bytes, and the `__metadata__` of one header.

    `raw` is the JSON alone, without its length; `data_size` counts the bytes behind it (None: not
    known). Raises TltError for anything that is not a whole, gapless, well-typed file.
    """
    entries = strict_json_object(raw, file)
    metadata = _metadata(entries.pop("__metadata__", {}), file)
    origin = PREFIX_BYTES + len(raw)
    found = [_tensor(name, entry, file, origin) for name, entry in entries.items()]
    found.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_contiguous(found, file, origin, data_size)
    return {tensor.name: tensor for tensor in found}, metadata


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes (length, JSON, padding) and the absolute start of each tensor.

    `tensors` are (name, dtype, shape); their order does not matter. Widest dtype first, then by
    name: the bytes are those of `safetensors.torch.save_file`, whose metadata keys come in a random
    order and here are sorted. Raises TltError when the header would pass the format's limit.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offsets: dict[str, int] = {}
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (-_ORDER[tensor[1]], tensor[0])):
        if name in header or name == "__metadata__":
            raise TltError(f"two tensors would be written under the one name {name!r}")
        offsets[name], end = end, end + tensor_bytes(dtype, shape)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise TltError(
            f"the header of {len(tensors)} tensors would take {len(text)} bytes, more than the "
            f"format's limit of {MAX_HEADER_BYTES}; write more shards: --max-shard-size"
        )
    prefix = len(text).to_bytes(PREFIX_BYTES, "little") + text
    return prefix, {name: len(prefix) + offset for name, offset in offsets.items()}


def _metadata(value: object, file: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TltError(f"{file}: __metadata__ must be an object of strings, not {shortened(value)}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise TltError(f"{file}: __metadata__ {shortened(key)} must be a string, not {shortened(text)}")
    return value


def _tensor(name: str, entry: object, file: str, origin: int) -> TensorInfo:
    """One entry of the JSON, checked by itself."""
    where = f"{file}: tensor {shortened(name)}"
    if not name.isprintable():
        raise TltError(f"{where} has a control character in its name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        found = shortened(sorted(entry) if isinstance(entry, dict) else entry)
        raise TltError(f"{where} must have dtype, shape and data_offsets, but has {found}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        known = ", ".join(DTYPE_BITS)
        raise TltError(f"{where} has unknown dtype {shortened(dtype)}; known are {known}")
    if not _natural_numbers(shape):
        raise TltError(f"{where} has shape {shortened(shape)}; wanted a list of integers from 0 up")
    if not _natural_numbers(offsets) or len(offsets) != 2:
        raise TltError(f"{where} has data_offsets {shortened(offsets)}; wanted [begin, end]")
    begin, end = offsets
    if begin > end:
        raise TltError(f"{where} begins at {begin}, after its end at {end}")
    bits = _elements(shape, where) * DTYPE_BITS[dtype]
    if bits != (end - begin) * 8:
        wanted = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, not whole bytes"
        raise TltError(
            f"{where} is {dtype} {shortened(shape)} = {wanted}, "
            f"but data_offsets {begin}..{end} hold {end - begin} bytes"
        )
    if dtype == "F4" and shape[-1] % 2:
        raise TltError(f"{where} is F4 {shortened(shape)}: two elements share a byte, so its last dim must be even")
    return TensorInfo(name, dtype, tuple(shape), file, origin + begin, end - begin)


def _check_contiguous(tensors: Iterable[TensorInfo], file: str, origin: int, data_size: int | None) -> None:
    """Tensors sorted by start must follow each other with no gap or overlap, up to the file's end."""
    expected, before = 0, "the header"
    for tensor in tensors:
        begin = tensor.start - origin
        if data_size is not None and begin + tensor.nbytes > data_size:
            raise TltError(
                f"{file}: tensor {shortened(tensor.name)} ends at byte {begin + tensor.nbytes} of the data, "
                f"beyond the end of the file: it holds {data_size}; it was cut short"
            )
        if begin < expected:
            raise TltError(
                f"{file}: tensor {shortened(tensor.name)} begins at {begin} and overlaps {before}, "
                f"which ends at {expected}"
            )
        if begin > expected:
            raise TltError(
                f"{file}: tensor {shortened(tensor.name)} begins at {begin}, which leaves a hole of "
                f"{begin - expected} bytes behind {before}"
            )
        expected, before = begin + tensor.nbytes, shortened(tensor.name)
    if data_size is not None and expected != data_size:
        raise TltError(
            f"{file}: {data_size - expected} trailing bytes behind {before}; "
            f"the header describes {expected} of {data_size} bytes"
        )


def _elements(shape: list[int], where: str) -> int:
    """The product of a shape; stops early, since a hostile one has millions of huge dims."""
    product = 1
    for dim in shape:
        product *= dim
        if product > _MAX_DIM:
            raise TltError(f"{where} has shape {shortened(shape)}, whose product overflows 63 bits")
    return product


def _natural_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= _MAX_DIM for number in value)
