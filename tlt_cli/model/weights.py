"""A checkpoint's tensors into a decoder: all of them in memory, or each one when it is its turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tlt_cli.errors import TltError
from tlt_cli.model.decoder import Decoder
from tlt_cli.model.describe import describe
from tlt_cli.model.grouped import decoder_class

if TYPE_CHECKING:
    from tlt_cli.families.fit import Fit


def load(
    read: Callable[[str], Tensor],
    names: Iterable[str],
    description: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder with all weights in memory, read one by one. Raises TltError where names do not match exactly."""
    decoder = decoder_class(description)(description, device="meta", dtype=dtype)
    wanted = decoder.stored
    given = set(names)
    for name in sorted(wanted.keys() ^ given):
        what = "missing from the checkpoint" if name in wanted else "unknown to the decoder"
        raise TltError(f"{name} is {what}")
    for name, placeholder in wanted.items():
        # a copy of its own: training must never write into what the reader may hand out again
        tensor = read(name)
        tensor = tensor.to(device, dtype if placeholder.is_floating_point() else tensor.dtype, copy=True).contiguous()
        if tensor.shape != placeholder.shape:
            raise TltError(f"{name} is {list(tensor.shape)}, but the decoder needs {list(placeholder.shape)}")
        module, _, leaf = name.rpartition(".")
        _check_integers(decoder, wanted, name, tensor)
        value = nn.Parameter(tensor) if isinstance(placeholder, nn.Parameter) else tensor
        setattr(decoder.get_submodule(module), leaf, value)
    decoder._like = torch.empty(0, device=device, dtype=dtype)
    return decoder


def _finite(read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Reads as `read` does; raises TltError naming the tensor that holds NaN or infinity."""

    def checked(name: str) -> Tensor:
        tensor = read(name)
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit floats know no comparison
        if tensor.numel() and not torch.stack(torch.aminmax(wide)).isfinite().all():
            raise TltError(f"{name} holds NaN or infinite values: the weights are broken")
        return tensor

    return checked


def _check_integers(decoder: Decoder, wanted: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    """TltError where codes are no integers, or the row numbers of a pivoted factor not ascending rows of its matrix."""
    placeholder = wanted[name]
    if placeholder.is_floating_point():
        return
    if tensor.dtype != placeholder.dtype:
        kinds = [str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, placeholder.dtype)]
        raise TltError(f"{name} is stored as {kinds[0]}, but config.json makes it {kinds[1]}")
    for rows, size in decoder.row_numbers(name, tensor) if name.endswith(".lowrank_rows") else ():
        if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= size or bool((rows.diff() <= 0).any())):
            raise TltError(f"{name} must number rows of a matrix of {size}, each once and ascending")


class Weights(Protocol):
    """Where a decoder's weights are read from: a checkpoint, or one of several models in it."""

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        ...

    def read_vectors(self, name: str, start: int, stop: int) -> Tensor:
        """Vectors start to stop along its last dim, counted through all leading ones."""
        ...


def load_checkpoint(
    checkpoint: Weights,
    fit: Fit,
    *,
    stream: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """The decoder of a fitted checkpoint; with `stream` its tensors stay on disk and memory holds one at a time.

    Raises TltError for what the decoder cannot compute, and for weights that are not finite when they are read.
    """
    description, read = describe(fit), _finite(checkpoint.read)
    if not stream:
        return load(read, fit.places, description, dtype, device)

    def rows(name: str, ids: Tensor) -> Tensor:
        """Rows `ids`, ascending [n] -> [n, H]: one read per run of neighbours."""
        asked = ids.cpu()
        if not len(asked):
            return checkpoint.read_vectors(name, 0, 0)
        ends = torch.nonzero(asked.diff() != 1).flatten() + 1
        runs = asked.tensor_split(ends)
        found = [checkpoint.read_vectors(name, int(run[0]), int(run[-1]) + 1) for run in runs]
        return found[0] if len(found) == 1 else torch.cat(found)

    def fetch(name: str) -> Tensor:
        tensor = read(name)
        _check_integers(decoder, wanted, name, tensor)
        return tensor

    decoder = decoder_class(description).stream(description, fetch, rows, dtype=dtype, device=device)
    wanted = decoder.stored
    return decoder
