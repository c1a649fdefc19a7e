"""Safetensors dtypes as torch dtypes, and a tensor's own memory as bytes without a copy."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

from tlt_cli.errors import TltError

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


@cache
def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype; TltError where this torch has none (F6_E2M3, say)."""
    import torch

    found = getattr(torch, _TORCH_NAMES.get(dtype, ""), None)
    if not isinstance(found, torch.dtype):
        raise TltError(f"torch {torch.__version__} has no dtype for {dtype}")
    return found


@cache
def safetensors_dtype(dtype: torch.dtype) -> str:
    """The name under which safetensors stores a torch dtype; TltError where it has none."""
    name = str(dtype).removeprefix("torch.")
    for stored, known in _TORCH_NAMES.items():
        if known == name:
            return stored
    raise TltError(f"safetensors cannot store {dtype}")


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that torch gives a stored tensor: F4 packs two elements of the last dim in one.

    >>> torch_shape("F4", (3, 8)), torch_shape("F32", (3, 8))
    ((3, 4), (3, 8))
    """
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor: a view, valid as long as the tensor lives.

    By address, since numpy knows neither bfloat16 nor the 8-bit floats.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")
