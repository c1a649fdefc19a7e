"""Headers: what is written is read back, byte for byte as safetensors writes it; anything else is one line of error."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tlt_cli.checkpoint.cast import torch_dtype, torch_shape
from tlt_cli.checkpoint.header import DTYPE_BITS, build_header, parse_header, tensor_bytes
from tlt_cli.checkpoint.reader import Checkpoint, open_checkpoint
from tlt_cli.errors import TltError

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn", "Zs", "Zl", "Zp"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
SIMPLE = [dtype for dtype, bits in DTYPE_BITS.items() if bits >= 8]
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(SIMPLE), SHAPES), max_size=6)
METADATA = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.text('ab\n"é', max_size=8))
quietly = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def listed(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]


def framed(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


# Written and read


@given(TENSORS, METADATA)
def test_what_is_built_parses_back(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    prefix, starts = build_header(listed(tensors), metadata)
    size = sum(tensor_bytes(*kind) for kind in tensors.values())
    assert len(prefix) % 8 == 0 and int.from_bytes(prefix[:8], "little") == len(prefix) - 8
    parsed, read = parse_header(prefix[8:], "f", size)
    assert read == metadata
    assert {name: (info.dtype, info.shape) for name, info in parsed.items()} == tensors
    assert {name: info.start for name, info in parsed.items()} == starts
    again, _ = build_header(list(reversed(listed(tensors))), dict(reversed(metadata.items())))
    assert again == prefix, "the order of what is given must not matter"
    for other in (size + 1, size - 1):
        with pytest.raises(TltError):
            parse_header(prefix[8:], "f", other)


@quietly
@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from([*SIMPLE, "F4"]), SHAPES), min_size=1, max_size=6), st.booleans()
)
def test_the_bytes_are_those_of_safetensors(
    tmp_path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], with_metadata: bool
) -> None:
    whole = {
        name: (dtype, shape)
        for name, (dtype, shape) in tensors.items()
        if dtype != "F4" or (shape and shape[-1] % 2 == 0)
    }
    whole = {name: kind for name, kind in whole.items() if kind[0] not in ("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")}
    metadata = {"format": "pt"} if with_metadata else {}
    values = {
        name: torch.zeros(torch_shape(dtype, shape), dtype=torch.uint8).view(torch_dtype(dtype))
        if DTYPE_BITS[dtype] <= 8
        else torch.zeros(shape, dtype=torch_dtype(dtype))
        for name, (dtype, shape) in whole.items()
    }
    save_file(values, tmp_path / "stock.safetensors", metadata or None)
    written = (tmp_path / "stock.safetensors").read_bytes()
    prefix, _ = build_header(listed(whole), metadata)
    assert written == prefix + bytes(len(written) - len(prefix))
    opened = open_checkpoint(tmp_path / "stock.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in opened.tensors.items()} == whole
    assert all(
        torch.equal(opened.read(name).view(torch.uint8), value.view(torch.uint8))
        for name, value in values.items()
        if value.numel() and value.dim()
    )


def test_a_name_twice_is_never_written() -> None:
    with pytest.raises(TltError, match="two tensors would be written under the one name 'a'"):
        build_header([("a", "F32", (1,)), ("a", "F16", (1,))], {})
    with pytest.raises(TltError, match="'__metadata__'"):
        build_header([("__metadata__", "F32", (1,))], {})


# Whatever else a file holds


def outcome(path: Path, content: bytes) -> Checkpoint | str:
    """The checkpoint, or its one line of error. Any other exception, or a second line, fails the test."""
    path.write_bytes(content)
    try:
        opened = open_checkpoint(path)
    except TltError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path)), error
        assert len(str(error)) < 600 + len(str(path))
        return str(error)
    assert sum(info.nbytes for info in opened.tensors.values()) <= len(content)
    for name in opened.tensors:
        assert len(opened.read_bytes(name, 0, opened.tensors[name].nbytes)) == opened.tensors[name].nbytes
    return opened


def valid() -> tuple[dict[str, Any], bytes]:
    """A small header as a dict, and its data."""
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c.scalar": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
    }
    return header, bytes(range(40))


def test_the_unmutated_header_opens(tmp_path: Path) -> None:
    header, data = valid()
    opened = outcome(tmp_path / "x.safetensors", framed(json.dumps(header).encode(), data))
    assert isinstance(opened, Checkpoint) and list(opened.tensors) == ["a.weight", "b.weight", "c.scalar"]
    assert opened.metadata == {"format": "pt"} and opened.read_bytes("b.weight", 2, 3) == bytes([26, 27, 28])


@quietly
@given(st.binary(max_size=80), st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_random_bytes(tmp_path: Path, content: bytes, length: int | None) -> None:
    outcome(tmp_path / "x.safetensors", content)
    outcome(tmp_path / "x.safetensors", framed(content, length=length))
    outcome(tmp_path / "x.safetensors", framed(b'{"' + content + b'":{}}'))


NUMBERS = st.one_of(st.integers(-3, 50), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30]))
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=5), st.sampled_from(["F32", "U8", "pt"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.text(max_size=4), st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__"])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@quietly
@given(JSON, st.binary(max_size=8))
def test_random_json(tmp_path: Path, value: object, data: bytes) -> None:
    outcome(tmp_path / "x.safetensors", framed(json.dumps(value).encode(), data))
    outcome(tmp_path / "x.safetensors", framed(json.dumps({"a": value}).encode(), data))
    outcome(tmp_path / "x.safetensors", framed(json.dumps({"__metadata__": value}).encode(), data))


@quietly
@given(st.data())
def test_one_field_changed(tmp_path: Path, data: st.DataObject) -> None:
    header, content = valid()
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(sorted(header[name])))
    header[name][field] = data.draw(
        st.one_of(JSON, st.sampled_from([*DTYPE_BITS, "f32", "F32 "]), st.lists(NUMBERS, max_size=4))
    )
    original = valid()[0]
    result = outcome(tmp_path / "x.safetensors", framed(json.dumps(header).encode(), content))
    if isinstance(result, str) and name != "__metadata__":
        assert original != header, "a header that is not changed opens"


@quietly
@given(st.data())
def test_bytes_changed(tmp_path: Path, data: st.DataObject) -> None:
    """Flipped, cut, inserted, doubled: opening agrees with the format's own reader on what is a file."""
    header, tail = valid()
    content = bytearray(framed(json.dumps(header).encode(), tail))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        what = data.draw(st.sampled_from(["flip", "cut", "insert", "double", "end"]))
        if what == "flip":
            content[at] ^= data.draw(st.integers(1, 255))
        elif what == "cut":
            del content[at : at + data.draw(st.integers(1, 20))]
        elif what == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=6))
        elif what == "double":
            content[at:at] = content[at : at + 30]
        else:
            del content[at:]
        content = content or bytearray(b"\0")
    path = tmp_path / "x.safetensors"
    result = outcome(path, bytes(content))
    try:
        with safe_open(path, "pt") as stock:
            names = set(stock.keys())
    except (SafetensorError, OSError, UnicodeDecodeError):
        assert isinstance(result, str), "the format's own reader refuses this file"
    else:  # stricter than the format only in what could not be written again, or is no name
        assert isinstance(result, str) or set(result.tensors) == names


# Each fault by name


def changed(name: str, more: bytes = b"", **fields: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        header, data = valid()
        header[name] = {**header[name], **fields}
        return framed(json.dumps(header).encode(), data + more)

    return make


def text(old: str, new: str, **options: int) -> Callable[[], bytes]:
    def make() -> bytes:
        header, data = valid()
        written = json.dumps(header)
        assert old in written
        return framed(written.replace(old, new, 1).encode("utf-8", "surrogatepass"), data, **options)

    return make


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
FAULTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty file": (lambda: b"", "0 bytes long, but a safetensors file starts with an 8-byte length"),
    "half a length": (lambda: b"\x10\0\0", "3 bytes long"),
    "length 0": (lambda: bytes(8), "its header length is 0"),
    "length past the end": (lambda: framed(b"{}", length=3), "its header takes 3 bytes, but the file ends after 10"),
    "length of the limit": (lambda: framed(b"{}", length=100_000_000), "the file ends after 10; it was cut short"),
    "length beyond the limit": (lambda: framed(b"{}", length=100_000_001), "more than the format's limit"),
    "length of all ones": (lambda: framed(b"{}", length=2**64 - 1), "18446744073709551615 bytes, more than"),
    "a zip": (lambda: b"PK\x03\x04" + bytes(range(40)), "it is a pickle under another name"),
    "a pickle": (lambda: b"\x80\x02}q\x00." + bytes(20), "it is a pickle under another name"),
    "an LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "a page": (lambda: b"<!DOCTYPE html><html>", "probably not a safetensors file"),
    "not UTF-8": (lambda: framed(b'{"\xff":1}'), "not valid UTF-8 at byte 2"),
    "UTF-16": (lambda: framed('{"a": 1}'.encode("utf-16")), "not valid UTF-8 at byte 0"),
    "a byte order mark": (lambda: framed(b"\xef\xbb\xbf{}"), "not valid JSON"),
    "not JSON": (lambda: framed(b"{'a': 1}"), "not valid JSON"),
    "text behind the JSON": (lambda: framed(b"{} {}"), "not valid JSON: Extra data"),
    "zeros behind the JSON": (lambda: framed(b"{}\0\0"), "not valid JSON"),
    "a list": (lambda: framed(b"[]"), "the JSON must be an object, not []"),
    "nested beyond reason": (lambda: framed(DEEP), "not valid JSON: nested too deeply"),
    "NaN": (text("[2, 3]", "[2, NaN]"), "not valid JSON: NaN is not a JSON number"),
    "an endless integer": (text("[2, 3]", "[2, " + "9" * 5000 + "]"), "not valid JSON"),
    "an unpaired surrogate": (text("a.weight", r"a\ud800"), "unpaired surrogate"),
    "a raw surrogate": (text("a.weight", "a\ud800"), "not valid UTF-8"),
    "a name twice": (text("b.weight", "a.weight"), "'a.weight' occurs 2 times"),
    "a field twice": (text('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"'), "'dtype' occurs 2 times"),
    "metadata twice": (text("a.weight", "__metadata__"), "'__metadata__' occurs 2 times"),
    "a name of two lines": (text("a.weight", r"a\nweight"), r"tensor 'a\nweight' has a control character"),
    "metadata a list": (text('{"format": "pt"}', '["pt"]'), "__metadata__ must be an object of strings"),
    "metadata of numbers": (text('"pt"', "1"), "__metadata__ 'format' must be a string, not 1"),
    "metadata of null": (text('"pt"', "null"), "__metadata__ 'format' must be a string, not None"),
    "a tensor of a number": (lambda: framed(b'{"a":3}'), "must have dtype, shape and data_offsets, but has 3"),
    "no dtype": (text('"dtype": "F32", ', ""), "but has ['data_offsets', 'shape']"),
    "a fourth field": (text('"dtype": "F32"', '"dtype": "F32", "x": 1'), "'dtype', 'shape', 'x']"),
    "an unknown dtype": (changed("a.weight", dtype="float32"), "unknown dtype 'float32'; known are BOOL"),
    "a dtype of a list": (changed("a.weight", dtype=["F32"]), "unknown dtype ['F32']"),
    "a negative dim": (changed("a.weight", shape=[-2, -3]), "shape [-2, -3]; wanted a list of integers from 0 up"),
    "a broken dim": (changed("a.weight", shape=[2.0, 3]), "shape [2.0, 3]"),
    "a true dim": (changed("a.weight", shape=[True, 6]), "shape [True, 6]"),
    "a dim beyond 63 bits": (changed("a.weight", shape=[2**63]), "wanted a list of integers"),
    "a product beyond 63 bits": (changed("a.weight", shape=[2**32, 2**32]), "whose product overflows 63 bits"),
    "a million large dims": (changed("a.weight", shape=[2**62] * 100_000), "whose product overflows 63 bits"),
    "one offset": (changed("a.weight", data_offsets=[0]), "data_offsets [0]; wanted [begin, end]"),
    "offsets reversed": (changed("a.weight", data_offsets=[24, 0]), "begins at 24, after its end at 0"),
    "negative offsets": (changed("a.weight", data_offsets=[-24, 0]), "wanted [begin, end]"),
    "a shape too large": (changed("a.weight", shape=[3, 3]), "F32 [3, 3] = 36 bytes, but data_offsets 0..24 hold 24"),
    "a dtype too small": (changed("a.weight", dtype="F16"), "F16 [2, 3] = 12 bytes, but data_offsets 0..24 hold 24"),
    "an overlap": (changed("b.weight", data_offsets=[20, 28]), "at 20 and overlaps 'a.weight', which ends at 24"),
    "the same bytes twice": (changed("b.weight", data_offsets=[16, 24]), "overlaps 'a.weight'"),
    "a hole": (changed("c.scalar", data_offsets=[33, 41], more=b"x"), "leaves a hole of 1 bytes behind 'b.weight'"),
    "beyond the end": (changed("c.scalar", data_offsets=[400, 408]), "ends at byte 408 of the data, beyond the end of"),
    "half a byte": (changed("a.weight", dtype="F4", shape=[49]), "196 bits, not whole bytes"),
    "odd rows of half bytes": (changed("a.weight", dtype="F4", shape=[16, 3]), "its last dim must be even"),
    "data cut short": (lambda: framed(json.dumps(valid()[0]).encode(), bytes(39)), "it was cut short"),
    "no data": (lambda: framed(json.dumps(valid()[0]).encode()), "beyond the end of the file: it holds 0"),
    "trailing bytes": (lambda: framed(json.dumps(valid()[0]).encode(), bytes(41)), "1 trailing bytes behind 'c."),
    "data of no tensor": (lambda: framed(b"{}", b"x"), "1 trailing bytes behind the header"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(tmp_path: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    result = outcome(tmp_path / "x.safetensors", make())
    assert isinstance(result, str), "it opened"
    assert message in result


def test_a_huge_length_takes_no_memory(tmp_path: Path) -> None:
    """A sparse file that claims the largest header is refused by its content, not by what it claims."""
    path = tmp_path / "x.safetensors"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for length in (2**63, 10**12, 100_000_001):
        assert isinstance(outcome(path, framed(b"{}", length=length)), str)
    tensor = {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}
    assert "beyond the end" in str(outcome(path, framed(json.dumps({"a": tensor}).encode(), b"x")))
    with path.open("wb") as file:  # a terabyte that really is there, on paper
        file.write(framed(json.dumps({"a": tensor}).encode()))
        file.truncate(file.tell() + 2**40)
    assert open_checkpoint(path).tensors["a"].nbytes == 2**40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
